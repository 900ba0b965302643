"""Jacobian directions: what the target layer responds to most, to first order.

Source: O. Ayyub 2026, "Power steering"; the linear case of Mack & Turner 2024, "Deep causal
transcoding".
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tl_melbo.discovery._arithmetic import own_arithmetic
from tl_melbo.discovery._calibration import Radius, calibrate_radius, check_radius, chosen_radius
from tl_melbo.discovery._linear import jacobian_times, transpose_times
from tl_melbo.discovery._protocol import EffectMap, effects_at, theta_like, typical_norm
from tl_melbo.discovery._search import Part, Search, check_count, method
from tl_melbo.geometry import random_sphere
from tl_melbo.story import measure
from tl_melbo.vectors import SteeringVectors

# Up to this width all of J'J is formed; above it, a block of vectors is iterated.
_EXACT_WIDTH = 2048
# Directions beyond those asked for, which let the last of these settle; the published number.
_SPARE = 5
_MOST_ITERATIONS, _SETTLED = 50, 1e-6


@method
def jacobian(
    f: EffectMap,
    n_vectors: int = 32,
    radius: Radius = "auto",
    positions: slice = slice(-3, None),
    *,
    previous: SteeringVectors | None = None,
    progress: bool = False,
) -> Search:
    """Find the orthogonal directions to which the target layer responds most, to first order.

    They are the top right singular vectors of J, the derivative of the effect where no vector is
    added; the effects at all positions that count, on all prompts, are one long output. MELBO at a
    small radius finds the first of them. Both signs of every direction matter.

    Args:
        f: the activation map.
        n_vectors: how many; at most d_model.
        radius: their L2 norm, in the units of the residual stream; "auto" takes
            `calibrate_radius`.
        positions: where the effect is measured, counted on each prompt's own tokens.
        previous: vectors 0 to k-1 of the same search, all of them; the new ones go on from there.
        progress: show a progress bar.

    Returns:
        The vectors, the largest singular value first. The column `singular_value` is the norm of
        the effect, to first order, of a vector of norm 1. The largest component is positive.

    Raises:
        ValueError: a number out of its range, more vectors than d_model, positions that some
            prompt does not have.
        DifferentSearch: `previous` is not the beginning of this search.
        NotFinite: the derivative is not finite.

    Source: O. Ayyub 2026, "Power steering"; Mack & Turner 2024, "Deep causal transcoding".
    """
    check_radius(radius, typical_norm(f))
    check_count(n_vectors, f, previous)
    counted = f.position_mask(positions)
    radius, calibration = chosen_radius(
        radius, previous, lambda: calibrate_radius(f, positions=positions)
    )

    effects = effects_at(f, positions)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        with own_arithmetic(f):
            directions, values = top_directions(
                f, lambda theta: effects(theta)[:, counted], first + n_vectors
            )
        vectors, values = (directions * radius).float()[first:], values.float()[first:]
        yield Part(first, vectors, {"singular_value": values})

    return Search(
        "jacobian",
        f,
        n_vectors,
        {"radius": radius, "positions": positions},
        find,
        previous=previous,
        needs=("singular_value",),
        orthogonal_to={},
        progress=progress,
        measure=measure("singular_value", "singular value", "effect for a vector of norm 1"),
        about="Each vector is a direction to which the target layer responds most, to first order "
        "(top singular vectors of the Jacobian).",
        **calibration,
    )


def top_directions(
    f: EffectMap, effect: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of the Jacobian, float64 [count, d_model], and values."""
    d_model = int(f.x.shape[-1])
    if d_model <= _EXACT_WIDTH:
        axes = torch.eye(d_model, dtype=torch.float64)
        images = jacobian_times(f, effect, theta_like(f, axes)).double().cpu()
        vectors, values = _principal(axes, images)
    else:
        vectors, values = _iterated(f, effect, min(count + _SPARE, d_model))
    vectors, values = vectors[:count], values[:count]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign(), values


def _iterated(f: EffectMap, effect: Callable[[Tensor], Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Block power iteration on J'J, without forming it: a product forward, and one back."""
    generator = torch.Generator().manual_seed(0)
    start = random_sphere(size, int(f.x.shape[-1]), generator=generator).double()
    vectors, values = torch.linalg.qr(start.T).Q.T, torch.zeros(size, dtype=torch.float64)
    for _ in range(_MOST_ITERATIONS):
        images = jacobian_times(f, effect, theta_like(f, vectors))
        before = values
        # Neighbours stay mixed without it.
        vectors, values = _principal(vectors, images.double().cpu())
        if not bool(((values - before).abs() > _SETTLED * values[0]).any()):
            break
        back = transpose_times(f, effect, images)
        vectors = torch.linalg.qr(back.double().cpu().T).Q.T
    return vectors, values


def _principal(vectors: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh-Ritz: the rotation of orthonormal vectors whose images are orthogonal, by size."""
    if not images.isfinite().all():
        return torch.full_like(vectors, torch.nan), torch.full_like(vectors[:, 0], torch.nan)
    squares, rotation = torch.linalg.eigh(images @ images.T)
    return rotation.T.flip(0) @ vectors, squares.flip(0).clamp_min(0).sqrt()
