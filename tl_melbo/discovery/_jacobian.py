"""Jacobian directions: what the target layer responds to most, to first order."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tl_melbo.discovery import _map
from tl_melbo.discovery._calibration import Radius, check_radius, chosen_radius
from tl_melbo.discovery._map import EffectMap, Effects, OnShare
from tl_melbo.discovery._search import Part, Search, method
from tl_melbo.errors import warn_user
from tl_melbo.geometry import complement, random_sphere
from tl_melbo.story import measure
from tl_melbo.vectors import SteeringVectors

# Up to this width, and so many numbers of J that are held, all of J'J is formed; above, only
# products with it are taken.
_EXACT_WIDTH, _LARGEST_JACOBIAN = 2048, 2**28
# Vectors that are multiplied together, and how many products are kept at most.
_BLOCK, _LARGEST_BASIS = 16, 1024
# A direction has settled when |J'J v - s² v| is below this share of the largest s², or below
# so many times the precision of the model's type.
_SETTLED, _PRECISIONS = 1e-8, 16


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
        positions: where the effect is measured, as in `melbo`.

    Returns:
        The vectors, the largest `singular_value` first: the norm, to first order, of the effect of
        a vector of norm 1.

    Raises:
        ValueError: a radius without effect to first order.
        NotFinite: the derivative is not finite.

    Source: Ayyub 2026, "Power steering"; Mack & Turner 2024, "Deep causal transcoding".
    """
    radius, calibration = chosen_radius(f, radius, previous, positions)
    counted = f.position_mask(positions)
    effects = _map.effects_at(f, positions)

    def effect(theta: Tensor) -> Tensor:
        return effects(theta)[:, counted]

    def gram() -> Tensor:
        return _map.gram(f, effect, positions, on_share=search.show)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        # A map's own `gram` holds one prompt's J.
        held = counted.sum(-1).max() if hasattr(f, "gram") else counted.sum()
        with _map.own_arithmetic(f):
            count = first + n_vectors
            units, values = top_directions(f, effect, count, search.show, gram, int(held))
        rounded = _map.rounding(f, positions)
        _map.refuse_no_effect(float(values[0]) * radius <= rounded, "every vector")
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
    f: EffectMap,
    effect: Effects,
    count: int,
    on_share: OnShare | None = None,
    gram: Callable[[], Tensor] | None = None,
    n_positions: int = 1,
) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of the Jacobian, float64 [count, d_model], and values.

    `gram` is a quicker way to J'J, where it is formed, which holds J at so many positions.
    """
    d_model = int(f.x.shape[-1])
    if d_model <= _EXACT_WIDTH and n_positions * d_model**2 <= _LARGEST_JACOBIAN:
        products = _map.gram_of(f, effect, on_share) if gram is None else gram()
        vectors, values = _eigen(torch.eye(d_model, dtype=torch.float64), products)
    else:
        vectors, values = _iterated(f, effect, count, on_share)
    return signed(vectors[:count]), values[:count]


def signed(vectors: Tensor) -> Tensor:
    """Each vector or its opposite: the one whose largest component is positive."""
    return vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()


def _iterated(
    f: EffectMap, effect: Effects, count: int, on_share: OnShare | None
) -> tuple[Tensor, Tensor]:
    """Block Lanczos on J'J, without forming it: Rayleigh-Ritz in the span of all products so far.

    The basis is kept orthonormal throughout, so that no direction comes twice.
    """
    generator, d_model = torch.Generator().manual_seed(0), int(f.x.shape[-1])
    settled = max(_SETTLED, _PRECISIONS * torch.finfo(f.x.dtype).eps)
    most, check_at = min(d_model, max(_LARGEST_BASIS, 3 * count)), count
    basis = products = torch.empty(0, d_model, dtype=torch.float64)
    vectors, unsettled = basis, count
    while unsettled and len(basis) < most:
        noise = random_sphere(min(_BLOCK, most - len(basis)), d_model, generator=generator)
        block = _orthonormal(products[-_BLOCK:][: len(noise)], noise.double(), basis)
        images = _map.jacobian_times(f, effect, _map.theta_like(f, block))
        back = _map.transpose_times(f, effect, images).double().cpu()
        basis, products = torch.cat([basis, block]), torch.cat([products, back])
        if not back.isfinite().all():
            vectors = torch.full((count, d_model), torch.nan, dtype=torch.float64)
            break
        if on_share is not None:
            on_share(len(basis) / most)
        if len(basis) >= min(check_at, most):
            check_at = 5 * len(basis) // 4
            projected = basis @ products.T
            squares, rotation = torch.linalg.eigh((projected + projected.T) / 2)
            turn = rotation.T.flip(0)[:count]
            vectors, squares = turn @ basis, squares.flip(0)[:count]
            residuals = (turn @ products - squares[:, None] * vectors).norm(dim=-1)
            unsettled = int((residuals > settled * squares[0].abs()).sum())
    if unsettled and len(basis) == most < d_model:
        warn_user(
            f"{unsettled} of {count} directions have not settled after {most} products with the "
            "Jacobian: their singular values are nearly equal, so that other directions do as "
            "much. Ask for fewer vectors, or take those as a sample"
        )
    # Of nearly equal singular values, the images tell more digits than the squares do.
    images = _map.jacobian_times(f, effect, _map.theta_like(f, vectors)).double().cpu()
    return _eigen(vectors, images @ images.T)


def _orthonormal(block: Tensor, noise: Tensor, basis: Tensor) -> Tensor:
    """As many orthonormal vectors as there is noise, orthogonal to a basis, near the block's span.

    The noise fills what the block lacks: it is of lower rank where the map is.
    """
    scale = block.norm(dim=-1).amax() if len(block) else 0.0
    rows = noise if scale == 0 else block / scale + 1e-10 * noise
    for _ in range(2):
        rows = torch.linalg.qr(complement(rows, basis).T).Q.T
    return rows


def _eigen(vectors: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh-Ritz: the rotation of orthonormal vectors that makes J'J among them diagonal."""
    if not gram.isfinite().all():
        return torch.full_like(vectors, torch.nan), torch.full_like(vectors[:, 0], torch.nan)
    squares, rotation = torch.linalg.eigh(gram)
    return rotation.T.flip(0) @ vectors, squares.flip(0).clamp_min(0).sqrt()
