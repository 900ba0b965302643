"""MELBO-ortho: from one steering vector, many more with its effect, all orthogonal."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_melbo import checks, story
from tl_melbo.discovery import _descent, _map
from tl_melbo.discovery._map import EffectMap
from tl_melbo.discovery._search import Part, Search, join, method, one_by_one
from tl_melbo.errors import DifferentSearch, place, warn_user
from tl_melbo.shapes import Theta, shape_checked
from tl_melbo.vectors import SteeringVectors

OrthoOptimiser = Literal["quasi-newton", "adam"]
Vector = Float[Tensor, "d_model"]
# Not Theta: beside `previous`, an axis of the same name would have to be of the same size.
OneRow = Float[Tensor, "reference d_model"]

DEFAULT_ORTHO_STEPS = {"quasi-newton": 40, "adam": 1000}
# A family ends where its vectors have shrunk to this norm, as the published one does.
SMALLEST_NORM = 0.1
# A theta0 so many times as long as the longest residual leaves nothing of it but rounding.
_LONGEST = 1e3
# How often a vector is searched for whose search broke down at its very start.
_TRIES = 3


class OrthoStep(NamedTuple):
    """What the search for one vector reports after each gradient."""

    vector: int
    step: int
    n_steps: int
    distance: float


OnOrthoStep = Callable[[OrthoStep], None]


def check_ortho_settings(norm_penalty: float, steps: int | None) -> None:
    """Check the settings of which no model is needed."""
    checks.between(0, sys.float_info.max, "a weight", norm_penalty=norm_penalty)
    checks.at_least(2, steps=steps)  # the first gradient is taken at the start


@functools.partial(method, check=check_ortho_settings)
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
    """Find vectors with the effect of theta0, each orthogonal to it and to all before it.

    With z(theta) the mean over positions of f(x + theta), vector k minimises
    ||z(theta) - z(theta0)|| + norm_penalty ||theta||^2 in the orthogonal complement of theta0 and
    vectors 0 to k-1. With several prompts, the distance is over all their means.

    Args:
        theta0: exactly one vector, from anywhere.
        n_vectors: at most so many; None goes on until their norms fall below 0.1 or the space is
            used up (d_model - 1 vectors).
        norm_penalty: 0 as published; larger asks for shorter vectors.
        previous: the vectors that this family has already, all of them; the search goes on as if
            there had been no break.
        optimiser: "quasi-newton", L-BFGS from zero; or "adam", as published.
        steps: gradients for each vector, at most; None takes 40 or 1000.

    Returns:
        The new vectors in order, with their distance |z - z0|, how many gradients each took, and
        why its search stopped; `history[:, i]` is the distance after i + 1 gradients.

    Raises:
        ValueError: not one vector qualifies (`melbo_ortho.parts` then yields none).
        DifferentSearch: `previous` of another family, not all of it, or not orthogonal.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors". The
    quasi-Newton method and the penalty's form are of this package.
    """
    start = _checked_start(f, theta0)
    known = None
    if isinstance(previous, SteeringVectors) and previous.story.get("method") == "melbo_ortho":
        known = previous
    elif previous is not None and len(previous):  # found by another method: without its metadata
        known = SteeringVectors(_checked(f, previous, "previous"))
    check_ortho_settings(norm_penalty, steps)
    n_steps = DEFAULT_ORTHO_STEPS[optimiser] if steps is None else steps
    family = _Family(f, start.double(), norm_penalty, optimiser, n_steps, on_step)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        taken = torch.cat([start[None], earlier])
        last = first + (len(start) - len(taken) if n_vectors is None else n_vectors)
        return one_by_one(taken, range(first, last), family.find)

    n_previous = 0 if known is None else len(known)
    origin = None
    if isinstance(theta0, SteeringVectors):
        origin = {**theta0.story, "index": int(theta0.columns["index"][0])}
    chosen = {"norm_penalty": norm_penalty, "n_previous": n_previous}
    chosen |= {"optimiser": optimiser, "steps": n_steps}
    return Search(
        "melbo_ortho", f, n_vectors, chosen, find,
        previous=known,
        needs=("distance", "evaluations"),
        orthogonal_to={"theta0": start},
        nothing=f"theta0: nothing orthogonal to it and to {n_previous} previous vectors, and of "
        f"norm {SMALLEST_NORM} or more, has its effect: the space is used up, or the norm penalty "
        f"({norm_penalty}) or the steps forbid it",
        progress=progress,
        measure=story.measure_of({"method": "melbo_ortho"}),
        about=story.about_of({"method": "melbo_ortho"}),
        theta0={"norm": float(start.norm()), "story": origin},
        categories={"stopped": list(_descent.STOPPED)},
    )  # fmt: skip


iter_melbo_ortho = melbo_ortho.parts


@shape_checked
def join_family(parts: Sequence[SteeringVectors]) -> SteeringVectors:
    """Join consecutive parts of one MELBO-ortho family, as `join` does."""
    for number, part in enumerate(parts):
        if part.story.get("method") != "melbo_ortho":
            raise ValueError(f"parts[{number}]: not of melbo_ortho; join others with concatenate")
    return join(parts)


@dataclass
class _Family:
    """The loss of one family, in float64 on the CPU around f, and the search for its vectors."""

    f: EffectMap
    theta0: Tensor
    norm_penalty: float
    optimiser: OrthoOptimiser
    n_steps: int
    on_step: OnOrthoStep | None

    def __post_init__(self) -> None:
        self.effects = _map.effects_at(self.f, slice(None))
        self.evaluate = _map.value_and_gradient(self.f, self.distance, slice(None))
        with _map.own_arithmetic(self.f), torch.no_grad():
            self.target = self.mean_effect(self.theta0[None])[0]
        broken = (~self.target.isfinite().all(-1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"theta0: the residual stream of {place(self.f.story(), broken)} is not finite "
                "under it; use a shorter vector, or a model in a wider type (dtype=torch.float32)"
            )

    def mean_over_positions(self, effect: Tensor) -> Tensor:
        """z(theta) - z(0): [vector, prompt, pos, d_model] -> [vector, prompt, d_model]."""
        return effect.sum(2) / self.f.mask.sum(-1, keepdim=True)

    def mean_effect(self, theta: Tensor) -> Tensor:
        return self.mean_over_positions(self.effects(_map.theta_like(self.f, theta)))

    def distance(self, effect: Tensor) -> Tensor:
        """|z(theta) - z(theta0)|, over all prompts together."""
        return torch.stack([(z - self.target).norm() for z in self.mean_over_positions(effect)])

    def loss(self, theta: Tensor) -> _descent.Point:
        value, gradient = self.evaluate(theta[None])
        distance, penalty = float(value[0]), self.norm_penalty * float(theta @ theta)
        whole = gradient[0] + 2 * self.norm_penalty * theta
        return _descent.Point(theta, distance + penalty, distance, whole)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """Of J^T J, with J the Jacobian of z at zero; damped by the mean eigenvalue.

        Undamped, directions that z hardly feels at zero would be taken at huge norms.
        """
        gram = self.jacobian_gram()
        scale = float(gram.diagonal().mean()) or 1.0
        # The penalty's own curvature, as it stands beside the squared distance.
        shift = scale + 2 * self.norm_penalty * float(self.target.norm())
        return torch.linalg.inv(gram + shift * torch.eye(len(gram), dtype=gram.dtype))

    def jacobian_gram(self) -> Tensor:
        """J^T J at zero; zero along axes whose derivative is not finite."""
        gram = _map.gram(self.f, self.mean_effect, slice(None), mean=True)
        bad = ~gram.diagonal().isfinite()
        if bad.any():
            warn_user(
                f"the derivative of the residual stream of {place(self.f.story())} is not finite "
                f"along {int(bad.sum())} of {len(bad)} axes; the search goes on without knowing "
                "them, and may take more steps. Use a model in a wider type"
            )
            gram[bad], gram[:, bad] = 0.0, 0.0
        return gram

    def find(self, k: int, basis: Tensor) -> Part | None:
        """Vector k, or None where the family ends."""

        def note(step: int, distance: float) -> None:
            if self.on_step is not None:
                self.on_step(OrthoStep(k, step, self.n_steps, distance))

        for _ in range(_TRIES):
            if self.optimiser == "adam":
                end = _descent.adam(self.loss, self.theta0, basis, self.n_steps, note)
            else:
                end = _descent.quasi_newton(self.loss, self.inverse, basis, self.n_steps, note)
            theta, history = end.theta.float(), torch.tensor([end.history], dtype=torch.float32)
            if float(theta.norm()) >= SMALLEST_NORM:
                columns = {
                    "distance": torch.tensor([end.distance], dtype=torch.float32),
                    "evaluations": torch.tensor([history.shape[1]], dtype=torch.float32),
                    "stopped": torch.tensor([end.stopped]),
                }
                return Part(k, theta[None], columns, history)
            if end.stopped != _descent.NOT_FINITE:
                return None
        warn_user(
            f"vector {k}: the residual stream of {place(self.f.story())} was not finite next to "
            f"zero, {_TRIES} times; the family ends here. Load the model in a wider type, or look "
            "for what breaks it"
        )
        return None


def _checked(f: EffectMap, vectors: SteeringVectors | Tensor, argument: str) -> Tensor:
    """Vectors from anywhere, float32 on the CPU, that fit this model and source layer."""
    theta = checks.as_matrix(vectors, argument).cpu()
    checks.width(theta, int(f.x.shape[-1]), argument)
    if isinstance(vectors, SteeringVectors):
        ours = {name: f.story().get(name) for name in ("model", "source_layer")}
        differing = story.differences(vectors.story, ours)
        if differing:
            advice = "use the activation map that it was found with"
            raise DifferentSearch.of(argument, differing, advice)
    return theta


def _checked_start(f: EffectMap, theta0: SteeringVectors | Tensor) -> Tensor:
    """One vector that has an effect, [d_model]."""
    checks.one_vector(theta0, "theta0")
    start, longest = _checked(f, theta0, "theta0")[0], float(f.x.norm(dim=-1).max())
    if float(start.norm()) > _LONGEST * longest:
        raise ValueError(
            f"theta0: a norm of {float(start.norm()):.3g}, but that of the residual stream is at "
            f"most {longest:.3g}; use a shorter vector"
        )
    return start
