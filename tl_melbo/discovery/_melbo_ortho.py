"""MELBO-ortho: from one steering vector, many more that do the same, all orthogonal.

Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_melbo.discovery._protocol import EffectMap, effects_at, own_arithmetic, theta_like
from tl_melbo.discovery._search import Part, Search, join, method, one_by_one, value_and_gradient
from tl_melbo.errors import DifferentSearch, place, warn_user
from tl_melbo.geometry import complement
from tl_melbo.memory import map_batches
from tl_melbo.shapes import Theta, shape_checked
from tl_melbo.story import about_of, differences, measure
from tl_melbo.vectors import SteeringVectors

OrthoOptimiser = Literal["quasi-newton", "adam"]
Vector = Float[Tensor, "d_model"]
# Not Theta: beside `previous`, an axis of the same name would have to be of the same size.
OneRow = Float[Tensor, "reference d_model"]

DEFAULT_ORTHO_STEPS = {"quasi-newton": 40, "adam": 1000}
# A family ends where its vectors have shrunk to this norm, as the published one does.
SMALLEST_NORM = 0.1
# Why the search for a vector ended; the column "stopped" counts into this list.
STOPPED = ("steps used up", "converged", "not finite")
_STEPS_USED_UP, _CONVERGED, _NOT_FINITE = range(3)

# A theta0 so many times as long as the longest residual leaves nothing of it but rounding.
_LONGEST = 1e3
# How often a vector is searched for whose search broke down at its very start.
_TRIES = 3
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


@method
def melbo_ortho(
    f: EffectMap,
    theta0: SteeringVectors | Vector | OneRow,
    n_vectors: int | None = None,
    norm_penalty: float = 0.0,
    previous: SteeringVectors | Theta | None = None,
    *,
    optimiser: OrthoOptimiser = "quasi-newton",
    steps: int | None = None,
    progress: bool = False,
    on_step: OnOrthoStep | None = None,
) -> Search:
    """Find vectors that do what theta0 does, each orthogonal to it and to all before it.

    With z(theta) the mean over positions of f(x + theta), vector k minimises
    ||z(theta) - z(theta0)|| + norm_penalty ||theta||^2 in the orthogonal complement of theta0 and
    vectors 0 to k-1. Several prompts are taken together: the distance is over all their means.

    Args:
        f: the activation map, see `ActivationMap.from_prompts`.
        theta0: exactly one vector, from anywhere.
        n_vectors: how many to find; None goes on until their norms fall below 0.1 or the space is
            used up (d_model - 1 vectors). It ends there in any case.
        norm_penalty: weight of the squared norm, 0 as published; larger asks for shorter vectors.
        previous: the vectors that this family has already, all of them. The new ones continue it,
            and are the same as if it had never been interrupted.
        optimiser: "quasi-newton", fast: L-BFGS from zero, preconditioned with the Jacobian of z
            at zero, which is measured once for the family; or "adam", as published.
        steps: gradients for each vector, at most: 40 ("quasi-newton") or 1000 ("adam") by default.
        progress: show a progress bar.
        on_step: called after every gradient.

    Returns:
        The new vectors in order. `table()` tells each one's norm, distance |z - z0|, gradient
        evaluations and why its search stopped; `history[:, i]` is the distance after i + 1 of them.

    Raises:
        ValueError: theta0 not one finite vector of the right width, or zero, or of another model
            or layer; more vectors than the space holds; a number out of its range; not one vector
            that qualifies (`melbo_ortho.parts` then yields none).
        DifferentSearch: `previous` of another family, not all of it, or not orthogonal.

    Warns:
        UserWarning: the map gives nothing finite next to zero, so that the family ends early.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors". The
    quasi-Newton method and the penalty's form are ours; the author asked for the penalty.
    """
    start = _checked_start(f, theta0)
    n_steps = DEFAULT_ORTHO_STEPS[optimiser] if steps is None else steps
    if isinstance(previous, SteeringVectors) and previous.story.get("method") != "melbo_ortho":
        _check_same("previous", previous, f.story())
        previous = previous.vectors
    n_previous = 0 if previous is None else len(previous)
    room = len(start) - 1 - n_previous
    least = 1 if previous is None else 0
    if n_vectors is not None and not least <= n_vectors <= room:
        raise ValueError(
            f"n_vectors={n_vectors}: from 1 to {room}; {len(start)} dimensions hold theta0, "
            f"{n_previous} previous vectors and {room} more, or pass None for all there are"
        )
    check_ortho_settings(norm_penalty, n_steps)
    problem = _Problem(f, start, norm_penalty, n_steps, on_step)
    search = _QuasiNewton(problem) if optimiser == "quasi-newton" else _Adam(problem)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        taken = torch.cat([start[None], earlier])
        last = first + (len(start) - 1 - len(earlier) if n_vectors is None else n_vectors)
        return one_by_one(taken, range(first, last), functools.partial(_next_of_family, search))

    return Search(
        "melbo_ortho", f, n_vectors,
        {
            "norm_penalty": norm_penalty, "n_previous": n_previous, "optimiser": optimiser,
            "steps": n_steps,
        },
        find,
        previous=previous,
        needs=("distance", "evaluations"),
        orthogonal_to={"theta0": start},
        nothing=(
            "theta0: nothing orthogonal to it "
            + (f"and to {n_previous} previous vectors is left; the space is used up"
               if not room else
               f"of norm {SMALLEST_NORM} or more does what it does, or the norm penalty "
               f"({norm_penalty}) or the number of steps forbids it, or theta0 is that short")
        ),
        progress=progress,
        measure=measure("distance", "distance |z − z₀|"),
        about=about_of({"method": "melbo_ortho"}),
        theta0={"norm": float(start.norm()), "story": _story_of(theta0)},
        categories={"stopped": list(STOPPED)},
    )  # fmt: skip


iter_melbo_ortho = melbo_ortho.parts


@shape_checked
def join_family(parts: Sequence[SteeringVectors]) -> SteeringVectors:
    """Join consecutive parts of one MELBO-ortho family: as `join_library`, for families only.

    Raises:
        ValueError: none given; or something that is not the next part of the same family.
    """
    for number, part in enumerate(parts):
        if part.story.get("method") != "melbo_ortho":
            raise ValueError(
                f"parts[{number}]: not of melbo_ortho; pass parts of one family, or join others "
                "with concatenate"
            )
    return join(parts)


def check_ortho_settings(norm_penalty: float, steps: int | None) -> None:
    """Check what can be checked without a model, so before one is loaded.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 0 <= norm_penalty < math.inf:
        raise ValueError(f"norm_penalty={norm_penalty}: a finite number, 0 or more")
    if steps is not None and steps < 2:
        raise ValueError(f"steps={steps}: at least 2; the first gradient is taken at the start")


