"""Jacobian directions: what the target layer responds to most, to first order."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from tl_melbo.discovery import _map
from tl_melbo.discovery._calibration import Radius, check_radius, chosen_radius
from tl_melbo.discovery._map import EffectMap, Effects, OnShare
from tl_melbo.discovery._search import Part, Search, method
from tl_melbo.geometry import random_sphere
from tl_melbo.story import measure
from tl_melbo.vectors import SteeringVectors

# Up to this width all of J'J is formed; above it, a block of vectors is iterated.
_EXACT_WIDTH = 2048
# Directions beyond those asked for, which let the last of these settle; the published number.
_SPARE = 5
_MOST_ITERATIONS, _SETTLED = 50, 1e-6


@functools.partial(method, check=check_radius)
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

    They are the top right singular vectors of J, the derivative at zero of the effect, flattened
    over prompts and positions. Both signs of a direction matter; its largest component is positive.

    Args:
        radius: their norm; "auto" takes `calibrate_radius`.
        positions: where the effect is measured, counted on each prompt's own tokens.
        previous: vectors 0 to k-1 of the same search, to go on from.

    Returns:
        The vectors, the largest `singular_value` first: the norm, to first order, of the effect of
        a vector of norm 1.

    Raises:
        NotFinite: the derivative is not finite.

    Source: Ayyub 2026, "Power steering"; Mack & Turner 2024, "Deep causal transcoding".
    """
    radius, calibration = chosen_radius(f, radius, previous, positions)
    counted = f.position_mask(positions)
    effects = _map.effects_at(f, positions)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        with _map.own_arithmetic(f):
            units, values = top_directions(
                f, lambda theta: effects(theta)[:, counted], first + n_vectors, search.show
            )
        vectors = (units * radius).float()
        yield Part(first, vectors[first:], {"singular_value": values.float()[first:]})

    search = Search(
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
    return search


def top_directions(
    f: EffectMap, effect: Effects, count: int, on_share: OnShare | None = None
) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of the Jacobian, float64 [count, d_model], and values."""
    d_model = int(f.x.shape[-1])
    if d_model <= _EXACT_WIDTH:
        axes = torch.eye(d_model, dtype=torch.float64)
        images = _map.jacobian_times(f, effect, _map.theta_like(f, axes), on_share).double().cpu()
        vectors, values = _principal(axes, images)
    else:
        vectors, values = _iterated(f, effect, min(count + _SPARE, d_model), on_share)
    return signed(vectors[:count]), values[:count]


def signed(vectors: Tensor) -> Tensor:
    """Each vector or its opposite: the one whose largest component is positive."""
    return vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()


def _iterated(
    f: EffectMap, effect: Effects, size: int, on_share: OnShare | None
) -> tuple[Tensor, Tensor]:
    """Block power iteration on J'J, without forming it: a product forward, and one back."""
    generator = torch.Generator().manual_seed(0)
    start = random_sphere(size, int(f.x.shape[-1]), generator=generator).double()
    vectors, values = torch.linalg.qr(start.T).Q.T, torch.zeros(size, dtype=torch.float64)
    for iteration in range(_MOST_ITERATIONS):
        if on_share is not None:
            on_share(iteration / _MOST_ITERATIONS)
        images = _map.jacobian_times(f, effect, _map.theta_like(f, vectors))
        before = values
        # Neighbours stay mixed without it.
        vectors, values = _principal(vectors, images.double().cpu())
        if not bool(((values - before).abs() > _SETTLED * values[0]).any()):
            break
        back = _map.transpose_times(f, effect, images)
        vectors = torch.linalg.qr(back.double().cpu().T).Q.T
    return vectors, values


def _principal(vectors: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh-Ritz: the rotation of orthonormal vectors whose images are orthogonal, by size."""
    if not images.isfinite().all():
        return torch.full_like(vectors, torch.nan), torch.full_like(vectors[:, 0], torch.nan)
    squares, rotation = torch.linalg.eigh(images @ images.T)
    return rotation.T.flip(0) @ vectors, squares.flip(0).clamp_min(0).sqrt()
