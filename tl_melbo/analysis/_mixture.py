"""Is a vector a mixture of others? Its best sum of a library's vectors, against chance."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.shapes import Float, Theta, shape_checked
from tl_melbo.steering import Reference, Vectors


@dataclass(frozen=True, eq=False)
class Mixture:
    """What `mixture` gives.

    Attributes:
        coefficients: of each vector of the library; below 0 where its negative is in the mixture.
        explained: the share of the vector's squared norm that the mixture holds, from 0 to 1.
        null: the same share for random vectors.
        p_value: the chance that a random vector is explained as well.
        rest: what is left of the vector, as a vector.
    """

    coefficients: Float[Tensor, "library"]
    explained: float
    null: Float[Tensor, "random"]
    p_value: float
    rest: Theta


@shape_checked
def mixture(
    vector: Reference,
    library: Vectors,
    *,
    both_signs: bool = True,
    n_random: int = 200,
    seed: int = 0,
) -> Mixture:
    """Write a vector as a sum of a library's vectors with coefficients that are not negative.

    The null takes random directions in place of the vector.

    Args:
        vector: exactly one, which is not in the library.
        both_signs: the negative of each vector may be taken instead.
        n_random: random vectors of the same norm.

    Raises:
        ValueError: not one vector, none in the library, a zero among them, another width or layer.
        ModuleNotFoundError: scipy is not installed.

    Source: Lawson & Hanson 1974, "Solving least squares problems" (non-negative least squares).
    """
    target = checks.one_vector(vector, "vector").double().cpu()
    rows = checks.directions(checks.as_matrix(library, "library"), "library").double().cpu()
    checks.width(rows, target.shape[1], "library", "vector")
    checks.at_least(1, n_random=n_random)
    checks.seed(seed)
    layers = [getattr(each, "source_layer", None) for each in (vector, library)]
    if None not in layers and layers[0] != layers[1]:
        raise ValueError(f"library: found at layer {layers[1]}, but vector at layer {layers[0]}")
    parts = torch.cat([rows, -rows]) if both_signs else rows
    # Coefficients of unit vectors are of one size, which the solver's tolerance is for.
    norms = parts.norm(dim=-1)
    basis = (parts / norms[:, None]).T.numpy()
    size = float(target.norm())
    found, rest = _fitted(basis, target[0].numpy() / size)
    # Not from torch: a library that `random_vectors` drew with this seed must not come back.
    units = np.random.default_rng(seed).normal(size=(n_random, target.shape[1]))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    left = [_fitted(basis, unit)[1] for unit in units]
    null = torch.tensor([1 - float(each @ each) for each in left], dtype=torch.float64)
    explained = 1 - float(rest @ rest)
    weights = torch.from_numpy(found) * size / norms
    weights = weights[: len(rows)] - weights[len(rows) :] if both_signs else weights
    p_value = (1 + int((null >= explained).sum())) / (1 + n_random)
    unexplained = torch.from_numpy(rest * size).float()[None]
    return Mixture(weights.float(), explained, null.float(), p_value, unexplained)


def _fitted(basis: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of the columns, and what they leave of the target."""
    coefficients, _ = checks.installed("scipy.optimize", "mixture").nnls(basis, target)
    return coefficients, target - basis @ coefficients
