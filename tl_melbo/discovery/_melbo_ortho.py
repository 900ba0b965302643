"""MELBO-ortho: from one steering vector, many more that do the same, all orthogonal.

Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_melbo.concatenation import pad_histories
from tl_melbo.discovery._protocol import EffectMap, own_arithmetic
from tl_melbo.errors import place, warn_user
from tl_melbo.geometry import complement, extended, normalise
from tl_melbo.memory import map_batches
from tl_melbo.shapes import Theta, shape_checked
from tl_melbo.story import make as make_story
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

# What the parts of one family have in common.
_FAMILY_FACTS = (
    "model", "weights", "prompts", "chat", "source_layer", "target_layer", "precision", "n_hooks"
)  # fmt: skip
_FAMILY_SETTINGS = ("optimiser", "steps", "norm_penalty")
_LARGEST_COSINE = 1e-5
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


@shape_checked
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
) -> SteeringVectors:
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
            or layer; `previous` of another family, not all of it, or not orthogonal; more vectors
            than the space holds; a number out of its range; not one vector that qualifies.

    Warns:
        UserWarning: the map gives nothing finite next to zero, so that the family ends early.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors". The
    quasi-Newton method and the penalty's form are ours; the author asked for the penalty.
    """
    found = iter_melbo_ortho(
        f, theta0, n_vectors, norm_penalty, previous,
        optimiser=optimiser, steps=steps, on_step=on_step,
    )  # fmt: skip
    with tqdm(total=n_vectors, desc="MELBO-ortho", unit="vector", disable=not progress) as bar:
        parts = []
        for part in found:
            parts.append(part)
            bar.update()
    if not parts:
        raise ValueError(
            f"not one {'more ' if previous is not None else ''}vector of norm {SMALLEST_NORM} or "
            "more brings z nearer to that of theta0: the family ends here, or the norm penalty "
            f"({norm_penalty}) or the number of steps forbids it, or theta0 itself is that short"
        )
    return join_family(parts)


@shape_checked
def iter_melbo_ortho(
    f: EffectMap,
    theta0: SteeringVectors | Vector | OneRow,
    n_vectors: int | None = None,
    norm_penalty: float = 0.0,
    previous: SteeringVectors | Theta | None = None,
    *,
    optimiser: OrthoOptimiser = "quasi-newton",
    steps: int | None = None,
    on_step: OnOrthoStep | None = None,
) -> Iterator[SteeringVectors]:
    """Yield the vectors of `melbo_ortho` one by one, so that each can be kept as it comes.

        parts = []
        for part in tm.iter_melbo_ortho(f, found[5]):
            parts.append(part)
            tm.join_family(parts).save("family.safetensors")

    Arguments are checked at the call, not at the first vector.

    Raises:
        ValueError: as `melbo_ortho`; but where no vector qualifies, none is yielded.
    """
    start = _one_vector(theta0, int(f.x.shape[-1]))
    longest = float(f.x.norm(dim=-1).max())
    if float(start.norm()) > _LONGEST * longest:
        raise ValueError(
            f"theta0: a norm of {float(start.norm()):.3g}, but that of the residual stream is at "
            f"most {longest:.3g}; use a shorter vector"
        )
    if isinstance(theta0, SteeringVectors):
        _check_same("theta0", theta0.story, f.story(), ("model", "source_layer"))
    n_steps = DEFAULT_ORTHO_STEPS[optimiser] if steps is None else steps
    earlier = _checked_previous(
        f,
        start,
        previous,
        {"optimiser": optimiser, "steps": n_steps, "norm_penalty": norm_penalty},
    )
    if any(isinstance(number, bool) for number in (n_vectors, steps)):
        raise TypeError(f"n_vectors={n_vectors}, steps={steps}: numbers, not True or False")
    room = len(start) - 1 - len(earlier)
    if n_vectors is not None and not 1 <= n_vectors <= room:
        raise ValueError(
            f"n_vectors={n_vectors}: from 1 to {room}; {len(start)} dimensions hold theta0, "
            f"{len(earlier)} previous vectors and {room} more, or pass None for all there are"
        )
    if not room:
        raise ValueError(
            f"previous: with theta0 its {len(earlier)} vectors fill all {len(start)} dimensions; "
            "the space is used up"
        )
    check_ortho_settings(norm_penalty, n_steps)
    problem = _Problem(f, start, norm_penalty, n_steps, on_step)
    story = make_story(
        "melbo_ortho",
        **f.story(),
        hyperparameters={
            "n_vectors": n_vectors,
            "norm_penalty": norm_penalty,
            "n_previous": len(earlier),
            "optimiser": optimiser,
            "steps": n_steps,
        },
        theta0={"norm": float(start.norm()), "story": _story_of(theta0)},
        categories={"stopped": list(STOPPED)},
    )
    search = _QuasiNewton(problem) if optimiser == "quasi-newton" else _Adam(problem)
    return _family(problem, search, earlier, room if n_vectors is None else n_vectors, story)


