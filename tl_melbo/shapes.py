"""Tensor shapes as types, checked at public boundaries.

Axis names are TransformerLens's (``batch pos d_model d_vocab``) plus ``vector`` and ``prompt``.
"""

import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import numpy as np
import torch
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from jaxtyping import Bool, Float, Int, TypeCheckError, jaxtyped
from torch import Tensor

from tl_melbo.text import did_you_mean

Theta = Float[Tensor, "vector d_model"]
Residual = Float[Tensor, "prompt pos d_model"]
Delta = Float[Tensor, "vector prompt pos d_model"]
PositionMask = Bool[Tensor, "prompt pos"]
Tokens = Int[Tensor, "1 pos"]

# What Python passes itself.
_OWN = ("self", "cls")

Function = TypeVar("Function", bound=Callable[..., Any])

# With the numeric tower an int is accepted where a float is declared: radius=12 is not a mistake.
_CONFIGURATION = BeartypeConf(is_pep484_tower=True)


def shape_checked(function: Function) -> Function:
    """Check the types and shapes of a function's arguments and result at every call.

    A TypeError is one line that names the argument, what came and what is allowed.
    """
    checked = jaxtyped(typechecker=beartype(conf=_CONFIGURATION))(function)
    signature = inspect.signature(function)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}

    def name(args: tuple[Any, ...]) -> str:
        """A method goes by the class that it was called on, and by its names there."""
        if not args or next(iter(kinds), "") not in _OWN:
            return function.__qualname__
        own = args[0] if isinstance(args[0], type) else type(args[0])
        known = [each for each in dir(own) if inspect.getattr_static(own, each, None) is call]
        return f"{own.__qualname__}.{' or '.join(known) or function.__name__}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            near = did_you_mean(unknown[1], kinds) if unknown else ""
            hint = near or f"allowed are {', '.join(n for n in kinds if n not in _OWN)}"
            raise TypeError(f"{name(args)}(): {error}; {hint}") from None
        for argument, value in given.items():
            mistake = _mistake(argument, value, kinds[argument])
            if mistake:
                raise TypeError(f"{name(args)}(): {mistake}")
        try:
            return checked(*args, **kwargs)
        except TypeCheckError as error:
            # jaxtyping's own message prints every argument, whole models included.
            told = _explained(str(error), given, kinds)
            raise TypeError(f"{name(args)}(): {told}") from None

    return cast(Function, call)


def _mistake(argument: str, value: Any, kind: Any) -> str | None:
    """What is wrong with a value that beartype lets through, which looks at one item of many."""
    if isinstance(value, bool) and _is_number(kind):
        return f"{argument}={value}: expected a number"
    if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_meta):
        return f"{argument}: a sparse tensor, or one without numbers; pass {argument}.to_dense()"
    allowed = _items(kind)
    for place, item in enumerate(value if isinstance(value, list | tuple) else ()):
        if allowed and not any(_is_one(item, each) for each in allowed):
            names = " or ".join(map(_named, allowed))
            return f"{argument}[{place}] is {_described(item)}, expected {names}"
    return None


def _is_one(item: Any, kind: Any) -> bool:
    mistaken = isinstance(item, bool) and _is_number(kind)
    return not mistaken and is_bearable(item, kind, conf=_CONFIGURATION)


@functools.cache
def _is_number(kind: Any) -> bool:
    """Whether numbers are allowed, and True is a mistake, although Python takes it for 1."""
    members = get_args(kind) or (kind,)
    return bool not in members and (int in members or float in members)


@functools.cache
def _items(kind: Any) -> tuple[Any, ...]:
    """What a sequence may hold, by each of the kinds of sequence that an argument may be."""
    members = (kind, *get_args(kind))
    return tuple(get_args(each)[0] for each in members if get_origin(each) is Sequence)


def _explained(message: str, given: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    culprit = re.search(r"typechecking parameter '(\w+)'", message)
    if culprit is None:
        return "the result has the wrong type or shape"
    argument = culprit[1]
    value, allowed = given[argument], _named(kinds[argument])
    if allowed.endswith("Map"):
        what = "a model" if hasattr(value, "cfg") else _described(value)
        return (
            f"argument {argument!r} is {what}, expected an activation map; make one: "
            "tm.ActivationMap.from_prompts(model, prompt)"
        )
    told = f"argument {argument!r} is {_described(value)}, expected {allowed:.300}"
    members = (kinds[argument], *get_args(kinds[argument]))
    words = [word for each in members if get_origin(each) is Literal for word in get_args(each)]
    hint = did_you_mean(value, words) if isinstance(value, str) else ""
    if isinstance(value, np.ndarray):
        hint = f"pass torch.from_numpy({argument})"
    return f"{told}; {hint}" if hint else told


def _named(kind: Any) -> str:
    """A type without the modules that it comes from, and a literal as its words."""
    if kind is torch.dtype:
        return "a torch dtype, such as torch.float32"
    named = re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(kind))
    return re.sub(r"\bLiteral\[(.*?)\]", r"\1", named)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    kind = type(value)
    plain = isinstance(value, str | int | float | slice | list | tuple | dict | None)
    return f"{value!r:.80} ({kind.__name__})" if plain else f"of type {_named(kind)}"


def checked_slice(positions: slice) -> slice:
    """The slice with plain integers; a ValueError where it has other parts, or a step of 0."""
    parts = (positions.start, positions.stop, positions.step)
    try:
        start, stop, step = (None if part is None else operator.index(part) for part in parts)
    except TypeError as error:
        raise ValueError(f"positions={positions}: expected a slice of integers") from error
    if step == 0:
        raise ValueError(f"positions={positions}: a slice's step cannot be 0")
    return slice(start, stop, step)
