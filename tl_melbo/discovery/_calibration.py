"""How long should a vector be? The radius at which the map stops being linear."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery import _map
from tl_melbo.discovery._map import EffectMap
from tl_melbo.errors import NotFinite
from tl_melbo.geometry import random_sphere
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

Radius = float | Literal["auto"]

# Published: 0.5. At 0.4, libraries held more distinct behaviours (benchmarks/RESULTS.md).
DEFAULT_LEVEL = 0.4
# In multiples of a token's typical norm: where the search begins, and where it gives up.
_FIRST, _SMALLEST, _LARGEST = 0.1, 1e-4, 1e3
_PRECISION = 0.01
_MOST_DIRECTIONS = 10_000
# The square of a longer one overflows in float32.
_LARGEST_NORM = 1e19


@shape_checked
def calibrate_radius(
    f: EffectMap,
    level: float = DEFAULT_LEVEL,
    *,
    positions: slice = slice(-3, None),
    n_directions: int = 16,
    seed: int = 0,
) -> float:
    """Find the radius R at which the map's response to random vectors stops being linear.

    R differs by 5% to 10% between seeds.

    Args:
        level: the nonlinearity at R: the root mean square, over random unit vectors v, of
            |effect(R v) - R J v| / |R J v|. Published: 0.5.
        positions: where effects are compared, as in `melbo`.
        n_directions: how many vectors v.

    Returns:
        R, to three digits, in the units of the residual stream.

    Raises:
        ValueError: no radius has that level.

    Source: Mack & Turner 2024, "Deep causal transcoding".
    """
    checks.positive(level=level)
    checks.between(1, _MOST_DIRECTIONS, "directions", n_directions=n_directions)
    checks.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    units = random_sphere(n_directions, int(f.x.shape[-1]), generator=generator)
    typical = float(f.x.float().norm(dim=-1)[f.mask].median())
    with _map.own_arithmetic(f):
        nonlinearity = _nonlinearity(f, _map.theta_like(f, units), positions)
        return float(f"{_crossing(nonlinearity, level, typical):.3g}")


def check_radius(radius: Radius) -> None:
    """Make sure that a radius is a norm that float32 holds, or "auto"."""
    if radius != "auto" and not 0 < radius <= _LARGEST_NORM:
        raise ValueError(
            f"radius={radius}: must be a positive norm up to {_LARGEST_NORM:g}, or 'auto'; try "
            "'auto', and read the texts"
        )


def chosen_radius(
    f: EffectMap,
    radius: Radius,
    previous: SteeringVectors | None,
    positions: slice = slice(-3, None),
) -> tuple[float, dict[str, Any]]:
    """The radius of a search, and what its metadata tells of the calibration, if there is one."""
    check_radius(radius)
    f.position_mask(positions)  # refuses what some prompt does not have
    if not isinstance(radius, str):
        return radius, {}
    calibration = {"criterion": "nonlinearity", "level": DEFAULT_LEVEL}
    # A search that is continued keeps its radius: another machine may find another last digit.
    if previous is not None and previous.story.get("calibration") == calibration:
        known = (previous.story.get("hyperparameters") or {}).get("radius")
        if isinstance(known, int | float) and 0 < known <= _LARGEST_NORM:
            return known, {"calibration": calibration}
    return calibrate_radius(f, positions=positions), {"calibration": calibration}


def _nonlinearity(f: EffectMap, units: Tensor, positions: slice) -> Callable[[float], float]:
    """The nonlinearity as a function of the radius; the Jacobian is taken once."""
    effects = _map.effects_at(f, positions)

    def effect(theta: Tensor) -> Tensor:
        return effects(theta).double()

    slopes = _map.jacobian_times(f, effect, units)

    def nonlinearity(radius: float) -> float:
        with torch.no_grad():
            deviation = effect(units * radius).flatten(1) / radius - slopes
        value = float((deviation.norm(dim=-1) / slopes.norm(dim=-1)).square().mean().sqrt())
        if not math.isfinite(value):
            raise NotFinite(
                f"f: at radius {radius:.3g}, an effect is not finite, or none to first order; use "
                "other positions, or load the model in a wider type, such as dtype=torch.float32"
            )
        return value

    return nonlinearity


def _crossing(nonlinearity: Callable[[float], float], level: float, typical: float) -> float:
    """A radius at which the nonlinearity passes the level: bracketed, then bisected."""
    radius = _FIRST * typical
    is_above = nonlinearity(radius) >= level
    factor = 0.5 if is_above else 2.0
    while (nonlinearity(radius * factor) >= level) == is_above:
        radius *= factor
        if not _SMALLEST * typical <= radius <= _LARGEST * typical:
            raise ValueError(
                f"level={level}: the nonlinearity of random vectors is still "
                f"{'more' if is_above else 'less'} at radius {radius:.3g}; choose another level, "
                "or a radius by reading the completions"
            )
    low, high = sorted((radius, radius * factor))
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if nonlinearity(middle) >= level else (middle, high)
    return math.sqrt(low * high)
