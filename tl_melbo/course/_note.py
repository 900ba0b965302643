"""What a check says: a note, or what is wrong."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Wrong(AssertionError):
    """An answer that is not right; the message says why, without the answer."""


class Note(str):
    """A text that a notebook shows as it is, without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def number(answer: Any, what: str) -> float:
    """An answer as a number; NaN and infinities are wrong answers."""
    try:
        found = float(answer)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"Expected one number for {what}, got {type(answer).__name__}.") from None
    if not math.isfinite(found):
        raise Wrong(f"{found:g} for {what}: not a finite number. Is something divided by zero?")
    return found


def tensor(answer: Any, shape: Sequence[int] | None, what: str) -> Tensor:
    """An answer as a tensor of finite numbers, of this shape if one is given."""
    if not isinstance(answer, Tensor):
        lost = " Is there a return?" if answer is None else ""
        raise Wrong(f"Expected a tensor for {what}, got {type(answer).__name__}.{lost}")
    if shape is not None and answer.shape != tuple(shape):
        raise Wrong(f"The shape of {what} is {tuple(answer.shape)}; expected {tuple(shape)}.")
    if not answer.isfinite().all():
        raise Wrong(f"Not all numbers of {what} are finite. Is something divided by zero?")
    return answer


def vector(answer: Any, width: int) -> Tensor:
    """An answer as one vector, float64 on the CPU, that is not zero."""
    found = tensor(answer, (width,), "the vector").detach().double().cpu()
    if not found.any():
        raise Wrong("The vector is zero. Is it the tensor that your code changes?")
    return found


def look_up(mistakes: Mapping[str, T], is_told: Callable[[T], bool]) -> None:
    """Say which mistake it is, if it is one of these."""
    for message, value in mistakes.items():
        if is_told(value):
            raise Wrong(message)


def unfinished(*answers: Any) -> Note | None:
    """Say what is missing while an answer is still `...`; None if nothing is.

    Args:
        answers: that of the exercise, then those of earlier exercises that its check needs.
    """
    if answers and answers[0] is ...:
        return Note("Not done yet: replace the ... above by your code, and run both cells.")
    if any(answer is ... for answer in answers):
        return Note("Not done yet: this exercise needs your answers to earlier ones.")
    return None
