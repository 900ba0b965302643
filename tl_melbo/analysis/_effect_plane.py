"""A library's effects as points of a plane, near each other where the effects are alike."""

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.analysis._similarity import cosine_similarity
from tl_melbo.geometry import normalise
from tl_melbo.shapes import Delta, Float, shape_checked


@shape_checked
def effect_plane(effects: Delta) -> tuple[Float[Tensor, "vector 2"], tuple[float, float]]:
    """The first two principal components of effects at norm 1, and their shares of the variance.

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
    return torch.from_numpy(pca.transform(units)).float(), (shares[0], shares[1])


@shape_checked
def largest_cosine(vectors: Float[Tensor, "vector _"]) -> float:
    """The largest |cosine| of two different vectors; 0 for a single one."""
    return float(cosine_similarity(vectors).fill_diagonal_(0.0).abs().max())
