"""Contrastive vectors: the direction from prompts without a behaviour to prompts with it.

Source: Rimsky et al. 2023, "Steering Llama 2 via contrastive activation addition"; Turner et al.
2023, "Activation addition".
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery._calibration import Radius, check_radius, chosen_radius
from tl_melbo.discovery._map import EffectMap
from tl_melbo.discovery._search import Part, Search, method
from tl_melbo.errors import warn_user
from tl_melbo.story import measure
from tl_melbo.vectors import SteeringVectors

Estimator = Literal["mean", "principal"]

# Below this mean cosine of the pairs' differences, a warning. A choice of ours, not measured.
_LOW_AGREEMENT = 0.1
# Below this cosine with the mean, a component has no sign, nor a norm, that the mean gives it.
_NO_SHARE = 0.01
# A difference this much smaller than the residuals themselves is rounding.
_ROUNDING = 1e-6


def check_settings(n_vectors: int, radius: Radius | None) -> None:
    """Check the settings of which no model is needed."""
    checks.between(0, 1, "there is one vector", n_vectors=n_vectors)
    if radius is not None:
        check_radius(radius)


@functools.partial(method, check=check_settings)
def contrastive(
    f: EffectMap,
    other: EffectMap,
    estimator: Estimator = "mean",
    radius: Radius | None = None,
    positions: slice = slice(-1, None),
    *,
    n_vectors: int = 1,
    previous: SteeringVectors | None = None,
    progress: bool = False,
) -> Search:
    """Find the direction in which prompts with a behaviour differ from prompts without it.

        other = tm.ActivationMap.from_prompts(model, prompts_without)
        theta = tm.contrastive(f, other)

    Args:
        f: the map of the prompts with the behaviour.
        other: the map of those without it. Prompt i of both is a pair, where there are as many.
        estimator: "mean", the difference of the means; or "principal", the first principal
            component of the pairs' differences, uncentred, with the sign of the mean.
        radius: the vector's norm; "auto" takes `calibrate_radius` of f at `positions`; None keeps
            the measured difference's, along the direction.
        positions: whose residuals count: the mean over these tokens of each prompt.

    Returns:
        One vector. The column `distance` is the norm of the mean difference along it; the story's
        `pair_cosine` is the mean cosine between the pairs' differences, or None without pairs.

    Raises:
        ValueError: maps of different models, layers, types, or prompt formats (`chat`); no
            difference between the two; pairs needed and not there; without a radius, a principal
            component that the mean has no share of.

    Warns:
        UserWarning: the pairs' differences hardly agree (a mean cosine below 0.1), so the vector
            may not steer; with a radius, a principal component whose sign the mean does not tell.
    """
    check_settings(n_vectors, radius)
    _check_alike(f, other)
    ones, others = _means(f, positions), _means(other, positions)
    paired = len(ones) == len(others)
    if estimator == "principal" and not paired:
        raise ValueError(
            f"other: {len(others)} prompts, but f has {len(ones)}; estimator='principal' needs "
            "pairs: pass as many, in the same order, or take estimator='mean'"
        )
    mean = ones.mean(0) - others.mean(0)
    if not mean.norm() > _ROUNDING * torch.cat([ones, others]).norm(dim=-1).max():
        raise ValueError(
            "other: no difference from f between the means of the two sets at these positions; "
            "pass other prompts, or other positions"
        )
    agreement = _pair_cosine(ones - others) if paired else None
    if agreement is not None and agreement < _LOW_AGREEMENT:
        warn_user(
            f"the mean cosine between the pairs' differences is {agreement:.2f}: they hardly "
            "agree on a direction, and the vector may not steer; pass pairs that differ in the "
            "behaviour alone"
        )
    unit = mean / mean.norm() if estimator == "mean" else _principal(ones - others, mean)
    distance = mean @ unit
    _check_share(float(distance / mean.norm()), radius)
    calibration = {}
    if radius is not None:
        radius, calibration = chosen_radius(f, radius, previous, positions)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        vector = unit * (distance if radius is None else radius)
        yield Part(first, vector.float()[None], {"distance": distance.float()[None]})

    return Search(
        "contrastive",
        f,
        n_vectors,
        {"estimator": estimator, "radius": radius, "positions": positions},
        find,
        previous=previous,
        needs=("distance",),
        progress=progress,
        other=other.story().get("prompts"),
        pair_cosine=agreement,
        measure=measure("distance", "distance of the means", "residual-stream units"),
        about="The vector points from prompts without a behaviour to prompts with it: it is made "
        "from labels, unlike those of unsupervised methods.",
        **calibration,
    )


def _check_alike(f: EffectMap, other: EffectMap) -> None:
    ours, theirs = f.story(), other.story()
    for fact in ("model", "dtype", "weights", "d_model", "source_layer", "chat"):
        if ours.get(fact) != theirs.get(fact):
            raise ValueError(
                f"other: its {fact} is {theirs.get(fact)}, but that of f is {ours.get(fact)}; make "
                f"both maps with {fact}={ours.get(fact)}"
            )


def _check_share(cosine: float, radius: Radius | None) -> None:
    """The mean must tell the direction's sign, and its norm where no radius does."""
    if cosine >= _NO_SHARE:
        return
    found = (
        f"estimator='principal': the component's cosine with the difference of the means is "
        f"{cosine:.1g}"
    )
    if radius is None:
        raise ValueError(
            f"{found}, so that difference gives it no norm; pass a radius, or estimator='mean'"
        )
    warn_user(f"{found}, so its sign is arbitrary; try both signs, or take estimator='mean'")


def _means(f: EffectMap, positions: slice) -> Tensor:
    """The mean residual of each prompt at the positions, float64 [prompt, d_model]."""
    counted = f.position_mask(positions)[:, :, None]
    kept = torch.where(counted, f.x, 0).double()
    return (kept.sum(1) / counted.sum(1)).cpu()


def _pair_cosine(differences: Tensor) -> float | None:
    """The mean cosine between all pairs of differences."""
    norms = differences.norm(dim=-1, keepdim=True)
    units = (differences / norms)[norms[:, 0] > 0]
    count = len(units)
    if count < 2:
        return None
    cosine = float((units.sum(0).square().sum() - count) / (count * (count - 1)))
    return cosine if math.isfinite(cosine) else None


def _principal(differences: Tensor, mean: Tensor) -> Tensor:
    """The first right singular vector, not centred: centring takes the mean away."""
    first = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return first if first @ mean >= 0 else -first
