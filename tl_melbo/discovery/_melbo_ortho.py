"""MELBO-ortho: from one steering vector, many more that do the same, all orthogonal.

Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery._ortho_optimisers import (
    NOT_FINITE,
    STOPPED,
    Adam,
    OnOrthoStep,
    Problem,
    QuasiNewton,
)
from tl_melbo.discovery._protocol import EffectMap
from tl_melbo.discovery._search import Part, Search, join, method, one_by_one
from tl_melbo.errors import DifferentSearch, place, warn_user
from tl_melbo.shapes import Theta, shape_checked
from tl_melbo.story import about_of, differences, measure_of
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


def check_ortho_settings(norm_penalty: float, steps: int | None) -> None:
    """Check what can be checked without a model, so before one is loaded.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 0 <= norm_penalty < math.inf:
        raise ValueError(f"norm_penalty={norm_penalty}: a finite number, 0 or more")
    if steps is not None and steps < 2:
        raise ValueError(f"steps={steps}: at least 2; the first gradient is taken at the start")


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
    room = _room(len(start), n_previous, n_vectors, 1 if previous is None else 0)
    check_ortho_settings(norm_penalty, n_steps)
    problem = Problem(f, start, norm_penalty, n_steps, on_step)
    search = QuasiNewton(problem) if optimiser == "quasi-newton" else Adam(problem)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        taken = torch.cat([start[None], earlier])
        last = first + (len(start) - 1 - len(earlier) if n_vectors is None else n_vectors)
        return one_by_one(taken, range(first, last), functools.partial(_next_of_family, search))

    left = f"of norm {SMALLEST_NORM} or more does what it does" if room else "is left"
    found = {"method": "melbo_ortho"}
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
        nothing=f"theta0: nothing orthogonal to it and to {n_previous} previous vectors {left}: "
        f"the space is used up, or the norm penalty ({norm_penalty}) or the steps forbid it",
        progress=progress,
        measure=measure_of(found),
        about=about_of(found),
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


def _room(d_model: int, n_previous: int, n_vectors: int | None, least: int) -> int:
    """How many more vectors the space holds, which are enough."""
    room = d_model - 1 - n_previous
    if n_vectors is not None and not least <= n_vectors <= room:
        raise ValueError(
            f"n_vectors={n_vectors}: from 1 to {room}; {d_model} dimensions hold theta0, "
            f"{n_previous} previous vectors and {room} more, or pass None for all there are"
        )
    return room


def _next_of_family(search: "QuasiNewton | Adam", k: int, basis: Tensor) -> Part | None:
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
        if stopped != NOT_FINITE:
            return None
    warn_user(
        f"vector {k}: the residual stream of {place(search.problem.f.story())} was not finite next "
        f"to zero, {_TRIES} times; the family ends here. Load the model in a wider type, or look "
        "for what breaks it"
    )
    return None


def _checked_start(f: EffectMap, theta0: SteeringVectors | Tensor) -> Vector:
    """One vector that can be reproduced."""
    checks.exactly_one(theta0, "theta0", "pick one, such as found[5]")
    theta = theta0.vectors if isinstance(theta0, SteeringVectors) else theta0.detach().cpu().float()
    checks.width(theta, int(f.x.shape[-1]), "theta0")
    start = theta.flatten()
    if not torch.isfinite(start).all() or not start.any():
        raise ValueError("theta0: zero or not finite, so there is nothing to reproduce")
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
