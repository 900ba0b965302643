"""What a check says: a note, or what is wrong."""

from typing import Any


class Wrong(AssertionError):
    """An answer that is not right; the message says why, without the answer."""


class Note(str):
    """A text that a notebook shows as it is, without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


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
