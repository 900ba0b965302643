"""What a group of completions is called: what it is and how it begins, or what a judge says."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from tl_melbo.analysis._tags import STANCES, content_words, is_form_of, words
from tl_melbo.errors import Unreadable, warn_user
from tl_melbo.judges._asking import Judge, ask_for

BASELINE = "≈ baseline"
_OPENING_WORDS, _LONGEST_WORD, _LONGEST_NAME = 6, 24, 60
_SHOWN_TEXTS, _SHOWN_CHARACTERS = 4, 300
_NONE = "none of these"
_STANCE = """A language model was asked:

{prompt}

It wrote:

{text}

What does the text do: {choices}? Answer with one of these and nothing else."""
_NAME = """These texts were written by a language model in answer to one prompt:

{texts}

Give what they have in common a name of at most six words. Do not use words of the prompt, which \
is: {prompt}

Answer with the name and nothing else."""
Value = TypeVar("Value")


def without(text: str, prompt: str, gap: str = " ") -> str:
    """The text without the words of the prompt that are about something, whatever their endings."""
    asked = content_words(prompt)

    def kept(found: re.Match[str]) -> str:
        word = found[0].lower()
        return gap if any(is_form_of(word, each) for each in asked) else found[0]

    return re.sub(r"[^\W_]+", kept, text)


def rule_name(tags: Sequence[str], medoid: str, prompt: str) -> str:
    """The tags, and the opening words of the text in the middle of the group."""
    stance, form, speaker = tags
    told = [stance, form if form != "prose" else "", speaker if speaker != "none" else ""]
    label = ", ".join(filter(None, told)) or form
    if stance == "echoes the prompt":  # nothing else is in it
        return stance
    opening = without(medoid, prompt, "…").split()
    short = " ".join(word[:_LONGEST_WORD] for word in opening[:_OPENING_WORDS])
    short = re.sub(r"…(?:\W*…)+", "…", short)
    more = "…" if len(opening) > _OPENING_WORDS and not short.endswith("…") else ""
    return f"{label}: “{short}{more}”" if words(short) else label


def unique(names: Iterable[str]) -> list[str]:
    """The names, with a number behind those that another one has already."""
    taken: dict[str, None] = {}
    for name in names:
        new = name
        for number in range(2, len(taken) + 2):
            if new not in taken:
                break
            new = f"{name} ({number})"
        taken[new] = None
    return list(taken)


def judged_stances(
    judge: Judge, pairs: Sequence[tuple[str, str]], stances: Iterable[str]
) -> list[str]:
    """The stance of each text after its prompt; the one it has where the judge cannot tell."""
    asked = list(dict.fromkeys(pairs))
    choices = ", ".join([*filter(None, STANCES), _NONE])
    questions = [
        _STANCE.format(prompt=prompt, text=text[:_SHOWN_CHARACTERS], choices=choices)
        for prompt, text in asked
    ]
    named = {stance or _NONE: stance for stance in STANCES}

    def read(answer: str) -> str | None:
        return named.get(re.sub(r"\W+", " ", answer).strip().lower())

    found = _asked(judge, questions, read, "one of: " + choices, "stances")
    told = dict(zip(asked, found, strict=True))
    both = zip(pairs, stances, strict=True)
    return [own if (given := told[pair]) is None else given for pair, own in both]


def judged_names(
    judge: Judge, groups: Sequence[tuple[str, Sequence[str]]], names: Sequence[str]
) -> list[str]:
    """A name from the judge for each prompt and its texts; the one it has where that is no use."""
    asked = [place for place, name in enumerate(names) if name != BASELINE]
    if not asked:
        return [*names]
    questions = []
    for prompt, texts in (groups[place] for place in asked):
        shown = "\n\n".join(text[:_SHOWN_CHARACTERS] for text in texts[:_SHOWN_TEXTS])
        questions.append(_NAME.format(texts=shown, prompt=prompt))

    def read(answer: str) -> str | None:
        name = answer.strip(" \t\n\"'“”.")
        good = 0 < len(name) <= _LONGEST_NAME and "\n" not in name and words(name)
        return name if good and name != BASELINE else None

    found = _asked(judge, questions, read, "a name of at most six words", "names")
    told = [*names]
    for place, name in zip(asked, found, strict=True):
        if name is not None and without(name, groups[place][0]) == name:
            told[place] = name
    return told


def _asked(
    judge: Judge,
    questions: Sequence[str],
    read: Callable[[str], Value | None],
    wanted: str,
    kept: str,
) -> Sequence[Value | None]:
    try:
        return ask_for(judge, questions, read, wanted)
    except Unreadable as error:
        warn_user(f"{error}. All {kept} of the rules are kept")
        return [None] * len(questions)
