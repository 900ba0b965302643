"""Two optimisers that bring a loss down inside the orthogonal complement of a basis."""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tl_melbo.geometry import complement

# Why the search for a vector ended; the column "stopped" counts into this list.
STOPPED = ("max steps reached", "converged", "not finite")
STEPS_USED_UP, CONVERGED, NOT_FINITE = range(3)

# Pairs of steps and gradient changes that the quasi-Newton method remembers.
_MEMORY = 20
# Ever shorter steps along one direction, before it is given up.
_MOST_TRIALS = 6
# It is done when the distance fell by less than this share in so many evaluations.
_STALLED, _STALLED_FOR = 0.005, 10


class Point(NamedTuple):
    """A vector with its loss, its distance (the loss without penalty), and the loss's gradient."""

    theta: Tensor
    loss: float
    distance: float
    gradient: Tensor

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and bool(torch.isfinite(self.gradient).all())


class Result(NamedTuple):
    theta: Tensor
    distance: float
    stopped: int
    history: list[float]


Loss = Callable[[Tensor], Point]
# Told the number of each gradient and the distance there.
Note = Callable[[int, float], None]


def adam(loss: Loss, start: Tensor, basis: Tensor, n_steps: int, note: Note) -> Result:
    """The published optimiser: Adam from a copy of theta0, projected after each step."""
    theta = start.to(torch.float32, copy=True)
    optimiser = torch.optim.Adam([theta], lr=0.01)
    history: list[float] = []
    finite, stopped = theta.double(), STEPS_USED_UP
    for step in range(1, n_steps + 1):
        here = loss(theta.double())
        if not here.is_finite:
            stopped = NOT_FINITE
            break
        finite = here.theta
        history.append(here.distance)
        note(step, here.distance)
        theta.grad = here.gradient.float()
        optimiser.step()
        theta.copy_(_within(basis, theta.double()))
    end = loss(_within(basis, finite if stopped == NOT_FINITE else theta.double()))
    if not math.isfinite(end.distance):  # after the last step
        stopped, end = NOT_FINITE, loss(_within(basis, finite))
    return Result(end.theta, end.distance, stopped, [*history, end.distance])


def quasi_newton(loss: Loss, inverse: Tensor, basis: Tensor, n_steps: int, note: Note) -> Result:
    """L-BFGS from zero, preconditioned with the inverse of half the squared distance's Hessian."""

    def at(theta: Tensor) -> Point:
        point = loss(_within(basis, theta))
        return point._replace(gradient=_within(basis, point.gradient))

    precondition = _preconditioner(inverse, basis)
    here = at(inverse.new_zeros(len(inverse)))
    history, stopped = [here.distance], STEPS_USED_UP
    if not here.is_finite:
        return Result(here.theta, here.distance, NOT_FINITE, history)
    note(1, here.distance)
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    while len(history) < n_steps:
        direction = _within(basis, -_two_loops(here, pairs, precondition))
        slope = float(here.gradient @ direction)
        if not slope < 0 or _has_stalled(history):
            stopped = CONVERGED
            break
        length, trial = 1.0, here
        for _ in range(min(_MOST_TRIALS, n_steps - len(history))):
            trial = at(here.theta + length * direction)
            is_lower = trial.is_finite and trial.loss <= here.loss + 1e-4 * length * slope
            history.append(trial.distance if is_lower else here.distance)
            note(len(history), history[-1])
            if is_lower:
                break
            length *= _backtrack(here.loss, slope * length, trial.loss)
        else:
            if not trial.is_finite:
                stopped = NOT_FINITE
            elif len(history) < n_steps:
                stopped = CONVERGED
            break
        step, change = trial.theta - here.theta, trial.gradient - here.gradient
        if float(step @ change) > 1e-8 * float(step.norm() * change.norm()):
            pairs.append((step, change))
        here = trial
    return Result(here.theta, here.distance, stopped, history)


def _within(basis: Tensor, vector: Tensor) -> Tensor:
    return complement(vector[None], basis)[0]


def _preconditioner(inverse: Tensor, basis: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the matrix restricted to the complement of the basis, by the block inverse."""
    across = inverse @ basis.T
    inner = torch.linalg.cholesky(basis @ across)

    def apply(vector: Tensor) -> Tensor:
        result = inverse @ vector
        return result - across @ torch.cholesky_solve((basis @ result)[:, None], inner)[:, 0]

    return apply


def _two_loops(
    here: Point, pairs: deque[tuple[Tensor, Tensor]], precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """L-BFGS's inverse Hessian times the gradient (Nocedal 1980)."""
    vector, weights = here.gradient, []
    for step, change in reversed(pairs):
        weights.append((step @ vector) / (step @ change))
        vector = vector - weights[-1] * change
    # The Hessian of the distance is that of half its square, over the distance.
    vector = here.distance * precondition(vector)
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        vector = vector + (weight - (change @ vector) / (step @ change)) * step
    return vector


def _backtrack(loss: float, slope: float, trial_loss: float) -> float:
    """How much shorter to try: to the bottom of the parabola, from a tenth to a half."""
    if not math.isfinite(trial_loss):
        return 0.1
    curvature = trial_loss - loss - slope
    return min(0.5, max(0.1, -slope / (2 * curvature))) if curvature > 0 else 0.5


def _has_stalled(history: list[float]) -> bool:
    before = history[-1 - _STALLED_FOR] if len(history) > _STALLED_FOR else math.inf
    return before - history[-1] < _STALLED * before
