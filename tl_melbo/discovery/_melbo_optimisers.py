"""MELBO's objective on the sphere, and two optimisers that climb it.

Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models", for the
objective and AdamW; the ascent is ours.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_melbo.discovery._gradient import Evaluation, value_and_gradient
from tl_melbo.discovery._objective import Norm, melbo_objective
from tl_melbo.discovery._protocol import EffectMap, rounding
from tl_melbo.discovery._search import Part, one_by_one
from tl_melbo.errors import warn_user
from tl_melbo.geometry import complement, normalise, tangent

Optimiser = Literal["ascent", "adamw"]

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


@dataclass(frozen=True)
class Climb:
    """The objective of one search, and the two optimisers."""

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
        """What is maximised."""
        return melbo_objective(effect, self.p, self.q, self.norm)

    @functools.cached_property
    def evaluate(self) -> Callable[[Tensor], Evaluation]:
        """The objective and its gradient."""
        return value_and_gradient(self.f, self.objective, self.positions)

    @functools.cached_property
    def nothing(self) -> float:
        """The objective of effects that are rounding alone: all there is of it, everywhere."""
        counted = self.f.position_mask(self.positions).double()[None, :, :, None]
        return float(self.objective(counted * rounding(self.f, self.positions)))

    def parts(self, starts: Tensor, earlier: Tensor, first: int) -> Iterator[Part]:
        """One vector after another if they are to be orthogonal, else group by group."""
        optimise = self.ascent if self.optimiser == "ascent" else self.adamw
        if self.orthogonal:
            numbers = range(first, len(starts))
            parts = one_by_one(earlier, numbers, lambda k, taken: optimise(starts[[k]], taken, k))
        else:
            groups = range(first, len(starts), _GROUP)
            parts = (optimise(starts[k : k + _GROUP], starts[:0], k) for k in groups)
        is_first = True
        for part in parts:
            found = part.vectors[part.columns["objective"].isfinite()]
            if is_first and len(found):
                self.warn_if_dominated(found[:1])
                is_first = False
            yield part

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
        for step in range(2, self.steps + 1):
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
        for step in range(self.steps + 1):
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
            if step == self.steps:
                break
            ascent_direction = complement(tangent(gradient, theta.detach().double()), basis)
            theta.grad = -ascent_direction.float()
            adamw.step()
            with torch.no_grad():
                theta.copy_(normalise(complement(theta.double(), basis), self.radius))
        unit = theta.detach().double() / self.radius
        arrived = _power_step(complement(gradient, basis), unit)[1] <= _CONVERGED_ANGLE
        # Its steps are small ones: a tenth of them counts as one.
        gain = history[-1] / history[-1 - max(1, self.steps // 10)] - 1
        evaluations = torch.full((len(theta),), float(self.steps + 1), dtype=torch.float32)
        theta = theta.detach()
        return _part(first_vector, theta, history, evaluations, gain, arrived, lost, broken)

    def warn_if_dominated(self, theta: Tensor) -> None:
        """Say so where the first tokens alone make the objective: see `positions` in `melbo`."""
        counted = self.f.position_mask(self.positions)
        first = self.f.position_mask(slice(0, 1)) & counted
        others = counted & ~first
        if not (first.any() and others.any()):
            return
        with torch.no_grad():
            effect = self.f.delta(theta.to(self.f.x.device))[0]
            powers = effect.norm(dim=-1).double() ** self.p
        share = float(powers[first].sum() / powers[counted].sum())
        if share > _DOMINATED:
            warn_user(
                f"{share:.0%} of the first vector's objective comes from the first token: the "
                "search sees little else, and its vectors may all do the same thing, or nothing. "
                f"positions={self.positions} includes that token; leave it out with "
                "slice(1, None), or measure where the next tokens are made with slice(-3, None)"
            )

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
            self.on_step(Step(first_vector, len(value), step, self.steps, value.clone()))


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
