"""Two optimisers that climb a measure of effects on the sphere, for many vectors at once."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tl_melbo.discovery._map import Evaluate
from tl_melbo.geometry import complement, normalise, tangent

# A vector has converged when the direction of steepest ascent is within this angle (radians),
_CONVERGED_ANGLE = 0.02
# or when its last step raised the measure by less than this share.
_CONVERGED_GAIN = 0.01
# No single step of the ascent turns a vector by more than this angle (radians).
_LARGEST_ANGLE = 1.4
# How fast a step that had to be shortened grows back, with each step that climbs.
_RECOVERY = 1.5


class State(NamedTuple):
    """Where the vectors are after a step; a lost one has the value NaN and the gradient 0."""

    unit: Tensor
    value: Tensor
    gradient: Tensor
    gain: Tensor
    evaluations: Tensor

    def columns(self) -> dict[str, Tensor]:
        """What the table tells of each vector."""
        angle = _power_step(self.gradient, self.unit)[1]
        converged = (angle <= _CONVERGED_ANGLE) | (self.gain < _CONVERGED_GAIN)
        return {
            "objective": self.value,
            "evaluations": self.evaluations,
            "gain": self.gain,
            "converged": converged.long(),
        }


def ascent(
    evaluate: Evaluate, starts: Tensor, basis: Tensor, radius: float, n_evaluations: int
) -> Iterator[State]:
    """Safeguarded power iteration on the sphere, in the complement of an orthonormal basis.

    The power step goes to the gradient's direction, theta <- R g / |g|, along the great circle. It
    is taken if the measure is higher there. If not, the next trial is nearer: at the top of the
    cubic through both ends' values and slopes. So the measure never falls.
    """
    unit = normalise(complement(starts, basis))
    value, gradient = _without_lost(*evaluate(unit * radius))
    gradient = complement(gradient, basis)
    shortening, gain = torch.ones_like(value), torch.full_like(value, math.nan)
    evaluations = torch.ones(len(unit), dtype=torch.float32)
    yield State(unit, value, gradient, gain, evaluations)
    for _ in range(1, n_evaluations):
        heading, power_angle = _power_step(gradient, unit)
        active = (power_angle > _CONVERGED_ANGLE) & value.isfinite()
        if not active.any():
            return
        angle = shortening * power_angle
        cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
        trial = normalise(complement(cosine * unit + sine * heading, basis))
        trial_value, trial_gradient = value.clone(), gradient.clone()
        trial_value[active], raw_gradient = evaluate(trial[active] * radius)
        trial_gradient[active] = complement(raw_gradient, basis)
        evaluations = evaluations + active

        climbed = active & (trial_value > value) & trial_gradient.isfinite().all(-1)
        slope = radius * _dot(gradient, heading)
        trial_slope = radius * _dot(trial_gradient, cosine * heading - sine * unit)
        nearer = _cubic_top(angle, value, slope, trial_value, trial_slope) / power_angle
        recovered = (shortening * _RECOVERY).clamp(max=1.0)
        shortening = torch.where(climbed, recovered, torch.where(active, nearer, shortening))
        gain = torch.where(climbed, trial_value / value - 1, gain)
        unit = torch.where(climbed[:, None], trial, unit)
        gradient = torch.where(climbed[:, None], trial_gradient, gradient)
        value = torch.where(climbed, trial_value, value)
        yield State(unit, value, gradient, gain, evaluations)


def adamw(
    evaluate: Evaluate, starts: Tensor, basis: Tensor, radius: float, n_steps: int
) -> Iterator[State]:
    """The published optimiser: AdamW, projected to the sphere and to the complement of a basis."""
    theta = (normalise(complement(starts, basis)) * radius).float()
    optimiser = torch.optim.AdamW(
        [theta], lr=1e-3, betas=(0.9, 0.98), amsgrad=True, weight_decay=0.0
    )
    history = []
    # Its steps are small: a tenth of them counts as one.
    window = max(1, n_steps // 10)
    for step in range(n_steps + 1):
        unit = theta.double() / radius
        lost_before = history[-1].isnan() if history else False
        value, gradient = _without_lost(*evaluate(unit * radius), lost_before)
        history.append(value)
        gain = value / history[max(0, step - window)] - 1
        evaluations = torch.full((len(theta),), step + 1, dtype=torch.float32)
        yield State(unit, value, complement(gradient, basis), gain, evaluations)
        if step < n_steps:
            theta.grad = -complement(tangent(gradient, theta.double()), basis).float()
            optimiser.step()
            theta.copy_(normalise(complement(theta.double(), basis), radius))


def _without_lost(
    value: Tensor, gradient: Tensor, lost_before: Tensor | bool = False
) -> tuple[Tensor, Tensor]:
    lost = ~(value.isfinite() & gradient.isfinite().all(-1)) | lost_before
    return value.masked_fill(lost, math.nan), gradient.masked_fill(lost[:, None], 0.0)


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