@shape_checked
def join_family(parts: Sequence[SteeringVectors]) -> SteeringVectors:
    """Join consecutive parts of one MELBO-ortho family; every vector keeps its number.

    Args:
        parts: what `iter_melbo_ortho` yields, or what `melbo_ortho` returns and then returns with
            `previous=`, in order.

    Returns:
        One library, with the story of the first part. If parts were asked for one after another,
        its `n_vectors` says how many there are now.

    Raises:
        ValueError: none given; or something that is not the next part of the same family.
    """
    if not parts:
        raise ValueError("parts: none given; pass at least one")
    first = parts[0]
    expected = int(first.columns["index"][0]) if len(first) else 0
    for number, part in enumerate(parts):
        ours, theirs = _family_facts(first), _family_facts(part)
        differing = [fact for fact in ours if fact in theirs and ours[fact] != theirs[fact]]
        if part.story.get("method") != "melbo_ortho" or differing:
            raise ValueError(
                f"parts[{number}]: "
                + (f"differs in {', '.join(differing)}" if differing else "not of melbo_ortho")
                + "; pass parts of one family, or join others with concatenate"
            )
        indices = part.columns["index"].tolist()
        if indices != list(range(expected, expected + len(part))):
            raise ValueError(
                f"parts[{number}]: holds vectors {indices[:3]}..., but {expected} comes next; pass "
                "the parts in their order, and none twice"
            )
        expected += len(part)
    story = dict(first.story)
    if any(part.story["hyperparameters"] != story["hyperparameters"] for part in parts):
        story["hyperparameters"] = {
            **story["hyperparameters"],
            "n_vectors": sum(len(part) for part in parts),
        }
    return SteeringVectors(
        torch.cat([part.vectors for part in parts]),
        story,
        {name: torch.cat([part.columns[name] for part in parts]) for name in first.columns},
        pad_histories([part.history for part in parts], [len(part) for part in parts]),
    )