def _next_of_family(search: "_QuasiNewton | _Adam", k: int, basis: Tensor) -> Part | None:
    """Vector k, or None where the family ends."""
    for _ in range(_TRIES):
        theta, distance, stopped, history = search.find(k, basis)
        theta = theta.float()
        if float(theta.norm()) >= SMALLEST_NORM:
            columns = {
                "distance": torch.tensor([distance], dtype=torch.float32),
                "evaluations": torch.tensor([float(len(history))], dtype=torch.float32),
                "stopped": torch.tensor([stopped]),
            }
            return Part(k, theta[None], columns, torch.tensor([history], dtype=torch.float32))
        if stopped != _NOT_FINITE:
            return None
    warn_user(
        f"vector {k}: the residual stream of {place(search.problem.f.story())} was not finite next "
        f"to zero, {_TRIES} times; the family ends here. Load the model in a wider type, or look "
        "for what breaks it"
    )
    return None


class _Result(NamedTuple):
    theta: Tensor
    distance: float
    stopped: int
    history: list[float]


class _Point(NamedTuple):
    """A vector with its loss, its distance, and the loss's gradient."""

    theta: Tensor
    loss: float
    distance: float
    gradient: Tensor

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and bool(torch.isfinite(self.gradient).all())


class _Problem:
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

    def at(self, theta: Tensor) -> _Point:
        """Loss and gradient at one vector."""
        value, gradient, _ = self.evaluate(theta[None])
        distance, penalty = float(value[0]), self.norm_penalty * float(theta @ theta)
        whole = gradient[0] + 2 * self.norm_penalty * theta
        return _Point(theta, distance + penalty, distance, whole)

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


class _Adam:
    """The published optimiser: Adam on the distance from a copy of theta0, then projected."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem

    def find(self, k: int, basis: Tensor) -> _Result:
        """Vector k, in the basis's orthogonal complement."""
        problem = self.problem
        theta = problem.theta0.float().clone().requires_grad_()
        adam = torch.optim.Adam([theta], lr=0.01)
        history: list[float] = []
        finite, stopped = theta.detach().double(), _STEPS_USED_UP
        for step in range(1, problem.n_steps + 1):
            here = problem.at(theta.detach().double())
            if not here.is_finite:
                stopped = _NOT_FINITE
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
            stopped = _NOT_FINITE
            end = problem.at(complement(finite[None], basis)[0])
        return _Result(end.theta, end.distance, stopped, [*history, end.distance])


