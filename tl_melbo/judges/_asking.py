"""Ask a judge: what a judge is, and what of its answers is checked."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from tl_melbo.errors import NoAnswer, Unreadable
from tl_melbo.text import printable, quoted

Judge = Callable[[str], str]
Value = TypeVar("Value")

# An answer is a letter, a number or a sentence. A longer one is a mistake, or an attack.
MOST_CHARACTERS = 20_000
# A judge of whose answers more than this share cannot be read is none.
_MOST_UNREAD = 0.5


def ask(judge: Judge, questions: Sequence[str]) -> list[str]:
    """The answers to questions, in order, without spaces around them; some may be empty.

    A judge with a method `answers` gets all questions at once, so that a person sees them all.
    Control characters are made visible.

    Raises:
        TypeError: the judge is not callable, or its answer is not a text.
        NoAnswer: an answer is too long; or as the judge raises it.
    """
    answers = _answers(judge, questions)
    for number, answer in enumerate(answers):
        if len(answer) > MOST_CHARACTERS:
            raise Unreadable(
                f"judge: answer {number} has {len(answer):,} characters, of {MOST_CHARACTERS:,}: "
                f"{quoted(printable(answer[:200]))}; ask for fewer tokens"
            )
    return [printable(answer).strip() for answer in answers]


def _answers(judge: Judge, questions: Sequence[str]) -> list[str]:
    check_judge(judge)
    at_once, texts = getattr(judge, "answers", None), list(questions)
    if callable(at_once):
        answers = list(cast(Any, at_once)(texts))
    else:
        answers = [judge(text) for text in texts]
    if len(answers) != len(texts):
        raise NoAnswer(f"judge: {len(answers)} answers to {len(texts)} questions; expected as many")
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            kind = type(answer).__name__
            raise TypeError(f"judge: answer {number} is of type {kind}, expected a text (str)")
    return answers


def check_judge(judge: Any, argument: str = "judge") -> None:
    """Make sure that something can be asked: TypeError."""
    if not callable(judge) or hasattr(judge, "cfg") or hasattr(judge, "parameters"):
        raise TypeError(
            f"{argument}: got {'a model' if callable(judge) else type(judge).__name__}, expected a "
            "function from a text to a text; make one with tm.judges.local(model), "
            "tm.judges.openai_compatible(base_url, model) or tm.judges.sheet(path)"
        )


def check_optional_judge(judge: Any) -> None:
    """The same where None stands for the rules."""
    if judge is not None:
        check_judge(judge)


def ask_for(
    judge: Judge, questions: Sequence[str], read: Callable[[str], Value | None], wanted: str
) -> list[Value | None]:
    """What `read` makes of the answers; None for those that it cannot read, asked twice.

    The second time the question ends with what is `wanted`, such as "a number". Unreadable where
    more than half of the answers are, which they also are if they are too long.
    """

    def pairs_of(asked: Sequence[str]) -> list[tuple[str, Value | None]]:
        texts = [printable(text[: MOST_CHARACTERS + 1]).strip() for text in _answers(judge, asked)]
        return [(text, None if len(text) > MOST_CHARACTERS else read(text)) for text in texts]

    found = [value for _, value in pairs_of(questions)]
    unread = [place for place, value in enumerate(found) if value is None]
    again = [f"{questions[place]}\n\nAnswer with {wanted} and nothing else." for place in unread]
    second = pairs_of(again)
    for place, (_, value) in zip(unread, second, strict=True):
        found[place] = value
    bad = [text for text, value in second if value is None]
    if len(bad) > _MOST_UNREAD * len(found):
        raise Unreadable(
            f"judge: {len(bad)} of {len(found)} answers are not {wanted}, the first is "
            f"{quoted(bad[0])}; ask another judge, or put it in other words"
        )
    return found
