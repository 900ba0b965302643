"""Checks of what users pass, each written once, called at public boundaries."""

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tl_melbo.errors import told
from tl_melbo.shapes import Theta

if TYPE_CHECKING:
    import pandas as pd

_LARGEST_SEED = 2**63


def as_text(text: str, argument: str = "prompt") -> str:
    """The text, which must have a visible character and be whole."""
    if not text.strip():
        raise ValueError(
            f"{argument}={text!r}: a text needs at least one visible character; write one, or "
            "leave the text out"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{argument}={text!r}: holds half a character (a lone surrogate); remove it"
        )
    return text


def as_texts(texts: str | Iterable[str], argument: str = "prompts") -> list[str]:
    """One text or several as a list of at least one, each as `as_text` wants it."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed:
        raise ValueError(f"{argument}: none given; pass one text or a list of texts")
    return [as_text(text, f"{argument}[{place}]") for place, text in enumerate(listed)]


def as_matrix(vectors: Any, argument: str = "vectors") -> Theta:
    """A library, a matrix or a vector as a finite float32 matrix of at least one row."""
    theta = getattr(vectors, "vectors", vectors)
    theta = (theta[None] if theta.ndim == 1 else theta).detach().float()
    if not len(theta):
        raise ValueError(f"{argument}: none given, or a library without vectors; pass one")
    finite(theta, argument)
    return theta


def one_vector(vectors: Any, argument: str) -> Theta:
    """A single vector that is not zero, as a float32 matrix of one row."""
    exactly_one(vectors, argument)
    theta = as_matrix(vectors, argument)
    if not theta.any():
        raise ValueError(f"{argument}: zero, so it has no direction; pass another")
    return theta


def exactly_one(vectors: Any, argument: str, advice: str = "pick one, as found[5]") -> None:
    """A library or a tensor must hold one vector."""
    theta = getattr(vectors, "vectors", vectors)
    count = 1 if theta.ndim == 1 else len(theta)
    if count != 1:
        raise ValueError(f"{argument}: {count} vectors, expected exactly one; {advice}")


def directions(rows: Theta, argument: str) -> Theta:
    """The rows, none of which may be zero or not finite."""
    norms = rows.detach().double().norm(dim=-1)
    good = norms.isfinite() & (norms > 0)
    no_rows(~good, argument, "vectors", "are zero or not finite, so they have no direction")
    return rows


def finite(
    rows: Tensor, argument: str, what: str = "vectors", advice: str = "leave them out"
) -> None:
    """All numbers in a matrix must be finite; `what` its rows are called."""
    bad = (~rows.isfinite()).any(-1)
    no_rows(bad, argument, what, "hold values that are not finite", advice)


def no_rows(
    bad: Tensor, argument: str, what: str, problem: str, advice: str = "leave them out"
) -> None:
    """No row may be bad; those that are get named."""
    if bad.any():
        rows = told(bad.nonzero().flatten().tolist())
        raise ValueError(f"{argument}: {what} {rows} {problem}; {advice}")


def width(rows: Tensor, d_model: int, argument: str, of: str = "the residual stream") -> None:
    """Vectors must be as wide as what they are for; `of` says what that is."""
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
    """A frame must have rows, and these columns, of `numbers` if so; `advice` tells its source."""
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


def seed(number: int) -> None:
    """A seed must be one that torch's generators take."""
    if not 0 <= number < _LARGEST_SEED:
        raise ValueError(f"seed={number}: from 0 to 2**63 - 1")


def at_least(least: int, /, **numbers: int | None) -> None:
    """Counts must not be too small, `at_least(1, steps=steps)`; None stands for a default."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"{name}={number}: at least {least}")


def between(low: float, high: float, what: str, /, **numbers: float) -> None:
    """Numbers must be within bounds, both included: `between(0, 1, "a share", rate=rate)`."""
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name}={number}: {what}, from {low:,g} to {high:,g}")


def positive(**numbers: float) -> None:
    """Numbers must be positive and finite."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}={number}: a positive finite number")


def installed(module: str, purpose: str, extra: str = "evaluation") -> Any:
    """A module of an extra; a ModuleNotFoundError says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose}: needs {module.partition('.')[0]}; pip install 'tl_melbo[{extra}]', or, in "
            f"a clone, pip install -e '.[{extra}]'"
        ) from error
