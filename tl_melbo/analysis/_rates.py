"""How often do completions do something? Rates with intervals, beside unsteered and random ones."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from tl_melbo import checks
from tl_melbo.analysis._tagged import tagged, unsteered_of
from tl_melbo.analysis._tags import TAGS
from tl_melbo.probability import wilson_interval
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table, groups

STEERINGS = ("unsteered", "random", "vector")
_COUNTS = ["value", "hits", "n", "rate", "low", "high"]
_ADVICE = (
    "pass what generate returns, or the texts of behaviours; to count what texts say, pass a "
    "function"
)


@shape_checked
def rates(
    completions: pd.DataFrame,
    of: str | Callable[[str], Any],
    by: Sequence[str] = ("vector", "scale"),
    *,
    random: pd.DataFrame | None = None,
) -> Table:
    """How often completions do something: under each vector, unsteered, and under random vectors.

        texts = tm.generate(model, prompt, found, scales=[1, -1], n_samples=16)
        rates(texts, "speaker"), rates(texts, lambda text: "AI" in text)

    Where there are samples, they are counted, and the greedy completions are not.

    Args:
        completions: as `generate` returns them, or the texts of a `Behaviours`.
        of: a column, each of whose values gets a rate: "behaviour", "stance", "form", "speaker",
            "baseline"; tags are found by rule where they are missing (by `tags`, beside the
            unsteered rows, without a system prompt). Or a function of a text, whose answer is
            counted where it is true.
        by: columns whose values are told apart, such as "vector", "scale", "prompt".
        random: completions under `tm.random_vectors` of the same norm, which are taken together, as
            are unsteered ones.

    Returns:
        Rows of "unsteered", then "random", then "vector", in a column steering; the columns of
        `by`; value, what was counted; hits, of n texts; rate; low and high, Wilson's 95% interval,
        which takes texts for independent. Texts under one vector are more alike than others.

    Raises:
        ValueError: no completions, or columns that are not there.
    """
    checks.installed("scipy.stats", "rates")  # before `of`, which may be a judge, is asked
    among = [completions] if random is None else [completions, random]
    frame = _counted(completions, of, by, "completions", among).assign(steering="vector")
    if random is not None:
        other = _counted(random, of, by, "random", among).assign(steering="random")
        if ("sample" in random) != ("sample" in completions):
            what = "one of completions and random is of samples, the other greedy"
            raise ValueError(f"random: {what}; write both with n_samples, or neither")
        frame = pd.concat([frame, other[other["vector"] >= 0]], ignore_index=True)
    frame.loc[(frame["vector"] < 0) | (frame["scale"] == 0), "steering"] = "unsteered"
    values, shown = [True], getattr(of, "__name__", "function")
    if isinstance(of, str):
        values = [value for value, _ in Counter(frame["value"]).most_common()]
    rows = []
    for steering in STEERINGS:
        some = pd.DataFrame(frame[frame["steering"] == steering])
        told = [name for name in by if steering == "vector" or name not in ("vector", "scale")]
        for key, texts in groups(some, told).items() if told else [((), some)]:
            place = dict(zip(told, key, strict=True))
            for value in values if len(texts) else ():
                hits, n = [*texts["value"]].count(value), len(texts)
                bounds = wilson_interval(hits, n)
                keys = [steering, *(place.get(name) for name in by)]
                what = value if isinstance(of, str) else shown
                rows.append((*keys, what, hits, n, hits / n, *bounds))
    found = Table(rows, columns=["steering", *by, *_COUNTS])
    # Whole numbers, though unsteered and random rows have none.
    return found.astype({"vector": "Int64"} if "vector" in by else {})


def sampled(completions: pd.DataFrame) -> pd.DataFrame:
    """The samples, where there are any: the greedy completion is none of them."""
    if "sample" not in completions:
        return completions
    if any(completions["sample"].isna()):
        what = "some rows have a sample and some have none"
        raise ValueError(f"completions: {what}; write all with n_samples, or none")
    if max(completions["sample"], default=0) <= 0:
        return completions
    return pd.DataFrame(completions[completions["sample"] > 0])


def _counted(
    completions: pd.DataFrame,
    of: str | Callable[[str], Any],
    by: Sequence[str],
    argument: str,
    among: Sequence[pd.DataFrame],
) -> pd.DataFrame:
    """The completions with a scale and what is counted; unsteered texts are in one of `among`."""
    column = of if isinstance(of, str) else "completion"
    frame = _with_scale(completions)
    if column in TAGS and column not in frame:
        checks.columns(frame, ("vector", "prompt", "completion"), argument, _ADVICE)
        unsteered: dict[str, list[str]] = {}
        for some in reversed(among):
            if {"vector", "prompt", "completion"} <= {*some}:
                unsteered |= unsteered_of(_with_scale(some), _texts(some))
        pairs = list(zip(frame["prompt"], _texts(frame), strict=True))
        frame = frame.assign(**{column: tagged(pairs, unsteered)[column].tolist()})
    checks.columns(frame, ("vector", *by, column), argument, _ADVICE)
    frame = sampled(frame)
    if isinstance(of, str):
        if of != "completion" and any(frame[of].isna()):
            raise ValueError(f"{argument}: {of} is missing in some rows; leave these out")
        return frame.assign(value=frame[of])
    texts = frame["completion"].fillna("").astype(str)
    return frame.assign(value=[bool(of(text)) for text in texts])


def _with_scale(completions: pd.DataFrame) -> pd.DataFrame:
    return completions if "scale" in completions else completions.assign(scale=1.0)


def _texts(frame: pd.DataFrame) -> list[str]:
    return [text if isinstance(text, str) else "" for text in frame["completion"]]
