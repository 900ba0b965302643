"""How long should a vector be? The radius at which the map stops being linear.

Source: Mack & Turner 2024, "Deep causal transcoding".
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery._arithmetic import own_arithmetic
from tl_melbo.discovery._linear import jacobian_times
from tl_melbo.discovery._protocol import EffectMap, effects_at, theta_like, typical_norm
from tl_melbo.geometry import random_sphere
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

Radius = float | Literal["auto"]

# Published: 0.5. At 0.4, libraries held more distinct coherent behaviours on each of three prompts
# (benchmarks/RESULTS.md).
DEFAULT_LEVEL = 0.4
# Beyond these multiples of a token's typical norm no radius is looked for.
_SMALLEST, _LARGEST = 1e-4, 1e3
# Where the search begins, as such a multiple, and how exactly it ends.
_FIRST, _PRECISION = 0.1, 0.01
_MOST_DIRECTIONS = 10_000


@shape_checked
def calibrate_radius(
    f: EffectMap,
    level: float = DEFAULT_LEVEL,
    *,
    positions: slice = slice(-3, None),
    n_directions: int = 16,
    seed: int = 0,
) -> float:
    """Find the radius at which random vectors begin to do more than the first order tells.

    Takes seconds. Another seed or a few directions give a radius some 5% to 10% away.

        radius = tm.calibrate_radius(f)
        found = tm.melbo(f, radius=radius)  # the same as radius="auto"

    Args:
        f: the activation map.
        level: where to stop, of the nonlinearity: how far the effect of R v is from R times the
            Jacobian's, relative to that, over random directions v (the root of the mean square).
            Published: 0.5.
        positions: where effects are compared, as in `melbo`.
        n_directions: how many.
        seed: of the directions.

    Returns:
        R, to three digits, in the units of the residual stream.

    Raises:
        ValueError: a number out of its range; no radius, from a ten-thousandth of a token's norm
            to a thousand times it, has that level.
        FloatingPointError: the effects are not finite.

    Source: Mack & Turner 2024, "Deep causal transcoding".
    """
    checks.positive(level=level)
    checks.between(1, _MOST_DIRECTIONS, "directions", n_directions=n_directions)
    checks.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    units = random_sphere(n_directions, int(f.x.shape[-1]), generator=generator)
    with own_arithmetic(f):
        nonlinearity = _nonlinearity(f, theta_like(f, units), positions)
        radius = _crossing(nonlinearity, level, typical_norm(f))
    return float(f"{radius:.3g}")


def check_radius(radius: Radius, typical: float | None = None) -> None:
    """Refuse a radius that is no length; with a token's typical norm, for the error to name."""
    if radius != "auto" and not 0 < radius < math.inf:
        here = "" if typical is None else f" (that of a token here is {typical:.3g})"
        raise ValueError(
            f"radius={radius}: must be a positive finite number, or 'auto'; useful ones were 0.05 "
            f"to 0.4 of a token's norm at the source layer{here}; try 'auto', and read the texts"
        )


def chosen_radius(
    radius: Radius, previous: SteeringVectors | None, calibrate: Callable[[], float]
) -> tuple[float, dict[str, Any]]:
    """The radius of a search, and what its story tells of the calibration, if there is one.

    A search that is continued keeps its radius: calibrated anew, on another machine, it might come
    out a digit different.
    """
    if not isinstance(radius, str):
        return radius, {}
    facts = {"calibration": {"criterion": "nonlinearity", "level": DEFAULT_LEVEL}}
    story: Mapping[str, Any] = {} if previous is None else previous.story
    known = (story.get("hyperparameters") or {}).get("radius")
    if story.get("calibration") == facts["calibration"] and isinstance(known, int | float):
        return (known if 0 < known < math.inf else calibrate()), facts
    return calibrate(), facts


def _nonlinearity(f: EffectMap, units: Tensor, positions: slice) -> Callable[[float], float]:
    """The measure as a function of the radius; the Jacobian is taken once, at no vector at all."""
    effects = effects_at(f, positions)

    def effect(theta: Tensor) -> Tensor:
        return effects(theta).double()

    slopes = jacobian_times(f, effect, units)
    sizes = slopes.norm(dim=-1)
    if not (sizes.isfinite() & (sizes > 0)).all():
        raise FloatingPointError(
            "f: the Jacobian without a vector is zero or not finite along some direction; use "
            "other positions, or load the model in a wider type, such as dtype=torch.float32"
        )

    def nonlinearity(radius: float) -> float:
        with torch.no_grad():
            deviation = effect(units * radius).flatten(1) / radius - slopes
        return float((deviation.norm(dim=-1) / sizes).square().mean().sqrt())

    return nonlinearity


def _crossing(nonlinearity: Callable[[float], float], level: float, typical: float) -> float:
    """The smallest radius found that has the level: bracketed, then bisected."""

    def above(radius: float) -> bool:
        value = nonlinearity(radius)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"f: the nonlinearity at radius {radius:.3g} is not finite; load the model in a "
                "wider type, such as dtype=torch.float32"
            )
        return value >= level

    low = high = _FIRST * typical
    if above(high):
        while above(low := low / 2):
            high = low
            if low < _SMALLEST * typical:
                raise ValueError(_no_radius(level, "more", low))
    else:
        while not above(high := high * 2):
            low = high
            if high > _LARGEST * typical:
                raise ValueError(_no_radius(level, "less", high))
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if above(middle) else (middle, high)
    return math.sqrt(low * high)


def _no_radius(level: float, which: str, radius: float) -> str:
    return (
        f"level={level}: the nonlinearity of random vectors is still {which} at radius "
        f"{radius:.3g}; choose another level, or a radius by reading the texts"
    )
