"""Errors that callers tell apart by their type, and warnings that point at the user's line."""

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_melbo.text import quoted

_ADVICE = "use shorter vectors, or load the model in a wider type, for example dtype=torch.float32"
# What lies between a user's line and ours.
_NOT_THE_USER = {"tl_melbo", "jaxtyping", "torch"}
_MOST_NAMED = 3
_MOST_ROWS = 10


class DifferentSearch(ValueError):
    """Vectors that are there are not the beginning of this search.

    Attributes:
        differences: what differs, as `story.differences` gives it; empty where the vectors do.
        reason: what is wrong, in a few words.
    """

    def __init__(self, message: str, differences: Sequence[Any] = (), reason: str = "") -> None:
        super().__init__(message)
        self.differences, self.reason = list(differences), reason

    @classmethod
    def of(cls, what: str, differences: Sequence[Any], advice: str) -> "DifferentSearch":
        """`what` was found with other settings than these."""
        reason = f"found with {', '.join(map(str, differences))}"
        return cls(f"{what}: {reason}; {advice}", differences, reason)


class Damaged(ValueError):
    """A file is cut short, damaged, or not one that this package wrote: `path` names it."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class NotFinite(FloatingPointError, ValueError):
    """The model's numbers are not finite: `rows` are the vectors under which they are not."""

    def __init__(self, message: str, rows: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class NoAnswer(ValueError):
    """A judge gave no answer that can be used."""


class Unreadable(NoAnswer):
    """A judge answered, but not what was asked for."""


class Unanswered(NoAnswer):
    """A sheet waits for a person: `path` is its file, `rows` are the open questions' numbers."""

    def __init__(self, message: str, path: Path, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.path, self.rows = path, list(rows)


def told(rows: Sequence[object]) -> str:
    """The first ten names of rows, and how many more there are."""
    more = f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
    return f"[{', '.join(map(str, rows[:_MOST_ROWS]))}]{more}"


def place(story: Mapping[str, Any], prompts: Iterable[int] = ()) -> str:
    """Where an activation map reads, by its story: model, layer, and some of its prompts."""
    parts = [str(story.get("model") or "the model")]
    if story.get("target_layer") is not None:
        parts.append(f"after layer {story['target_layer']}")
    numbers, texts = list(prompts), story.get("prompts") or []
    named = [quoted(texts[i]) for i in numbers[:_MOST_NAMED] if i < len(texts)]
    if named:
        more = f" and {len(numbers) - len(named)} more" if len(numbers) > len(named) else ""
        parts.append(f"with {'prompts' if len(numbers) > 1 else 'prompt'} {', '.join(named)}{more}")
    return " ".join(parts)


def warn_of_rows(
    bad: Sequence[bool], what: str, consequence: str, names: Sequence[object] | None = None
) -> None:
    """Warn that `what` is not finite under the bad vectors; raise NotFinite if all are bad.

    Vectors go by their `names`, or by their positions.
    """
    rows = [i if names is None else names[i] for i, is_bad in enumerate(bad) if is_bad]
    if rows and len(rows) == len(bad):
        raise NotFinite(f"{what} is not finite under any of the vectors; {_ADVICE}", rows)
    if rows:
        advice = f"{_ADVICE[0].upper()}{_ADVICE[1:]}"
        warn_user(f"vectors {told(rows)}: {what} is not finite under them; {consequence}. {advice}")


def warn_user(message: str) -> None:
    """Warn of the line that called this package, however deep we are."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)
