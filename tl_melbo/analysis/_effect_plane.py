"""A library's effects as points of a plane, near each other where the effects are alike."""

from typing import NamedTuple

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.analysis._similarity import cosine_similarity
from tl_melbo.geometry import normalise
from tl_melbo.shapes import Delta, Float, shape_checked


class EffectPlane(NamedTuple):
    """`places` of the effects, and the `shares` of their variance that the two axes hold."""

    places: Float[Tensor, "vector 2"]
    shares: tuple[float, float]


@shape_checked
def effect_plane(effects: Delta) -> EffectPlane:
    """The first two principal components of effects at norm 1.

    Raises:
        ValueError: fewer than two effects, or one that is zero or not finite.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    checks.at_least(2, effects=len(effects))
    decomposition = checks.installed("sklearn.decomposition", "effect_plane")
    rows = checks.directions(effects.detach().cpu().flatten(1), "effects")
    # Effects are zero where they were not measured.
    units = normalise(rows[:, rows.any(0)].double()).numpy()
    pca = decomposition.PCA(n_components=2, svd_solver="full").fit(units)
    shares = [0.0 if share != share else float(share) for share in pca.explained_variance_ratio_]
    return EffectPlane(torch.from_numpy(pca.transform(units)).float(), (shares[0], shares[1]))


@shape_checked
def largest_cosine(vectors: Float[Tensor, "vector _"]) -> float:
    """The largest |cosine| of two different vectors; 0 for a single one."""
    return float(cosine_similarity(vectors).fill_diagonal_(0.0).abs().max())
