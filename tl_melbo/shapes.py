"""Tensor shapes as types, and what checks them at public boundaries.

Axis names are TransformerLens's (``batch pos d_model d_vocab``) plus ``vector`` and ``prompt``.
"""

import difflib
import functools
import inspect
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin

import torch
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from jaxtyping import Bool, Float, Int, TypeCheckError, jaxtyped
from torch import Tensor

Theta = Float[Tensor, "vector d_model"]
Residual = Float[Tensor, "prompt pos d_model"]
Delta = Float[Tensor, "vector prompt pos d_model"]
PositionMask = Bool[Tensor, "prompt pos"]
Tokens = Int[Tensor, "1 pos"]

Function = TypeVar("Function", bound=Callable[..., Any])

# With the numeric tower an int is accepted where a float is declared: radius=12 is not a mistake.
_CONFIGURATION = BeartypeConf(is_pep484_tower=True)
_typechecker = beartype(conf=_CONFIGURATION)


def shape_checked(function: Function) -> Function:
    """Check the types and shapes of a function's arguments and result at every call.

    Raises:
        TypeError: naming the argument, what came and what is allowed, in one line.
    """
    checked = jaxtyped(typechecker=_typechecker)(function)
    signature = inspect.signature(function)
    name = function.__qualname__
    numbers = [p.name for p in signature.parameters.values() if _is_number(p.annotation)]
    items = {p.name: _item_types(p.annotation) for p in signature.parameters.values()}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{name}(): {error}{_hint(str(error), signature)}") from None
        for argument in numbers:
            # To Python True is the number 1; to whoever wrote it, it is a mistake.
            if isinstance(given.get(argument), bool):
                raise TypeError(f"{name}(): {argument}={given[argument]}: expected a number")
        for argument, value in given.items():
            if isinstance(value, Tensor):
                _check_dense(name, argument, value)
            _check_items(name, argument, value, items[argument])
        try:
            return checked(*args, **kwargs)
        except TypeCheckError as error:
            # jaxtyping's own message prints every argument, whole models included.
            raise TypeError(_explain(name, str(error), given)) from None

    return cast(Function, call)


def _hint(message: str, signature: inspect.Signature) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    near = difflib.get_close_matches(unknown[1], signature.parameters, 1) if unknown else []
    return (
        f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(signature.parameters)}"
    )


def _is_number(annotation: Any) -> bool:
    """Whether a parameter takes numbers, and neither True nor False."""
    kinds = get_args(annotation) or (annotation,)
    return bool({int, float} & set(kinds)) and bool not in kinds


def _item_types(annotation: Any) -> tuple[Any, ...]:
    """What a sequence may hold, by each of the kinds of sequence that a parameter may be."""
    kinds = (annotation, *get_args(annotation))
    return tuple(get_args(kind)[0] for kind in kinds if get_origin(kind) is Sequence)


def _check_items(name: str, argument: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Look at every item; beartype looks at one, taken at random."""
    if not allowed or not isinstance(value, list | tuple):
        return
    for position, item in enumerate(value):
        mistaken = isinstance(item, bool) and not {bool, object} & set(allowed)
        if mistaken or not any(is_bearable(item, kind, conf=_CONFIGURATION) for kind in allowed):
            kinds = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
            raise TypeError(
                f"{name}(): {argument}[{position}] is {_describe(item)}, expected {kinds}; see "
                f"help({name})"
            )


def _check_dense(name: str, argument: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        raise TypeError(f"{name}(): {argument} is a sparse tensor; pass {argument}.to_dense()")
    if value.is_meta:
        raise TypeError(f"{name}(): {argument} is a tensor on the meta device, without numbers")


def _explain(name: str, message: str, given: dict[str, Any]) -> str:
    culprit = re.search(r"typechecking parameter '(\w+)'", message)
    typed = re.search(r"Expected type: (.*?)\.?$", message, re.MULTILINE)
    allowed = typed[1].removeprefix("<class '").removesuffix("'>") if typed else "another"
    allowed = re.sub(r"\b(?:typing|collections\.abc|tl_melbo(?:\.\w+)*)\.", "", allowed)
    if culprit is None or culprit[1] not in given:
        return f"{name}(): a value has the wrong type or shape, expected {allowed:.300}"
    argument = culprit[1]
    if "Map" in allowed and hasattr(given[argument], "cfg"):
        return (
            f"{name}(): argument {argument!r} is a model, expected an activation map; make one: "
            "tm.ActivationMap.from_prompts(model, prompt)"
        )
    literal = re.search(r"\bLiteral\[(.*?)\]", allowed)
    if literal and isinstance(given[argument], str):
        words = re.findall(r"'([^']*)'", literal[1])
        near = difflib.get_close_matches(given[argument], words, 1)
        expected = f"one of {', '.join(map(repr, words))}"
        help_text = f"did you mean {near[0]!r}?" if near else f"see help({name})"
    else:
        expected, help_text = f"{allowed:.300}", f"see help({name})"
    return (
        f"{name}(): argument {argument!r} is {_describe(given[argument])}, expected {expected}; "
        f"{help_text}"
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    kind = type(value).__name__
    plain = isinstance(value, str | int | float | slice | list | tuple | None)
    return f"{value!r:.80} ({kind})" if plain else f"of type {type(value).__module__}.{kind}"


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
