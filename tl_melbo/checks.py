"""Checks of what users pass, each written once, called at public boundaries.

Every one names the argument, says what came and what is allowed, and what to do.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_melbo.errors import told
from tl_melbo.shapes import Theta

if TYPE_CHECKING:
    import pandas as pd

_LARGEST_SEED = 2**63


def as_text(text: str, argument: str = "prompt") -> str:
    """The text, which has something to read.

    Raises:
        ValueError: it has no visible character, or half a character that UTF-8 cannot hold.
    """
    if not text.strip():
        raise ValueError(
            f"{argument}={text!r}: a text needs at least one visible character; leave it out"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{argument}={text!r}: holds half a character (a lone surrogate); remove it"
        )
    return text


def as_texts(texts: str | Iterable[str], argument: str = "prompts") -> list[str]:
    """One text or several as a list, none of them empty.

    Raises:
        ValueError: there are none, or as `as_text`.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed:
        raise ValueError(f"{argument}: none given; pass one text or a list of texts")
    return [as_text(text, f"{argument}[{place}]") for place, text in enumerate(listed)]


def as_matrix(vectors: Any, argument: str = "vectors") -> Theta:
    """A library's vectors, a matrix or a single vector, as a float32 matrix of at least one row.

    Raises:
        ValueError: there are none, or values are not finite.
    """
    theta = getattr(vectors, "vectors", vectors)
    theta = (theta[None] if theta.ndim == 1 else theta).detach().float()
    if not len(theta):
        raise ValueError(f"{argument}: none given, or a library without vectors; pass one")
    finite(theta, argument)
    return theta


def one_vector(vectors: Any, argument: str) -> Theta:
    """A single vector that has a direction, as a float32 matrix of one row.

    Raises:
        ValueError: there are none or several, or it is zero or not finite.
    """
    exactly_one(vectors, argument)
    theta = as_matrix(vectors, argument)
    if not theta.any():
        raise ValueError(f"{argument}: zero, so it has no direction; pass another")
    return theta


def exactly_one(vectors: Any, argument: str, advice: str = "pick one, as found[5]") -> None:
    """Make sure that a library or a tensor holds one vector.

    Raises:
        ValueError: it holds none or several.
    """
    theta = getattr(vectors, "vectors", vectors)
    count = 1 if theta.ndim == 1 else len(theta)
    if count != 1:
        raise ValueError(f"{argument}: {count} vectors, expected exactly one; {advice}")


def directions(rows: Theta, argument: str, advice: str = "leave them out") -> Theta:
    """The rows, each of which has a direction.

    Raises:
        ValueError: some are zero or not finite.
    """
    norms = rows.detach().double().norm(dim=-1)
    bad = (~(norms.isfinite() & (norms > 0))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{argument}: vectors {told(bad)} are zero or not finite, so they have no direction; "
            f"{advice}"
        )
    return rows


def finite(
    rows: Tensor, argument: str, what: str = "vectors", advice: str = "leave them out"
) -> None:
    """Make sure that all numbers in a matrix are finite; `what` its rows are called.

    Raises:
        ValueError: some are not.
    """
    bad = (~torch.isfinite(rows)).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{argument}: {what} {told(bad)} hold values that are not finite; {advice}"
        )


def width(rows: Tensor, d_model: int, argument: str, of: str = "the residual stream") -> None:
    """Make sure that vectors are as wide as what they are for; `of` says what that is.

    Raises:
        ValueError: they are not.
    """
    if rows.shape[-1] != d_model:
        raise ValueError(
            f"{argument}: {rows.shape[-1]} wide, but {of} has d_model={d_model}; take both from "
            "the same model"
        )


def columns(
    frame: "pd.DataFrame",
    names: Sequence[str],
    argument: str,
    advice: str,
    *,
    numbers: bool = False,
) -> None:
    """Make sure that a frame has rows, and these columns.

    Args:
        frame: what came.
        names: the columns that are needed.
        argument: what errors call the frame.
        advice: where such a frame is to be had: "pass what generate returns".
        numbers: whether the columns must hold numbers.

    Raises:
        ValueError: a column is missing, or the frame is empty.
    """
    missing = [
        name
        for name in names
        if name not in frame.columns or (numbers and frame[name].dtype.kind not in "iufb")
    ]
    if missing:
        kind = ", or holds no numbers there" if numbers else ""
        raise ValueError(f"{argument}: lacks the columns {missing}{kind}; {advice}")
    if frame.empty:
        raise ValueError(f"{argument}: has no rows, it is empty; {advice}")


def seed(number: int, argument: str = "seed") -> None:
    """Make sure that torch's generators take a seed.

    Raises:
        ValueError: it is out of their range.
    """
    if not 0 <= number < _LARGEST_SEED:
        raise ValueError(f"{argument}={number}: from 0 to 2**63 - 1")


def at_least(least: int, /, **numbers: int | None) -> None:
    """Make sure that counts are not too small; None stands for a default and passes.

        checks.at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)

    Raises:
        ValueError: naming the first that is.
    """
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"{name}={number}: at least {least}")


def batch_size(number: int | None) -> None:
    """Make sure that a batch has rows; None stands for as many as fit.

    Raises:
        ValueError: it has none.
    """
    at_least(1, batch_size=number)


def between(low: float, high: float, what: str, /, **numbers: float) -> None:
    """Make sure that numbers are within bounds, both included; `what` says what they are.

        checks.between(0, 1, "a share", largest_repetition=largest_repetition)

    Raises:
        ValueError: naming the first that is not.
    """
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name}={number}: {what}, from {low:,g} to {high:,g}")


def positive(**numbers: float) -> None:
    """Make sure that numbers are positive and finite.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}={number}: a positive finite number")


def argument_names(
    name: str, settings: Mapping[str, Any], function: Callable[..., Any], given: Sequence[str] = ()
) -> None:
    """Make sure that a function takes these settings.

    Args:
        name: what errors call the function that was called.
        settings: by name, what came.
        function: what takes them.
        given: arguments of the function that are not the caller's to set.

    Raises:
        TypeError: it does not take one of them.
    """
    allowed = [each for each in inspect.signature(function).parameters if each not in given]
    for setting in settings:
        if setting not in allowed:
            near = difflib.get_close_matches(setting, allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
            raise TypeError(f"{name}(): got an unexpected argument {setting!r}; {hint}")


def installed(module: str, purpose: str) -> Any:
    """A module of a library that comes with an extra.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose}: needs {module.partition('.')[0]}; pip install 'tl_melbo[evaluation]'"
        ) from error