def check_ortho_settings(norm_penalty: float, steps: int | None) -> None:
    """Check what can be checked without a model, so before one is loaded.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 0 <= norm_penalty < math.inf:
        raise ValueError(f"norm_penalty={norm_penalty}: a finite number, 0 or more")
    if steps is not None and steps < 2:
        raise ValueError(f"steps={steps}: at least 2; the first gradient is taken at the start")


def _family_facts(part: SteeringVectors) -> dict[str, Any]:
    story, chosen = part.story, part.story.get("hyperparameters", {})
    # What earlier versions did not tell was so.
    story = {"precision": "float32", "n_hooks": 0, **story}
    facts = {name: story.get(name) for name in _FAMILY_FACTS if name in story}
    facts |= {name: chosen.get(name) for name in _FAMILY_SETTINGS}
    return facts | {"theta0": (story.get("theta0") or {}).get("norm")}


def _family(
    problem: "_Problem",
    search: "_QuasiNewton | _Adam",
    earlier: Tensor,
    n_vectors: int,
    story: dict[str, Any],
) -> Iterator[SteeringVectors]:
    # In float64: after hundreds of float32 projections the cosines would show.
    basis = normalise(problem.theta0[None])
    for vector in earlier:
        basis = extended(basis, vector)
    for k in range(len(earlier), len(earlier) + n_vectors):
        for _ in range(_TRIES):
            result = search.find(k, basis)
            theta = result.theta.float()
            long_enough = float(theta.norm()) >= SMALLEST_NORM
            if long_enough or result.stopped != _NOT_FINITE:
                break
        else:
            warn_user(
                f"vector {k}: the residual stream of {place(story)} was not finite next to zero, "
                f"{_TRIES} times; the family ends here. Load the model in a wider type, or look "
                "for what breaks it"
            )
            return
        if not long_enough:
            return
        # The float32 vector that is handed out is what the next ones are orthogonal to.
        basis = extended(basis, theta)
        columns = {
            "index": torch.tensor([k]),
            "distance": torch.tensor([result.distance], dtype=torch.float32),
            "evaluations": torch.tensor([float(result.evaluations)], dtype=torch.float32),
            "stopped": torch.tensor([result.stopped]),
        }
        history = torch.tensor([result.history], dtype=torch.float32)
        yield SteeringVectors(theta[None], story, columns, history)


@dataclass(frozen=True)
class _Result:
    theta: Tensor
    distance: float
    evaluations: int
    stopped: int
    history: list[float]


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
        with own_arithmetic(f), torch.no_grad():
            self.counts = f.mask.sum(-1, keepdim=True)
            self.target = self.mean_effect(self._to_device(theta0[None]))[0]
        broken = (~self.target.isfinite().all(-1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"theta0: the residual stream of {place(f.story(), broken)} is not finite under "
                "it; use a shorter vector, or a model in a wider type (dtype=torch.float32)"
            )

    def mean_effect(self, theta: Tensor) -> Tensor:
        """z(theta) - z(0): [vector, d_model] -> [vector, prompt, d_model]."""
        return self.f.delta(theta).sum(2) / self.counts

    def loss_and_gradient(self, theta: Tensor) -> tuple[float, float, Tensor]:
        """Loss, distance and the loss's gradient at one theta."""
        with own_arithmetic(self.f):
            leaf = self._to_device(theta[None]).detach().clone().requires_grad_()
            distance = (self.mean_effect(leaf)[0] - self.target).norm()
            (gradient,) = torch.autograd.grad(distance, leaf)
        penalty = self.norm_penalty * float(theta @ theta)
        whole = gradient[0].double().cpu() + 2 * self.norm_penalty * theta
        reached = float(distance.detach())
        return reached + penalty, reached, whole

    def jacobian_gram(self) -> Tensor:
        """J^T J, with J the Jacobian of z at zero, by differences along every axis."""
        d_model = len(self.theta0)
        # Far below where f bends, far above its rounding: a tenth of theta0.
        step = 0.1 * float(self.theta0.norm())

        def of_batch(axes: Tensor) -> Tensor:
            effect = self.mean_effect(self._to_device(step * axes))
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
        if self.on_step is not None:
            self.on_step(OrthoStep(vector, step, self.n_steps, distance))

    def _to_device(self, theta: Tensor) -> Tensor:
        dtype = torch.promote_types(self.f.x.dtype, torch.float32)
        return theta.to(self.f.x.device, dtype)


