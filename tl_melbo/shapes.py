"""Tensor shapes as types, and what checks them at public boundaries.

Axis names are TransformerLens's (``batch pos d_model d_vocab``) plus ``vector`` and ``prompt``.
"""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

Theta = Float[Tensor, "vector d_model"]
Residual = Float[Tensor, "prompt pos d_model"]
Delta = Float[Tensor, "vector prompt pos d_model"]
PositionMask = Bool[Tensor, "prompt pos"]
Tokens = Int[Tensor, "1 pos"]

Function = TypeVar("Function", bound=Callable[..., Any])

# With the numeric tower an int is accepted where a float is declared: radius=12 is not a mistake.
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shape_checked(function: Function) -> Function:
    """Check the types and shapes of a function's arguments and result at every call.

    Raises:
        jaxtyping.TypeCheckError: (a TypeError) naming the argument, what came and what is allowed.
    """
    return jaxtyped(typechecker=_typechecker)(function)


def checked_slice(positions: slice) -> slice:
    """The slice with plain integers.

    Raises:
        ValueError: its parts are not integers, or its step is zero.
    """
    try:
        parts = [
            None if part is None else operator.index(part)
            for part in (positions.start, positions.stop, positions.step)
        ]
    except TypeError as error:
        raise ValueError(f"positions={positions}: expected a slice of integers") from error
    if parts[2] == 0:
        raise ValueError(f"positions={positions}: a slice's step cannot be 0")
    return slice(*parts)