class _QuasiNewton:
    """L-BFGS inside the complement, preconditioned with the Gauss-Newton matrix at zero.

    Near zero the squared distance is almost quadratic, with the Hessian J^T J. That matrix is the
    same for all vectors of a family, so it is measured and inverted once; L-BFGS then only has to
    learn how the landscape differs from it farther out. The damping, the mean eigenvalue, keeps
    directions that z hardly feels at zero from being taken at huge lengths.
    """

    def __init__(self, problem: _Problem) -> None:
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

    def find(self, k: int, basis: Tensor) -> _Result:
        """Vector k, in the basis's orthogonal complement."""
        problem, precondition = self.problem, self._preconditioner(basis)
        here = problem.at(torch.zeros_like(problem.theta0))
        if not here.is_finite:
            return _Result(here.theta, here.distance, _NOT_FINITE, [here.distance])
        here = here._replace(gradient=complement(here.gradient[None], basis)[0])
        history: list[float] = [here.distance]
        steps_taken: list[Tensor] = []
        changes: list[Tensor] = []
        problem.report(k, 1, here.distance)
        stopped = _STEPS_USED_UP
        while len(history) < problem.n_steps:
            direction = -_two_loops(
                here.gradient, steps_taken, changes, here.distance, precondition
            )
            direction = complement(direction[None], basis)[0]
            if not float(here.gradient @ direction) < 0 or _stalled(history):
                stopped = _CONVERGED
                break
            taken, finite = self._line_search(k, here, direction, basis, history)
            if taken is None:
                stopped = _CONVERGED if len(history) < problem.n_steps else _STEPS_USED_UP
                stopped = stopped if finite else _NOT_FINITE
                break
            taken = taken._replace(gradient=complement(taken.gradient[None], basis)[0])
            step, change = taken.theta - here.theta, taken.gradient - here.gradient
            if float(step @ change) > 1e-8 * float(step.norm() * change.norm()):
                steps_taken = [*steps_taken, step][-_MEMORY:]
                changes = [*changes, change][-_MEMORY:]
            here = taken
        return _Result(here.theta, here.distance, stopped, history)

    def _line_search(
        self, k: int, here: _Point, direction: Tensor, basis: Tensor, history: list[float]
    ) -> tuple[_Point | None, bool]:
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


def _checked_start(f: EffectMap, theta0: SteeringVectors | Tensor) -> Vector:
    """One vector that can be reproduced."""
    start = _one_vector(theta0, int(f.x.shape[-1]))
    longest = float(f.x.norm(dim=-1).max())
    if float(start.norm()) > _LONGEST * longest:
        raise ValueError(
            f"theta0: a norm of {float(start.norm()):.3g}, but that of the residual stream is at "
            f"most {longest:.3g}; use a shorter vector"
        )
    if isinstance(theta0, SteeringVectors):
        facts = {name: f.story().get(name) for name in ("model", "source_layer")}
        _check_same("theta0", theta0, facts)
    return start


def _one_vector(theta0: SteeringVectors | Tensor, d_model: int) -> Vector:
    theta = theta0.vectors if isinstance(theta0, SteeringVectors) else theta0.detach().cpu().float()
    theta = theta[None] if theta.ndim == 1 else theta
    if len(theta) != 1:
        raise ValueError(f"theta0: {len(theta)} vectors, expected exactly one, such as found[5]")
    if theta.shape[1] != d_model:
        raise ValueError(
            f"theta0: {theta.shape[1]} wide, but the residual stream has d_model={d_model}; this "
            "is a vector of another model"
        )
    if not torch.isfinite(theta).all() or not float(theta.norm()) > 0:
        raise ValueError("theta0: zero or not finite, so there is nothing to reproduce")
    return theta[0]


def _check_same(argument: str, vectors: SteeringVectors, ours: dict[str, Any]) -> None:
    differing = differences(vectors.story, ours)
    if differing:
        raise DifferentSearch(
            f"{argument}: found with {', '.join(map(str, differing))}; use the activation map that "
            "it was found with",
            differing,
        )


def _story_of(theta0: SteeringVectors | Tensor) -> dict[str, Any] | None:
    if not isinstance(theta0, SteeringVectors):
        return None
    return {**theta0.story, "index": int(theta0.columns["index"][0])}