class _Adam:
    """The published optimiser: Adam on the distance from a copy of theta0, then projected."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem

    def find(self, k: int, basis: Tensor) -> _Result:
        problem = self.problem
        theta = problem.theta0.float().clone().requires_grad_()
        adam = torch.optim.Adam([theta], lr=0.01)
        history: list[float] = []
        finite, stopped = theta.detach().double(), _STEPS_USED_UP
        for step in range(1, problem.n_steps + 1):
            _, distance, gradient = problem.loss_and_gradient(theta.detach().double())
            if not (math.isfinite(distance) and torch.isfinite(gradient).all()):
                stopped = _NOT_FINITE
                break
            finite = theta.detach().double().clone()
            history.append(distance)
            problem.report(k, step, distance)
            theta.grad = gradient.float()
            adam.step()
            with torch.no_grad():
                theta.copy_(complement(theta.double()[None], basis)[0])
        end = complement((finite if stopped else theta.detach().double())[None], basis)[0]
        _, distance, _ = problem.loss_and_gradient(end)
        if not math.isfinite(distance):  # after the last step
            end, stopped = complement(finite[None], basis)[0], _NOT_FINITE
            _, distance, _ = problem.loss_and_gradient(end)
        return _Result(end, distance, len(history) + 1, stopped, [*history, distance])


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
        problem = self.problem
        precondition = self._preconditioner(basis)
        theta = torch.zeros_like(problem.theta0)
        loss, distance, gradient = problem.loss_and_gradient(theta)
        if not (math.isfinite(loss) and torch.isfinite(gradient).all()):
            return _Result(theta, distance, 1, _NOT_FINITE, [distance])
        gradient = complement(gradient[None], basis)[0]
        history, steps_taken, changes = [distance], [], []
        problem.report(k, 1, distance)
        stopped = _STEPS_USED_UP
        while len(history) < problem.n_steps:
            direction = -_two_loops(gradient, steps_taken, changes, distance, precondition)
            direction = complement(direction[None], basis)[0]
            slope = float(gradient @ direction)
            if not slope < 0 or _stalled(history):
                stopped = _CONVERGED
                break
            length, taken, finite = 1.0, None, True
            for _ in range(min(_MOST_TRIALS, problem.n_steps - len(history))):
                trial = complement((theta + length * direction)[None], basis)[0]
                trial_loss, trial_distance, trial_gradient = problem.loss_and_gradient(trial)
                finite = math.isfinite(trial_loss) and bool(torch.isfinite(trial_gradient).all())
                if finite and trial_loss <= loss + 1e-4 * length * slope:
                    taken = trial, trial_loss, trial_distance, trial_gradient
                length *= _backtrack(loss, slope * length, trial_loss)
                history.append(trial_distance if taken else distance)
                problem.report(k, len(history), history[-1])
                if taken:
                    break
            if taken is None:
                stopped = _CONVERGED if len(history) < problem.n_steps else _STEPS_USED_UP
                stopped = stopped if finite else _NOT_FINITE
                break
            new_gradient = complement(taken[3][None], basis)[0]
            step, change = taken[0] - theta, new_gradient - gradient
            if float(step @ change) > 1e-8 * float(step.norm() * change.norm()):
                steps_taken, changes = (
                    [*steps_taken, step][-_MEMORY:],
                    [*changes, change][-_MEMORY:],
                )
            theta, loss, distance, gradient = taken[0], taken[1], taken[2], new_gradient
        return _Result(theta, distance, len(history), stopped, history)

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


def _check_same(
    argument: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], facts: Sequence[str]
) -> None:
    for fact in facts:
        if theirs.get(fact) is not None and theirs[fact] != ours.get(fact):
            raise ValueError(
                f"{argument}: found with {fact}={theirs[fact]!r}, but here it is "
                f"{ours.get(fact)!r}; use the activation map and settings that it was found with"
            )


def _checked_previous(
    f: EffectMap,
    theta0: Tensor,
    previous: SteeringVectors | Tensor | None,
    settings: Mapping[str, Any],
) -> Tensor:
    if previous is None:
        return torch.empty(0, len(theta0), dtype=torch.float32)
    if isinstance(previous, SteeringVectors):
        _check_same("previous", previous.story, f.story(), _FAMILY_FACTS)
        if previous.story.get("method") == "melbo_ortho":
            chosen = previous.story.get("hyperparameters", {})
            _check_same("previous", chosen, settings, _FAMILY_SETTINGS)
            indices = previous.columns["index"].tolist()
            if indices != list(range(len(indices))):
                raise ValueError(
                    f"previous: holds vectors {', '.join(map(str, indices[:5]))}..., not all from "
                    "0 on in their order; join the parts with join_family"
                )
        previous = previous.vectors
    vectors = previous.detach().cpu().float()
    if vectors.shape[1] != len(theta0):
        raise ValueError(f"previous: {vectors.shape[1]} wide, but theta0 is {len(theta0)} wide")
    norms = vectors.norm(dim=-1)
    bad = (~((norms > 0) & norms.isfinite())).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"previous: vectors {bad[:10]} are zero or not finite; pass what melbo_ortho returned"
        )
    family = normalise(torch.cat([theta0[None], vectors]).double())
    cosines = (family @ family.T - torch.eye(len(family), dtype=torch.float64)).abs()
    if float(cosines.max()) > _LARGEST_COSINE:
        i, j = divmod(int(cosines.argmax()), len(family))
        names = ["theta0" if n == 0 else f"vector {n - 1}" for n in sorted((i, j))]
        raise ValueError(
            f"previous: {names[0]} and {names[1]} are not orthogonal (|cosine| "
            f"{float(cosines.max()):.1e}, allowed {_LARGEST_COSINE:.0e}); pass what melbo_ortho "
            "returned for this theta0"
        )
    return vectors


def _story_of(theta0: SteeringVectors | Tensor) -> dict[str, Any] | None:
    if not isinstance(theta0, SteeringVectors):
        return None
    return {**theta0.story, "index": int(theta0.columns["index"][0])}
