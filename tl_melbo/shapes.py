"""Tensor shapes as types, and the decorator that checks them at public boundaries.

Axis names are TransformerLens's (``batch pos d_model d_vocab``) plus ``vector`` and ``prompt``.
"""

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
