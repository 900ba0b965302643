"""MELBO: vectors at an early layer that change a later layer as much as possible."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_melbo import checks, story
from tl_melbo.discovery import _map, _sphere
from tl_melbo.discovery._calibration import Radius, check_radius, chosen_radius
from tl_melbo.discovery._map import EffectMap
from tl_melbo.discovery._search import MOST_VECTORS, Part, Search, join, method, one_by_one
from tl_melbo.errors import warn_user
from tl_melbo.geometry import numbered_sphere
from tl_melbo.shapes import Delta, shape_checked
from tl_melbo.vectors import SteeringVectors

Norm = Literal["l2", "lp"]
Optimiser = Literal["ascent", "adamw"]

DEFAULT_STEPS = {"ascent": 10, "adamw": 300}
# Each with the number of its first step: the ascent counts gradients.
OPTIMISERS = {"ascent": (_sphere.ascent, 1), "adamw": (_sphere.adamw, 0)}
_LARGEST_POWER = 1e6
# Above this share of the objective, one position drowns all others.
_DOMINATED = 0.9
# Independent vectors that are searched together; a search is taken up again after a group.
_GROUP = 32


class Step(NamedTuple):
    """What a search reports after each step."""

    first_vector: int
    n_at_once: int
    step: int
    n_steps: int
    objective: Float[Tensor, "vector"]


OnStep = Callable[[Step], None]


@shape_checked
def melbo_objective(
    delta: Delta, p: float = 2, q: float | None = None, norm: Norm = "l2"
) -> Float[Tensor, "vector"]:
    """Size of each vector's effect: sum over prompts of (sum over pos of ||delta||^p)^(1/q).

    Args:
        delta: effects; positions that are not to count hold zeros.
        p: at least 1. Published: 2 and 4.
        q: at least 1; None takes p. Published: p and 1.
        norm: over d_model, "l2" (the original post) or "lp", the p-norm (a textbook chapter).

    Source: Mack & Turner 2024, without their code's norm over positions.
    """
    q = p if q is None else q
    checks.between(1, _LARGEST_POWER, "a power", p=p, q=q)
    if norm == "l2":
        squares = delta.square().sum(-1)
        powers = squares if p == 2 else _safe_power(squares, p / 2)
    else:
        powers = _safe_power(delta.abs(), p).sum(-1)
    return _safe_power(powers.sum(-1), 1 / q).sum(-1)


def _safe_power(base: Tensor, exponent: float) -> Tensor:
    """Base ** exponent for base >= 0, with gradient 0 instead of NaN where base is 0."""
    if exponent >= 1:
        return base**exponent
    zero = base == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, base) ** exponent)


@shape_checked
def check_settings(
    n_vectors: int, radius: Radius, p: float, q: float | None, steps: int | None, seed: int
) -> None:
    """Check the settings of which no model is needed."""
    check_radius(radius)
    if not 1 <= n_vectors <= MOST_VECTORS:
        raise ValueError(f"n_vectors={n_vectors}: must be from 1 to {MOST_VECTORS:,}")
    checks.at_least(1, steps=steps)
    checks.seed(seed)
    checks.between(1, _LARGEST_POWER, "a power", p=p, q=p if q is None else q)


@partial(method, check=check_settings)
def melbo(
    f: EffectMap,
    n_vectors: int = 32,
    radius: Radius = "auto",
    p: float = 2,
    q: float | None = None,
    positions: slice = slice(-3, None),
    orthogonal: bool = True,
    seed: int = 0,
    optimiser: Optimiser = "ascent",
    steps: int | None = None,
    *,
    norm: Norm = "l2",
    previous: SteeringVectors | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> Search:
    """Find vectors of a given norm that change the target layer as much as possible.

    Args:
        n_vectors: how many; at most d_model if orthogonal.
        radius: their L2 norm, in the units of the residual stream. Too small changes nothing, too
            large gives gibberish. "auto" takes `calibrate_radius`.
        p, q, norm: of `melbo_objective`.
        positions: where the effect is measured, counted on each prompt's own tokens. The first
            token is an attention sink in most models: if it counts, little else does.
        orthogonal: vector k is in the complement of vectors 0 to k-1. If not, several may coincide.
        seed: of the starts, uniform on the sphere; start k depends on the seed and k alone.
        optimiser: "ascent", fast, its objective never falls; or "adamw", as published.
        steps: gradients for each vector at most ("ascent", 10 by default), or steps ("adamw", 300).
        previous: vectors 0 to k-1 of the same search, all of them; `n_vectors` more are found, as
            if there had been no break.

    Returns:
        The vectors with their objective, how many gradients each took, `gain` (the share by which
        the last step, or tenth of the steps for "adamw", raised the objective), and `converged`.
        `history[:, i]` is the objective after i steps.

    Raises:
        ValueError: a radius too small to have any effect.
        DifferentSearch: `previous` is not the beginning of this search.
        NotFinite: the objective or its gradient is not finite for any vector.

    Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
    """
    steps = DEFAULT_STEPS[optimiser] if steps is None else steps
    check_settings(max(1, n_vectors), radius, p, q, steps, seed)
    radius, calibration = chosen_radius(f, radius, previous, positions)
    chosen = {
        "radius": radius, "p": p, "q": p if q is None else q, "norm": norm, "positions": positions,
        "orthogonal": orthogonal, "optimiser": optimiser, "steps": steps,
    }  # fmt: skip

    objective = partial(melbo_objective, p=p, q=q, norm=norm)
    climb = _climber(f, objective, radius, positions, optimiser, steps, on_step)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        starts = numbered_sphere(first + n_vectors, int(f.x.shape[-1]), seed)
        numbers = range(first, len(starts), 1 if orthogonal else _GROUP)

        def climb_from(k: int, basis: Tensor) -> Part:
            return climb(k, starts[k : k + numbers.step], basis)

        if orthogonal:
            parts = one_by_one(earlier, numbers, climb_from)
        else:
            parts = (climb_from(k, starts[:0]) for k in numbers)
        for part in parts:
            if part.first == first:
                _warn_if_dominated(f, part.vectors[:1], positions, p)
            yield part

    found = {"method": "melbo", "hyperparameters": chosen}
    return Search(
        "melbo", f, n_vectors, chosen, find,
        previous=previous,
        needs=("objective", "evaluations"),
        orthogonal_to={} if orthogonal else None,
        progress=progress,
        seed=seed,
        measure=story.measure_of(found),
        about=story.about_of(found),
        categories={"converged": ["no", "yes"]},
        **calibration,
    )  # fmt: skip


iter_melbo = melbo.parts
join_library = join


def _climber(
    f: EffectMap,
    objective: Callable[[Tensor], Tensor],
    radius: float,
    positions: slice,
    optimiser: Optimiser,
    steps: int,
    on_step: OnStep | None,
) -> Callable[[int, Tensor, Tensor], Part]:
    """The search for one vector, or for several that do not depend on each other."""
    optimise, first_step = OPTIMISERS[optimiser]
    evaluate = _map.value_and_gradient(f, objective, positions)
    counted = f.position_mask(positions).double()[None, :, :, None]
    of_rounding = float(objective(counted * _map.rounding(f, positions)))

    def climb(k: int, starts: Tensor, basis: Tensor) -> Part:
        """Vector k and those that follow, one for each start, in the complement of a basis."""
        states = optimise(evaluate, starts, basis, radius, steps)
        started = state = next(states)
        _map.refuse_no_effect(
            (started.value <= of_rounding).any(),
            "a random vector",
            f"use a larger radius, or a smaller p (vector {k})",
        )
        history = []
        for step, state in enumerate(itertools.chain([started], states), first_step):
            history.append(state.value)
            if on_step is not None:
                on_step(Step(k, len(state.value), step, steps, state.value.clone()))
        theta = (state.unit * radius).float()
        return Part(k, theta, state.columns(), torch.stack(history, 1))

    return climb


def _warn_if_dominated(f: EffectMap, theta: Tensor, positions: slice, p: float) -> None:
    """Say so where the first tokens alone make the objective: see `positions` in `melbo`."""
    counted = f.position_mask(positions)
    first = f.position_mask(slice(0, 1)) & counted
    if not first.any() or torch.equal(first, counted):
        return
    with torch.no_grad():
        powers = f.delta(theta.to(f.x.device))[0].norm(dim=-1).double() ** p
    share = float(powers[first].sum() / powers[counted].sum())
    if share > _DOMINATED:
        warn_user(
            f"{share:.0%} of the first vector's objective comes from the first token, so that all "
            "vectors may do the same thing, or nothing. Leave it out with positions=slice(1, None),"
            " or measure where the next tokens are made with slice(-3, None)"
        )
