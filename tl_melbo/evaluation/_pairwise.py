"""Which of two texts has more of a quality? Asked blind, in both orders, with ties."""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from tl_melbo import checks
from tl_melbo.errors import warn_user
from tl_melbo.judges._asking import Judge, ask_for, check_judge
from tl_melbo.probability import wilson_interval
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table, groups

_QUESTION = """Compare two texts.

Text A:
{a}

Text B:
{b}

Which of the two texts has more of this quality: {quality}? Answer with one letter: A, B, or T for \
a tie."""
# One letter alone, or at the beginning, after "answer", "text" and the like: not the article "A".
_LETTER = re.compile(
    r"\W*(?:(?:the|my|final|best|answer|choice|option|text|is|it)\W+)*"
    r"(?:(?P<letter>[ABT])(?=\W*$|[.:,;)\]*\n])|(?P<tie>tie)\b)",
    re.IGNORECASE,
)
_ADVICE = "pass what generate returns"
_VERDICTS = ("ours", "theirs", "tie", "inconsistent", "invalid")
_COLUMNS = ["vector", "scale", "n", *_VERDICTS, "share", "low", "high", "consistent", "first"]


@dataclass(frozen=True, eq=False)
class Pairwise:
    """What `pairwise` gives.

    Attributes:
        table: a row for each vector and scale of `ours`, or a single one for lists.
        pairs: vector, scale, ours, theirs; first, the answer with ours as text A; second, with
            ours as text B: "A", "B", "T" or None; verdict.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame


@shape_checked
def pairwise(
    judge: Judge,
    ours: Sequence[str] | pd.DataFrame,
    theirs: Sequence[str] | pd.DataFrame,
    quality: str,
    *,
    seed: int = 0,
) -> Pairwise:
    """Let a judge compare texts in pairs, each in both orders, without saying which is whose.

        steered = tm.generate(model, prompts, found[3], scales=[-1, 1], n_samples=4)
        unsteered = tm.generate(model, prompts, n_samples=4)
        tm.evaluation.pairwise(judge, steered, unsteered, "asking questions").table

    Args:
        ours: texts; or completions, which are compared at each vector and scale.
        theirs: as many texts; or unsteered completions of the same prompts and samples.
        quality: in a few words, after "has more of this quality:".
        seed: of the order in which the pairs are asked, and of which order comes first.

    Returns:
        A `Pairwise`. Its table: vector, scale (missing for lists); n, how many pairs; ours and
        theirs, how many were preferred in both orders; tie, in both orders; inconsistent; invalid,
        where an answer was no letter, asked twice; share, ours of ours and theirs, with low and
        high, Wilson's interval, NaN if no pair was decided; consistent, the share of valid pairs
        that have the same verdict in both orders; first, how many of the answers A and B were A.
        A warning where more pairs are inconsistent than not.

    Raises:
        ValueError: other numbers of texts, completions without a partner, no texts.
        NoAnswer: more than half of the answers are no letter.
    """
    check_judge(judge)
    checks.as_text(quality, "quality")
    checks.seed(seed)
    checks.installed("scipy.stats", "pairwise")  # or say at once that it is missing
    pairs = _paired(ours, theirs)
    order = random.Random(seed)
    # Both orders of every pair, all in one shuffled row: neighbours tell nothing.
    places = [(place, turned) for place in range(len(pairs)) for turned in (False, True)]
    order.shuffle(places)
    questions = []
    for place, turned in places:
        texts = [str(pairs["ours"][place]), str(pairs["theirs"][place])]
        a, b = texts[::-1] if turned else texts
        questions.append(_QUESTION.format(a=a.strip(), b=b.strip(), quality=quality))
    answers = ask_for(judge, questions, letter, "one letter: A, B or T")
    given = dict(zip(places, answers, strict=True))
    first, second = (
        [given[place, turned] for place in range(len(pairs))] for turned in (False, True)
    )
    told = {"first": first, "second": second, "verdict": [*map(_verdict, first, second)]}
    pairs = pd.concat([pairs, pd.DataFrame(told, index=pairs.index)], axis=1)
    grouped = groups(pairs, ["vector", "scale"]).items()
    table = Table([(*key, *_row(some)) for key, some in grouped], columns=_COLUMNS)
    counts, said = Counter(pairs["verdict"]), Counter([*first, *second])
    if counts["inconsistent"] > counts["ours"] + counts["theirs"] + counts["tie"]:
        warn_user(
            f"judge: {counts['inconsistent']} of {len(pairs)} verdicts changed with the order of "
            f"the texts; it answered A {said['A']} times and B {said['B']} times. Take another one"
        )
    return Pairwise(table, Table(pairs))


def letter(answer: str) -> str | None:
    """A, B or T of an answer that begins with it, if need be after "Answer:"; None for prose."""
    found = _LETTER.match(answer)
    return None if found is None else (found["letter"] or "T").upper()


def _paired(
    ours: Sequence[str] | pd.DataFrame, theirs: Sequence[str] | pd.DataFrame
) -> pd.DataFrame:
    if isinstance(ours, pd.DataFrame) and isinstance(theirs, pd.DataFrame):
        return _merged(ours, theirs)
    if isinstance(ours, pd.DataFrame) or isinstance(theirs, pd.DataFrame):
        raise ValueError("ours, theirs: one is a frame and one is not; pass two of a kind")
    if isinstance(ours, str) or isinstance(theirs, str) or len(ours) != len(theirs) or not ours:
        given = f"ours, theirs: {len(ours)} and {len(theirs)} texts"
        raise ValueError(f"{given}; pass two lists of the same, positive length")
    texts = {"ours": list(ours), "theirs": list(theirs)}
    return pd.DataFrame({"vector": math.nan, "scale": math.nan, **texts})


def _merged(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Completions beside those of the same prompt and sample."""
    for argument, frame in (("ours", ours), ("theirs", theirs)):
        checks.columns(frame, ("vector", "scale", "prompt", "completion"), argument, _ADVICE)
    both = ["sample"] if "sample" in ours and "sample" in theirs else []
    is_unsteered = {*theirs["vector"]} == {-1}
    on = ["prompt", *both] if is_unsteered else ["vector", "scale", "prompt", *both]
    if any(theirs.duplicated(on)):
        raise ValueError(f"theirs: several completions with the same {on}; leave one of each")
    other = pd.DataFrame(theirs[[*on, "completion"]]).rename(columns={"completion": "theirs"})
    pairs = ours.rename(columns={"completion": "ours"}).merge(other, "left", on)
    if missing := sum(pairs["theirs"].isna()):
        raise ValueError(f"theirs: lacks a completion with the same {on} for {missing} of ours")
    return pd.DataFrame(pairs[["vector", "scale", "prompt", *both, "ours", "theirs"]])


def _verdict(first: str | None, second: str | None) -> str:
    if first is None or second is None:
        return "invalid"
    return {"AB": "ours", "BA": "theirs", "TT": "tie"}.get(first + second, "inconsistent")


def _row(pairs: pd.DataFrame) -> tuple[float, ...]:
    counts = Counter(pairs["verdict"])
    won, lost, share = counts["ours"], counts["theirs"], (math.nan,) * 3
    if won + lost:
        share = (won / (won + lost), *wilson_interval(won, won + lost))
    valid = len(pairs) - counts["invalid"]
    same = (valid - counts["inconsistent"]) / valid if valid else math.nan
    said = Counter([*pairs["first"], *pairs["second"]])
    n_letters = said["A"] + said["B"]
    first = said["A"] / n_letters if n_letters else math.nan
    return (len(pairs), *(counts[verdict] for verdict in _VERDICTS), *share, same, first)
