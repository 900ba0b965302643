"""How large an effect is: what MELBO maximises."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_melbo.shapes import Delta, shape_checked

Norm = Literal["l2", "lp"]


@shape_checked
def melbo_objective(
    delta: Delta, p: float = 2, q: float | None = None, norm: Norm = "l2"
) -> Float[Tensor, "vector"]:
    """Size of each vector's effect: sum over prompts of (sum over pos of ||delta||^p)^(1/q).

    Args:
        delta: effects; positions that are not to count hold zeros.
        p: power of the norm, at least 1. Published: 2 and 4.
        q: root of each prompt's sum, at least 1; None takes p. Published: p and 1.
        norm: over d_model, "l2" (the original post) or "lp", the p-norm (a textbook chapter).
            They agree at p = 2.

    Returns:
        One number a vector, in the dtype of delta.

    Raises:
        ValueError: p or q is below 1 or not finite.

    Source: Mack & Turner 2024. Their code takes the norm of a [1, pos, d_model] tensor over
    dim=1, which is positions; that slip is not copied.
    """
    check_powers(p, q)
    q = p if q is None else q
    if norm == "l2":
        squares = delta.square().sum(-1)
        powers = squares if p == 2 else _safe_power(squares, p / 2)
    else:
        powers = _safe_power(delta.abs(), p).sum(-1)
    return _safe_power(powers.sum(-1), 1 / q).sum(-1)


def check_powers(p: float, q: float | None) -> None:
    """Refuse powers of the objective that make no norm, with a ValueError."""
    for name, value in (("p", p), ("q", p if q is None else q)):
        if not (1 <= value < math.inf):
            raise ValueError(
                f"{name}={value}: allowed are finite numbers from 1; published are p = 2 or 4, "
                "and q = p or 1"
            )


def _safe_power(base: Tensor, exponent: float) -> Tensor:
    """Base ** exponent for base >= 0, with gradient 0 instead of NaN where base is 0."""
    if exponent >= 1:
        return base**exponent
    zero = base == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, base) ** exponent)
