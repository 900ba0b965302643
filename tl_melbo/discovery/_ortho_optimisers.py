"""The vector whose effect is nearest to that of theta0: the loss, and two optimisers.

Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors", for the loss and
Adam; the quasi-Newton method is ours.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tl_melbo.discovery._arithmetic import own_arithmetic
from tl_melbo.discovery._gradient import value_and_gradient
from tl_melbo.discovery._protocol import EffectMap, effects_at, theta_like
from tl_melbo.errors import place, warn_user
from tl_melbo.geometry import complement
from tl_melbo.memory import map_batches

# Why the search for a vector ended; the column "stopped" counts into this list.
STOPPED = ("steps used up", "converged", "not finite")
STEPS_USED_UP, CONVERGED, NOT_FINITE = range(3)

# Pairs of steps and gradient changes that the quasi-Newton method remembers.
_MEMORY = 20
# Ever shorter steps along one direction, before it is given up.
_MOST_TRIALS = 6
# It is done when the distance fell by less than this share in so many evaluations.
_STALLED, _STALLED_FOR = 0.005, 10


class OrthoStep(NamedTuple):
    """What the search for one vector reports after each gradient."""

    vector: int
    step: int
    n_steps: int
    distance: float


OnOrthoStep = Callable[[OrthoStep], None]


class Result(NamedTuple):
    theta: Tensor
    distance: float
    stopped: int
    history: list[float]


class Point(NamedTuple):
    """A vector with its loss, its distance, and the loss's gradient."""

    theta: Tensor
    loss: float
    distance: float
    gradient: Tensor

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and bool(torch.isfinite(self.gradient).all())


