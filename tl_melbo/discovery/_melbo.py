"""MELBO: vectors at an early layer that change a later layer as much as possible."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
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

    Source: Mack & Turner 2024. Their code takes the norm over positions, which is not copied.
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
    """Check what can be checked of a search without a model, so before one is loaded."""
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
        f: the activation map, see `ActivationMap.from_prompts`.
        n_vectors: how many; at most d_model if orthogonal.
        radius: their L2 norm, in the units of the residual stream. The critical choice: too small
            changes nothing, too large gives gibberish. "auto" takes `calibrate_radius`.
        p, q, norm: of `melbo_objective`.
        positions: where the effect is measured, counted on each prompt's own tokens. The first
            token is an attention sink in most models: if it counts, little else does.
        orthogonal: find one after another, vector k in the complement of vectors 0 to k-1. If not,
            each climbs from its own start, and several may coincide.
        seed: of the random starts, uniform on the sphere; start k depends on the seed and k alone.
        optimiser: "ascent", fast, its objective never falls; or "adamw", as published.
        steps: gradients for each vector at most ("ascent", 10 by default), or steps ("adamw", 300).
        previous: vectors 0 to k-1 of the same search, all of them. The result is what follows,
            `n_vectors` more, as if there had been no break.

    Returns:
        The vectors with their objective, how many gradients each took, `gain`, by how much of
        itself its last step raised the objective (for "adamw", the last tenth of the steps), and
        whether it `converged`: it gained less than 1%, or points as its gradient does.
        `history[:, i]` is the objective after i steps.

    Raises:
        ValueError: a number out of its range, a radius too small to have any effect.
        DifferentSearch: `previous` is not the beginning of this search.
        NotFinite: the objective or its gradient is not finite for any vector.

    Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
    """
    steps = DEFAULT_STEPS[optimiser] if steps is None else steps
    check_settings(max(1, n_vectors), radius, p, q, steps, seed)
    f.position_mask(positions)  # refuses what some prompt does not have, before the calibration
    radius, calibration = chosen_radius(f, radius, previous, positions)
    chosen = {
        "radius": radius, "p": p, "q": p if q is None else q, "norm": norm, "positions": positions,
        "orthogonal": orthogonal, "optimiser": optimiser, "steps": steps,
    }  # fmt: skip
    climb = _Climb(f, on_step, **chosen)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        starts = numbered_sphere(first + n_vectors, int(f.x.shape[-1]), seed)
        return climb.parts(starts, earlier, first)

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


@dataclass(frozen=True)
class _Climb:
    f: EffectMap
    on_step: OnStep | None
    radius: float
    p: float
    q: float
    norm: Norm
    positions: slice
    orthogonal: bool
    optimiser: Optimiser
    steps: int

    def objective(self, effect: Tensor) -> Tensor:
        return melbo_objective(effect, self.p, self.q, self.norm)

    @cached_property
    def evaluate(self) -> _map.Evaluate:
        return _map.value_and_gradient(self.f, self.objective, self.positions)

    @cached_property
    def nothing(self) -> float:
        """The objective of effects that are rounding alone: all there is of it, everywhere."""
        counted = self.f.position_mask(self.positions).double()[None, :, :, None]
        return float(self.objective(counted * _map.rounding(self.f, self.positions)))

    def parts(self, starts: Tensor, earlier: Tensor, first: int) -> Iterator[Part]:
        """One vector after another if they are to be orthogonal, else group by group."""
        if self.orthogonal:
            numbers = range(first, len(starts))
            parts = one_by_one(earlier, numbers, lambda k, taken: self.climb(starts[[k]], taken, k))
        else:
            groups = range(first, len(starts), _GROUP)
            parts = (self.climb(starts[k : k + _GROUP], starts[:0], k) for k in groups)
        for part in parts:
            if part.first == first:
                self.warn_if_dominated(part.vectors[:1])
            yield part

    def climb(self, starts: Tensor, basis: Tensor, first: int) -> Part:
        """Climb from all these starts at once, in the complement of the basis."""
        optimise, first_step = OPTIMISERS[self.optimiser]
        states = optimise(self.evaluate, starts, basis, self.radius, self.steps)
        state = started = next(states)
        if (started.value <= self.nothing).any():
            raise ValueError(
                "radius: a random vector of this norm changes nothing at the positions that count, "
                f"as far as the model's type can tell (vector {first}); use a larger radius, or a "
                "smaller p"
            )
        history = []
        for step, state in enumerate(itertools.chain([started], states), first_step):
            history.append(state.value)
            if self.on_step is not None:
                self.on_step(Step(first, len(starts), step, self.steps, state.value.clone()))
        theta = (state.unit * self.radius).float()
        return Part(first, theta, state.columns(), torch.stack(history, 1))

    def warn_if_dominated(self, theta: Tensor) -> None:
        """Say so where the first tokens alone make the objective: see `positions` in `melbo`."""
        counted = self.f.position_mask(self.positions)
        first = self.f.position_mask(slice(0, 1)) & counted
        if not first.any() or torch.equal(first, counted):
            return
        with torch.no_grad():
            effect = self.f.delta(theta.to(self.f.x.device))[0]
        powers = effect.norm(dim=-1).double() ** self.p
        share = float(powers[first].sum() / powers[counted].sum())
        if share > _DOMINATED:
            warn_user(
                f"{share:.0%} of the first vector's objective comes from the first token, so that "
                "all vectors may do the same thing, or nothing. Leave it out with "
                "positions=slice(1, None), or measure where the next tokens are made with "
                "slice(-3, None)"
            )
