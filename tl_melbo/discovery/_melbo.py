"""MELBO: vectors at an early layer that change a later layer as much as possible.

Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery._calibration import (
    Radius,
    calibrate_radius,
    check_radius,
    chosen_radius,
)
from tl_melbo.discovery._gradient import Evaluation, value_and_gradient
from tl_melbo.discovery._objective import Norm, check_powers, melbo_objective
from tl_melbo.discovery._protocol import EffectMap, rounding, typical_norm
from tl_melbo.discovery._search import (
    Part,
    Search,
    check_count,
    join,
    method,
    one_by_one,
)
from tl_melbo.errors import warn_user
from tl_melbo.geometry import complement, normalise, numbered_sphere, tangent
from tl_melbo.shapes import shape_checked
from tl_melbo.story import about_of, measure
from tl_melbo.vectors import SteeringVectors

Optimiser = Literal["ascent", "adamw"]

DEFAULT_STEPS = {"ascent": 10, "adamw": 300}
# Above this share of the objective, one position drowns all others.
_DOMINATED = 0.9
# A vector is done when the direction of steepest ascent is within this angle (radians) of it.
_CONVERGED_ANGLE = 0.02
# And where its last step raised the objective by less than this share.
_CONVERGED_GAIN = 0.01
# No single step of the ascent turns a vector by more than this angle (radians).
_LARGEST_ANGLE = 1.4
# How fast a step that had to be shortened grows back, with each step that climbs.
_RECOVERY = 1.5
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
def check_settings(
    n_vectors: int,
    radius: Radius,
    p: float,
    q: float | None,
    steps: int | None,
    seed: int,
    typical: float | None = None,
) -> None:
    """Check what can be checked of a search without a model, so before one is loaded.

    The arguments are those of `melbo`, and the typical norm of a residual at the source layer, for
    the error to name.

    Raises:
        ValueError: a number is out of its range.
    """
    check_radius(radius, typical)
    check_count(n_vectors)
    checks.at_least(1, steps=steps)
    checks.seed(seed)
    check_powers(p, q)


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
    """Find vectors of a given length that change the target layer as much as possible.

    Args:
        f: the activation map, see `ActivationMap.from_prompts`.
        n_vectors: how many; at most d_model if orthogonal.
        radius: their L2 norm, in the units of the residual stream. The critical choice: too small
            changes nothing, too large gives gibberish. "auto" takes `calibrate_radius`, which
            costs some seconds.
        p: power of the norm in `melbo_objective`.
        q: root of each prompt's sum in `melbo_objective`; None takes p.
        positions: where the effect is measured, counted on each prompt's own tokens. The default
            is the last three, where the next tokens are made. With all positions the first token
            takes over in most models: its residual is hundreds of times longer than the others',
            and every vector ends up rescaling it (a warning says so).
        orthogonal: find them one after another, each orthogonal to all before it; the order is
            that of the search: vector k is what climbs highest in what vectors 0 to k-1 leave.
            Otherwise optimise all at once, each from its own start; several may then coincide.
        seed: of the random starts, which are uniform on the sphere. Start k depends on the
            seed and k alone.
        optimiser: "ascent", fast, its objective never falls; or "adamw", as published.
        steps: gradient evaluations for each vector at most, the start's included ("ascent",
            10 by default), or gradient steps ("adamw", 300 by default).
        norm: over d_model, "l2" or "lp".
        previous: vectors 0 to k-1 of the same search, all of them: it goes on at vector k, finds
            what it would have found without a break, and gives the new ones. `n_vectors` counts
            from there.
        progress: show a progress bar.
        on_step: called after every step of the search.

    Returns:
        The vectors in the order above. `table()` tells each one's objective, how many gradients it
        took, `gain`, by how much of itself its last step raised the objective (the last tenth of
        the steps, for "adamw"), and whether it `converged`: it gained less than 1%, or points as
        its gradient does. `history[:, i]` is the objective after i steps, and `story` tells
        everything set here.

    Raises:
        ValueError: a number out of its range, more orthogonal vectors than d_model, positions
            that some prompt does not have, a radius too small to have any effect.
        DifferentSearch: `previous` is not the beginning of this search.
        NotFinite: the objective or its gradient is not finite for any vector.

    Warns:
        UserWarning: one position makes nearly all of the objective; or some vectors were lost to
            numbers that are not finite.

    Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
    """
    wanted = n_vectors if previous is None or n_vectors < 0 else 1
    steps = DEFAULT_STEPS[optimiser] if steps is None else steps
    check_settings(wanted, radius, p, q, steps, seed, typical_norm(f))
    check_count(n_vectors, f if orthogonal else None, previous)
    counted = f.position_mask(positions)
    # The slow check last.
    radius, calibration = chosen_radius(
        radius, previous, lambda: calibrate_radius(f, positions=positions)
    )
    q = p if q is None else q

    def objective(effect: Tensor) -> Tensor:
        return melbo_objective(effect, p, q, norm)

    evaluate = value_and_gradient(f, objective, positions)
    # As if each position that counts had all the rounding there is.
    noise = counted.double()[None, :, :, None] * rounding(f, positions)
    climb = _Climb(evaluate, radius, steps, float(objective(noise)), on_step)
    optimise = climb.ascent if optimiser == "ascent" else climb.adamw

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        starts = numbered_sphere(first + n_vectors, int(f.x.shape[-1]), seed)
        none = starts[:0]
        if orthogonal:
            numbers = range(first, len(starts))
            parts = one_by_one(
                earlier, numbers, lambda k, basis: optimise(starts[k : k + 1], basis, k)
            )
        else:
            parts = (
                optimise(starts[k : k + _GROUP], none, k) for k in range(first, len(starts), _GROUP)
            )
        checked = False
        for part in parts:
            finite = part.columns["objective"].isfinite()
            if finite.any() and not checked:
                _warn_if_dominated(f, part.vectors[finite][:1], positions, p)
                checked = True
            yield part

    powers = None if q == p else f"p = {p}, q = {q}"
    steps_taken = {"counts": "steps", "first": 0} if optimiser == "adamw" else {}
    return Search(
        "melbo", f, n_vectors,
        {
            "radius": radius, "p": p, "q": q, "norm": norm, "positions": positions,
            "orthogonal": orthogonal, "optimiser": optimiser, "steps": steps,
        },
        find,
        previous=previous,
        needs=("objective", "evaluations"),
        orthogonal_to={} if orthogonal else None,
        progress=progress,
        seed=seed,
        measure=measure("objective", "objective", powers, **steps_taken),
        about=about_of({"method": "melbo"}),
        categories={"converged": ["no", "yes"]},
        **calibration,
    )  # fmt: skip


iter_melbo = melbo.parts
join_library = join


@dataclass(frozen=True)
class _Climb:
    """The two optimisers; `nothing` is the objective of effects that are rounding alone."""

    evaluate: Callable[[Tensor], Evaluation]
    radius: float
    n_steps: int
    nothing: float
    on_step: OnStep | None

    def ascent(self, starts: Tensor, basis: Tensor, first_vector: int) -> Part:
        """Safeguarded power iteration on the sphere, for all starts at once.

        The power step jumps to the gradient's direction, theta <- R g / |g|. It climbs where the
        objective is convex on the way, as it nearly is: it is a norm of something smooth. Here the
        jump goes along the great circle, and is taken if the objective is higher at its end. If
        not, the next trial is nearer: at the top of the cubic through both ends' values and slopes;
        steps stay shortened for a while. So the objective never falls, and the last iterate is the
        best.
        """
        unit = normalise(complement(starts, basis))
        value, gradient, broken = self.evaluate(unit * self.radius)
        self.check_effect(value, first_vector)
        lost = _not_finite(value, gradient)
        gradient = complement(gradient, basis)
        value = value.masked_fill(lost, math.nan)
        gradient = gradient.masked_fill(lost[:, None], 0.0)
        shortening, gain = torch.ones_like(value), torch.full_like(value, math.nan)
        evaluations = torch.ones(len(unit), dtype=torch.float32)
        history = [value]
        self.report(first_vector, 1, value)
        for step in range(2, self.n_steps + 1):
            heading, power_angle = _power_step(gradient, unit)
            active = (power_angle > _CONVERGED_ANGLE) & ~lost
            if not active.any():
                break
            angle = shortening * power_angle
            cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
            trial = normalise(complement(cosine * unit + sine * heading, basis))
            trial_value, trial_gradient = value.clone(), gradient.clone()
            trial_value[active], raw_gradient, _ = self.evaluate(trial[active] * self.radius)
            trial_gradient[active] = complement(raw_gradient, basis)
            evaluations += active

            climbed = active & (trial_value > value) & trial_gradient.isfinite().all(-1)
            slope = self.radius * _dot(gradient, heading)
            trial_slope = self.radius * _dot(trial_gradient, cosine * heading - sine * unit)
            nearer = _cubic_top(angle, value, slope, trial_value, trial_slope) / power_angle
            recovered = (shortening * _RECOVERY).clamp(max=1.0)
            shortening = torch.where(climbed, recovered, torch.where(active, nearer, shortening))
            gain = torch.where(climbed, trial_value / value - 1, gain)
            unit = torch.where(climbed[:, None], trial, unit)
            gradient = torch.where(climbed[:, None], trial_gradient, gradient)
            value = torch.where(climbed, trial_value, value)
            history.append(value)
            self.report(first_vector, step, value)
        arrived = _power_step(gradient, unit)[1] <= _CONVERGED_ANGLE
        theta = (unit * self.radius).float()
        return _part(first_vector, theta, history, evaluations, gain, arrived, lost, broken)

    def adamw(self, starts: Tensor, basis: Tensor, first_vector: int) -> Part:
        """The published optimiser: projected AdamW, the last iterate returned.

        AdamW works element by element, so that vectors optimised together are as if alone.
        """
        theta = normalise(complement(starts, basis), 1.0)
        theta = (theta * self.radius).float().requires_grad_()
        adamw = torch.optim.AdamW(
            [theta], lr=1e-3, betas=(0.9, 0.98), amsgrad=True, weight_decay=0.0
        )
        history, lost = [], torch.zeros(len(theta), dtype=torch.bool)
        broken: frozenset[int] = frozenset()
        gradient = torch.zeros_like(theta, dtype=torch.float64)
        for step in range(self.n_steps + 1):
            unit = theta.detach().double() / self.radius
            value, gradient, broken_now = self.evaluate(unit * self.radius)
            if step == 0:
                self.check_effect(value, first_vector)
            lost_now = _not_finite(value.masked_fill(lost, 0.0), gradient)
            broken |= broken_now if lost_now.any() else frozenset()
            lost |= lost_now
            value = value.masked_fill(lost, math.nan)
            gradient = gradient.masked_fill(lost[:, None], 0.0)
            history.append(value)
            self.report(first_vector, step, value)
            if step == self.n_steps:
                break
            ascent_direction = complement(tangent(gradient, theta.detach().double()), basis)
            theta.grad = -ascent_direction.float()
            adamw.step()
            with torch.no_grad():
                theta.copy_(normalise(complement(theta.double(), basis), self.radius))
        unit = theta.detach().double() / self.radius
        arrived = _power_step(complement(gradient, basis), unit)[1] <= _CONVERGED_ANGLE
        # Its steps are small ones: a tenth of them counts as one.
        gain = history[-1] / history[-1 - max(1, self.n_steps // 10)] - 1
        evaluations = torch.full((len(theta),), float(self.n_steps + 1), dtype=torch.float32)
        theta = theta.detach()
        return _part(first_vector, theta, history, evaluations, gain, arrived, lost, broken)

    def check_effect(self, value: Tensor, first_vector: int) -> None:
        """Refuse vectors whose effect is rounding, if any."""
        if bool((value <= self.nothing).any()):
            raise ValueError(
                "radius: a random vector of this length changes nothing at the positions that "
                f"count, as far as the model's type can tell (vector {first_vector}); use a larger "
                "radius, or a smaller p"
            )

    def report(self, first_vector: int, step: int, value: Tensor) -> None:
        """Tell the caller how far the search is."""
        if self.on_step is not None:
            self.on_step(Step(first_vector, len(value), step, self.n_steps, value.clone()))


def _part(
    first: int,
    theta: Tensor,
    history: list[Tensor],
    evaluations: Tensor,
    gain: Tensor,
    arrived: Tensor,
    lost: Tensor,
    broken: frozenset[int],
) -> Part:
    """The result of an optimiser."""
    columns = {
        "objective": history[-1],
        "evaluations": evaluations,
        "gain": gain,
        "converged": (arrived | (gain < _CONVERGED_GAIN)).long(),
    }
    return Part(
        first, theta, columns, torch.stack(history, 1), broken if lost.any() else frozenset()
    )


def _not_finite(value: Tensor, gradient: Tensor) -> Tensor:
    return ~(value.isfinite() & gradient.isfinite().all(-1))


def _power_step(gradient: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The great circle from `unit` towards the gradient's direction, and the angle to there."""
    slope_direction = tangent(gradient, unit)
    steepness = slope_direction.norm(dim=-1)
    angle = torch.atan2(steepness, _dot(gradient, unit)).clamp(max=_LARGEST_ANGLE)
    tiny = torch.finfo(torch.float64).tiny
    return slope_direction / steepness.clamp_min(tiny)[:, None], angle


