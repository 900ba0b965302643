"""Spheres, tangent spaces and orthogonal complements: tensors in, tensors out."""

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.shapes import Float, Theta, shape_checked

Basis = Float[Tensor, "rank d_model"]


@shape_checked
def normalise(theta: Theta, radius: float = 1.0) -> Theta:
    """Rescale every vector to the given L2 norm; ValueError names those that have no direction."""
    norms = theta.norm(dim=-1, keepdim=True)
    bad = ~(norms.isfinite() & (norms > 0)).squeeze(-1)
    checks.no_rows(bad, "theta", "vectors", "are zero or not finite and have no direction to keep")
    return theta * (radius / norms)


@shape_checked
def tangent(gradient: Theta, theta: Theta) -> Theta:
    """Project each gradient onto the tangent space of the sphere at the matching theta."""
    unit = normalise(theta)
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


@shape_checked
def complement(vectors: Theta, basis: Basis) -> Theta:
    """Project vectors onto the orthogonal complement of an orthonormal basis.

    Projects twice, since one pass leaves a remainder as large as its rounding: "twice is enough"
    (Kahan; Giraud et al. 2005).
    """
    for _ in range(2):
        vectors = vectors - (vectors @ basis.T) @ basis
    return vectors


def extended(basis: Tensor, vector: Tensor) -> Tensor:
    """An orthonormal basis with one more direction: what of the vector is orthogonal to it."""
    return torch.cat([basis, normalise(complement(vector.double()[None], basis))])


@shape_checked
def random_sphere(
    n_vectors: int, d_model: int, radius: float = 1.0, *, generator: torch.Generator
) -> Theta:
    """Draw vectors uniformly from the sphere, float32 on the CPU, from the generator alone."""
    return normalise(
        torch.randn(n_vectors, d_model, generator=generator, dtype=torch.float32), radius
    )


def numbered_sphere(n_vectors: int, d_model: int, seed: int) -> Tensor:
    """Unit vectors, float64: vector k depends on the seed and k, not on how many are drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_sphere(1, d_model, generator=generator) for _ in range(n_vectors)]
    return torch.cat(drawn).double() if drawn else torch.empty(0, d_model, dtype=torch.float64)
