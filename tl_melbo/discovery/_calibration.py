"""How long should a vector be? The radius at which the map stops being linear, or starts to tell.

Source: Mack & Turner 2024, "Deep causal transcoding", for the criterion of nonlinearity.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tl_melbo.discovery._protocol import DivergenceMap, EffectMap, effect_at, own_arithmetic
from tl_melbo.geometry import random_sphere
from tl_melbo.shapes import Theta, shape_checked

Criterion = Literal["nonlinearity", "divergence"]

DEFAULT_CRITERION: Criterion = "nonlinearity"
# Published for nonlinearity: 0.5. At 0.4, libraries held more distinct coherent behaviours on each
# of three prompts, and at least as many as at 0.05 nats (benchmarks/RESULTS.md).
DEFAULT_LEVELS: dict[Criterion, float] = {"nonlinearity": 0.4, "divergence": 0.05}
# Beyond these multiples of a token's typical norm no radius is looked for.
_SMALLEST, _LARGEST = 1e-4, 1e3
# Where the search begins, as such a multiple, and how exactly it ends.
_FIRST, _PRECISION = 0.1, 0.01
_MOST_DIRECTIONS = 10_000


@shape_checked
def calibrate_radius(
    f: EffectMap,
    criterion: Criterion = DEFAULT_CRITERION,
    level: float | None = None,
    *,
    positions: slice = slice(-3, None),
    n_directions: int = 16,
    seed: int = 0,
) -> float:
    """Find the radius at which random vectors begin to do more than the first order tells.

    Seconds for "nonlinearity"; "divergence" runs the whole model and takes several times as long.
    Another seed or a few directions give a radius some 5% to 10% away.

        radius = tm.calibrate_radius(f)
        found = tm.melbo(f, radius=radius)  # the same as radius="auto"

    Args:
        f: the activation map.
        criterion: what to look at, over random directions v. "nonlinearity": how far the effect of
            R v is from R times the Jacobian's, relative to that: the root of the mean square over
            the directions. "divergence": KL(P_vector || P_unsteered) of the next token, in nats:
            the median over directions and prompts.
        level: where to stop; None takes 0.4 of nonlinearity, or 0.05 nats. Published: 0.5.
        positions: where effects are compared, as in `melbo`.
        n_directions: how many.
        seed: of the directions.

    Returns:
        R, to three digits, in the units of the residual stream.

    Raises:
        ValueError: a number out of its range; no radius, from a ten-thousandth of a token's norm
            to a thousand times it, has that level.
        TypeError: the criterion "divergence" of a map that knows no next token.
        FloatingPointError: the effects are not finite.

    Source: Mack & Turner 2024, "Deep causal transcoding".
    """
    level = DEFAULT_LEVELS[criterion] if level is None else level
    if not 0 < level < math.inf:
        raise ValueError(f"level={level}: a positive finite number")
    if not 1 <= n_directions <= _MOST_DIRECTIONS:
        raise ValueError(f"n_directions={n_directions}: from 1 to {_MOST_DIRECTIONS:,}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: from 0 to 2**63 - 1")
    d_model = int(f.x.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    units = random_sphere(n_directions, d_model, generator=generator)
    units = units.to(f.x.device, torch.promote_types(f.x.dtype, torch.float32))
    with own_arithmetic(f):
        measure = (
            _nonlinearity(f, units, positions)
            if criterion == "nonlinearity"
            else _divergence(f, units)
        )
        typical = float(f.x.float().norm(dim=-1)[f.mask].median())
        radius = _crossing(measure, level, typical, criterion)
    return float(f"{radius:.3g}")


def _nonlinearity(f: EffectMap, units: Theta, positions: slice) -> Callable[[float], float]:
    """The measure as a function of the radius; the Jacobian is taken once, at no vector at all."""

    def effect(theta: Tensor) -> Tensor:
        return effect_at(f, theta, positions).double()

    def slope(direction: Tensor) -> Tensor:
        # Not torch.func.jvp, in which a model's own modules cannot be frozen.
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.zeros_like(direction), direction)
            tangent = forward_ad.unpack_dual(effect(dual)).tangent
        return torch.zeros_like(effect(direction)) if tangent is None else tangent

    slopes = torch.cat([slope(some) for some in units.split(f.vectors_at_once())]).flatten(1)
    sizes = slopes.norm(dim=-1)
    if not (sizes.isfinite() & (sizes > 0)).all():
        raise FloatingPointError(
            "f: the Jacobian without a vector is zero or not finite along some direction; use "
            "other positions, or load the model in a wider type, such as dtype=torch.float32"
        )

    def measure(radius: float) -> float:
        with torch.no_grad():
            deviation = effect(units * radius).flatten(1) / radius - slopes
        return float((deviation.norm(dim=-1) / sizes).square().mean().sqrt())

    return measure


def _divergence(f: EffectMap, units: Theta) -> Callable[[float], float]:
    if not isinstance(f, DivergenceMap):
        raise TypeError(
            "f: knows no next token, so criterion='divergence' cannot be used; make it with "
            "ActivationMap.from_prompts, or use criterion='nonlinearity'"
        )
    return lambda radius: float(f.divergence(units * radius).double().median())


def _crossing(
    measure: Callable[[float], float], level: float, typical: float, criterion: Criterion
) -> float:
    """The smallest radius found at which the measure is the level: bracketed, then bisected."""

    def above(radius: float) -> bool:
        value = measure(radius)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"f: the {criterion} at radius {radius:.3g} is not finite; load the model in a "
                "wider type, such as dtype=torch.float32"
            )
        return value >= level

    low = high = _FIRST * typical
    if above(high):
        while above(low := low / 2):
            high = low
            if low < _SMALLEST * typical:
                raise ValueError(_no_radius(criterion, level, "more", low))
    else:
        while not above(high := high * 2):
            low = high
            if high > _LARGEST * typical:
                raise ValueError(_no_radius(criterion, level, "less", high))
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if above(middle) else (middle, high)
    return math.sqrt(low * high)


def _no_radius(criterion: Criterion, level: float, which: str, radius: float) -> str:
    return (
        f"level={level}: the {criterion} of random vectors is still {which} at radius "
        f"{radius:.3g}; choose another level, or a radius by reading the texts"
    )
