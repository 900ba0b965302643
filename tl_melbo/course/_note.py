"""What a check says: a note, or what is wrong."""

import math
from typing import Any


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
        got = f"shape {tuple(answer.shape)}" if hasattr(answer, "shape") else type(answer).__name__
        raise Wrong(f"Expected one number for {what}, got {got}.") from None
    if not math.isfinite(found):
        raise Wrong(f"{found:g} for {what}: not a finite number. Is something divided by zero?")
    return found


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