class Problem:
    """The loss of one family, in float64 on the CPU around f, with the distance beside it."""

    def __init__(
        self,
        f: EffectMap,
        theta0: Tensor,
        norm_penalty: float,
        n_steps: int,
        on_step: OnOrthoStep | None,
    ) -> None:
        self.f, self.theta0, self.norm_penalty = f, theta0.double(), norm_penalty
        self.n_steps, self.on_step = n_steps, on_step
        self.effects = effects_at(f, slice(None))
        with own_arithmetic(f), torch.no_grad():
            self.counts = f.mask.sum(-1, keepdim=True)
            self.target = self.mean_effect(self.effects(theta_like(f, theta0[None])))[0]
        broken = (~self.target.isfinite().all(-1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"theta0: the residual stream of {place(f.story(), broken)} is not finite under "
                "it; use a shorter vector, or a model in a wider type (dtype=torch.float32)"
            )
        self.evaluate = value_and_gradient(f, self.distance, slice(None))

    def mean_effect(self, effect: Tensor) -> Tensor:
        """z(theta) - z(0): [vector, prompt, pos, d_model] -> [vector, prompt, d_model]."""
        return effect.sum(2) / self.counts

    def distance(self, effect: Tensor) -> Tensor:
        """|z(theta) - z(theta0)|, over all prompts together."""
        return torch.stack([(z - self.target).norm() for z in self.mean_effect(effect)])

    def at(self, theta: Tensor) -> Point:
        """Loss and gradient at one vector."""
        value, gradient, _ = self.evaluate(theta[None])
        distance, penalty = float(value[0]), self.norm_penalty * float(theta @ theta)
        whole = gradient[0] + 2 * self.norm_penalty * theta
        return Point(theta, distance + penalty, distance, whole)

    def jacobian_gram(self) -> Tensor:
        """J^T J, with J the Jacobian of z at zero, by differences along every axis."""
        d_model = len(self.theta0)
        # Far below where f bends, far above its rounding: a tenth of theta0.
        step = 0.1 * float(self.theta0.norm())

        def of_batch(axes: Tensor) -> Tensor:
            effect = self.mean_effect(self.effects(theta_like(self.f, step * axes)))
            return (effect.flatten(1) / step).double().cpu()

        with own_arithmetic(self.f), torch.no_grad():
            size = self.f.vectors_at_once(with_gradient=False)
            columns, _ = map_batches(of_batch, torch.eye(d_model, dtype=torch.float32), size)
        jacobian = torch.cat(columns)  # transposed: one row an axis of theta
        bad = ~jacobian.isfinite().all(-1)
        if bad.any():
            # Only to know which steps to prefer: those axes are then like the average one.
            what = f"the residual stream of {place(self.f.story())}"
            if bad.all():
                raise FloatingPointError(
                    f"{what} is not finite {step:.3g} along any axis; use a shorter theta0, or a "
                    "model in a wider type"
                )
            warn_user(
                f"{what} is not finite {step:.3g} along {int(bad.sum())} of {d_model} axes; the "
                "search goes on without knowing them, and may take more steps. Use a shorter "
                "theta0, or a model in a wider type"
            )
            jacobian[bad] = 0.0
        return jacobian @ jacobian.T

    def report(self, vector: int, step: int, distance: float) -> None:
        """Tell the caller how far the search is."""
        if self.on_step is not None:
            self.on_step(OrthoStep(vector, step, self.n_steps, distance))


class Adam:
    """The published optimiser: Adam on the distance from a copy of theta0, then projected."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def find(self, k: int, basis: Tensor) -> Result:
        """Vector k, in the basis's orthogonal complement."""
        problem = self.problem
        theta = problem.theta0.float().clone().requires_grad_()
        adam = torch.optim.Adam([theta], lr=0.01)
        history: list[float] = []
        finite, stopped = theta.detach().double(), STEPS_USED_UP
        for step in range(1, problem.n_steps + 1):
            here = problem.at(theta.detach().double())
            if not here.is_finite:
                stopped = NOT_FINITE
                break
            finite = here.theta.clone()
            history.append(here.distance)
            problem.report(k, step, here.distance)
            theta.grad = here.gradient.float()
            adam.step()
            with torch.no_grad():
                theta.copy_(complement(theta.double()[None], basis)[0])
        end = finite if stopped else theta.detach().double()
        end = problem.at(complement(end[None], basis)[0])
        if not math.isfinite(end.distance):  # after the last step
            stopped = NOT_FINITE
            end = problem.at(complement(finite[None], basis)[0])
        return Result(end.theta, end.distance, stopped, [*history, end.distance])


class QuasiNewton:
    """L-BFGS inside the complement, preconditioned with the Gauss-Newton matrix at zero.

    Near zero the squared distance is almost quadratic, with the Hessian J^T J. That matrix is the
    same for all vectors of a family, so it is measured and inverted once; L-BFGS then only has to
    learn how the landscape differs from it farther out. The damping, the mean eigenvalue, keeps
    directions that z hardly feels at zero from being taken at huge lengths.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @functools.cached_property
    def inverse(self) -> Tensor:
        """Of the damped Gauss-Newton matrix; measured when the first vector is searched for."""
        problem = self.problem
        gram = problem.jacobian_gram()
        scale = float(gram.diagonal().mean())
        distance = float(problem.target.norm())
        # The penalty's own curvature, as it stands beside the squared distance.
        shift = scale + 2 * problem.norm_penalty * distance
        return torch.linalg.inv(gram + shift * torch.eye(len(gram), dtype=gram.dtype))

    def find(self, k: int, basis: Tensor) -> Result:
        """Vector k, in the basis's orthogonal complement."""
        problem, precondition = self.problem, self._preconditioner(basis)
        here = problem.at(torch.zeros_like(problem.theta0))
        if not here.is_finite:
            return Result(here.theta, here.distance, NOT_FINITE, [here.distance])
        here = here._replace(gradient=complement(here.gradient[None], basis)[0])
        history: list[float] = [here.distance]
        steps_taken: list[Tensor] = []
        changes: list[Tensor] = []
        problem.report(k, 1, here.distance)
        stopped = STEPS_USED_UP
        while len(history) < problem.n_steps:
            direction = -_two_loops(
                here.gradient, steps_taken, changes, here.distance, precondition
            )
            direction = complement(direction[None], basis)[0]
            if not float(here.gradient @ direction) < 0 or _stalled(history):
                stopped = CONVERGED
                break
            taken, finite = self._line_search(k, here, direction, basis, history)
            if taken is None:
                stopped = CONVERGED if len(history) < problem.n_steps else STEPS_USED_UP
                stopped = stopped if finite else NOT_FINITE
                break
            taken = taken._replace(gradient=complement(taken.gradient[None], basis)[0])
            step, change = taken.theta - here.theta, taken.gradient - here.gradient
            if float(step @ change) > 1e-8 * float(step.norm() * change.norm()):
                steps_taken = [*steps_taken, step][-_MEMORY:]
                changes = [*changes, change][-_MEMORY:]
            here = taken
        return Result(here.theta, here.distance, stopped, history)

    def _line_search(
        self, k: int, here: Point, direction: Tensor, basis: Tensor, history: list[float]
    ) -> tuple[Point | None, bool]:
        """The first of ever shorter steps that lowers the loss, and whether the last was finite.

        Each trial's distance goes to the history, or that before it where the loss did not fall.
        """
        slope, length, finite = float(here.gradient @ direction), 1.0, True
        for _ in range(min(_MOST_TRIALS, self.problem.n_steps - len(history))):
            trial = self.problem.at(complement((here.theta + length * direction)[None], basis)[0])
            finite = trial.is_finite
            is_lower = finite and trial.loss <= here.loss + 1e-4 * length * slope
            length *= _backtrack(here.loss, slope * length, trial.loss)
            history.append(trial.distance if is_lower else here.distance)
            self.problem.report(k, len(history), history[-1])
            if is_lower:
                return trial, True
        return None, finite

    def _preconditioner(self, basis: Tensor) -> Callable[[Tensor], Tensor]:
        """The inverse of the matrix restricted to the complement of the basis.

        By the block inverse, (N^T A N)^-1 is A^-1 less what A^-1 says about the basis.
        """
        across = self.inverse @ basis.T
        inner = torch.linalg.cholesky(basis @ across)

        def apply(vector: Tensor) -> Tensor:
            result = self.inverse @ vector
            return result - across @ torch.cholesky_solve((basis @ result)[:, None], inner)[:, 0]

        return apply


def _two_loops(
    gradient: Tensor,
    steps: list[Tensor],
    changes: list[Tensor],
    distance: float,
    precondition: Callable[[Tensor], Tensor],
) -> Tensor:
    """L-BFGS's inverse Hessian times the gradient (Nocedal 1980)."""
    vector, weights = gradient.clone(), []
    for step, change in zip(reversed(steps), reversed(changes), strict=True):
        weight = (step @ vector) / (step @ change)
        weights.append(weight)
        vector = vector - weight * change
    # The Hessian of the distance is that of half its square, over the distance.
    vector = distance * precondition(vector)
    for step, change, weight in zip(steps, changes, reversed(weights), strict=True):
        vector = vector + (weight - (change @ vector) / (step @ change)) * step
    return vector


def _backtrack(loss: float, slope: float, trial_loss: float) -> float:
    """How much shorter to try: to the bottom of the parabola, within a tenth and a half."""
    if not math.isfinite(trial_loss):
        return 0.1
    curvature = trial_loss - loss - slope
    return min(0.5, max(0.1, -slope / (2 * curvature))) if curvature > 0 else 0.5


def _stalled(history: list[float]) -> bool:
    if len(history) <= _STALLED_FOR:
        return False
    return history[-1 - _STALLED_FOR] - history[-1] < _STALLED * history[-1 - _STALLED_FOR]