def _cubic_top(
    width: Tensor, value0: Tensor, slope0: Tensor, value1: Tensor, slope1: Tensor
) -> Tensor:
    """Where the cubic through two values and slopes, `width` apart, is highest in between.

    Kept to 0.1 to 0.7 of the width; 0.4 of it where the numbers give no top.
    """
    linear = slope0 * width
    rise = value1 - value0
    quadratic = 3 * rise - (2 * slope0 + slope1) * width
    cubic = (slope0 + slope1) * width - 2 * rise
    root = (quadratic.square() - 3 * cubic * linear).clamp_min(0).sqrt()
    # Of the two zeros of the derivative, the form of the maximum that is stable for small cubics.
    top = linear / (root - quadratic)
    return width * torch.where(top.isfinite(), top, 0.4).clamp(0.1, 0.7)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _warn_if_dominated(f: EffectMap, theta: Tensor, positions: slice, p: float) -> None:
    """Say so where the first tokens alone make the objective: see `positions` in `melbo`."""
    counted = f.position_mask(positions)
    first = f.position_mask(slice(0, 1)) & counted
    others = counted & ~first
    if not (first.any() and others.any()):
        return
    with torch.no_grad():
        effect = f.delta(theta.to(f.x.device))[0]
        powers = effect.norm(dim=-1).double() ** p
    share = float(powers[first].sum() / powers[counted].sum())
    if share > _DOMINATED:
        warn_user(
            f"{share:.0%} of the first vector's objective comes from the first token: the search "
            f"sees little else, and its vectors may all do the same thing, or nothing. "
            f"positions={positions} includes that token; leave it out with slice(1, None), "
            "or measure where the next tokens are made with slice(-3, None)"
        )
