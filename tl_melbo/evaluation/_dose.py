"""A count against the scale of a vector, beside random vectors and the unsteered model."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from tl_melbo import checks
from tl_melbo.analysis._coherence import DEFAULT_PERPLEXITY, DEFAULT_REPETITION, judged
from tl_melbo.analysis._similarity import random_like
from tl_melbo.generation import generate
from tl_melbo.judges._asking import ask_for, check_judge
from tl_melbo.model.bridge import Model
from tl_melbo.probability import DEFAULT_CONFIDENCE, wilson_interval
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import steering_layer
from tl_melbo.tables import Table, groups
from tl_melbo.text import quoted
from tl_melbo.vectors import SteeringVectors

SCALES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
_RESAMPLES = 2_000
_KINDS = ("vector", "random", "unsteered")
_ROW = ["steering", "vector", "scale"]
_TABLE = [*_ROW, "n", "mean", "low", "high", "greedy", "coherent", "invalid"]
_ADVICE = "pass the table of dose_response"


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """What `dose_response` gives.

    Attributes:
        table: a row for each vector and scale, and for their controls.
        texts: the completions, each with its `count`, and whether it is `coherent`.
    """

    table: pd.DataFrame
    texts: pd.DataFrame

    def negative_scale(self) -> pd.DataFrame:
        """Does the negative of a vector do the opposite?

        The change of the mean from the unsteered one, split into a part that turns around with the
        sign, `odd`, and one that does not, `even`: near 0 for a direction along which the count
        grows.

        Returns:
            A row for each vector and each scale that was taken with both signs: vector, scale; odd,
            odd_low, odd_high; even, even_low, even_high, by bootstrap over samples.

        Source: a conjecture in "Unsupervised discovery of steering vectors" (2025).
        """
        found = {key: _strata(some) for key, some in groups(self.texts, _ROW).items()}
        zero, rows = next(found[key] for key in found if key[0] == "unsteered"), []
        for (steering, vector, scale), plus in found.items():
            minus = found.get((steering, vector, -scale))
            if steering != "vector" or scale < 0 or minus is None:
                continue
            rng = np.random.default_rng(0)
            up, down, none = (_resampled(each, rng) for each in (plus, minus, zero))
            means = [_mean(each) for each in (plus, minus, zero)]
            row: dict[str, Any] = {"vector": vector, "scale": scale}
            for name, sign, mean, rest in (("odd", -1, 0.0, 0.0), ("even", 1, means[2], none)):
                row[name] = (means[0] + sign * means[1]) / 2 - mean
                some = (up + sign * down) / 2 - rest
                row[f"{name}_low"], row[f"{name}_high"] = _quantiles(some)
            rows.append(row)
        if not rows:
            raise ValueError("scales: none was taken with both signs; pass for example [-1, 1]")
        return Table(rows)


@shape_checked
def dose_response(
    model: Model,
    prompts: str | Sequence[str],
    steering: Any,
    scales: Sequence[float] = SCALES,
    *,
    count: Callable[[str], Any],
    question: str | None = None,
    layer: int | None = None,
    n_samples: int = 8,
    temperature: float = 0.7,
    n_random: int = 2,
    max_new_tokens: int = 50,
    chat: bool | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> DoseResponse:
    """Count something in sampled completions at each scale of each vector.

        response = tm.evaluation.dose_response(
            model, prompts, found[3], count=lambda text: text.count("?")
        )

    Args:
        steering: what `generate` takes: vectors, or an adapter.
        scales: of both signs. 0, the unsteered model, is always beside them.
        count: from a completion to a number; or a judge, if there is a `question`.
        question: for the judge, such as "How many questions are in this text?".
        n_samples: sampled completions of each prompt; a greedy one is beside them.
        n_random: random vectors of equal norm for each vector, as a control; 0 for adapters.

    Returns:
        A `DoseResponse`. Its table: steering, "vector", "random" or "unsteered"; vector, for
        "random" the one whose norm they have; scale; n, how many sampled completions; mean, with
        low and high; greedy, the mean of the greedy completions; coherent, the share of coherent
        completions, by perplexity and repetition; invalid, how many a judge gave no number for.
        The interval is over samples of these prompts, not over other prompts: Wilson's if all
        counts are 0 or 1, otherwise a bootstrap within each prompt.

    Raises:
        TypeError: `count` is no function, or does not give a number.
        ValueError: a scale is given twice or is not finite; n_random with an adapter.
        NoAnswer: more than half of a judge's answers hold no number.
    """
    checks.at_least(1, n_samples=n_samples)
    checks.at_least(0, n_random=n_random)
    checks.positive(temperature=temperature)
    checks.installed("scipy.stats", "dose_response")  # or say at once that it is missing
    check_judge(count, "count")
    steps = [float(scale) for scale in scales if scale]
    if not steps or len({*steps}) < len(steps) or not all(map(math.isfinite, steps)):
        raise ValueError(f"scales={list(scales)}: finite numbers other than 0, each once")
    if steering is None:
        raise ValueError("steering: none given; pass vectors, or an adapter")
    options: dict[str, Any] = {"n_samples": n_samples, "temperature": temperature, "seed": seed}
    options |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    steered = generate(model, prompts, steering, layer, scales=steps, chat=chat, **options)
    options["chat"] = steered.attrs["chat"]
    unsteered = generate(model, prompts, **options)
    parts = [steered.assign(steering="vector"), unsteered.assign(steering="unsteered")]
    if n_random:
        theta, layer = _random(model, steering, layer, n_random, seed)
        control = generate(model, prompts, theta, layer, scales=steps, **options)
        parts.append(control.assign(steering="random"))
    texts = pd.concat(parts, ignore_index=True)
    # Strata of the random control are prompts and vectors; it stands for the vector of its norm.
    texts["member"] = texts["vector"]
    n_vectors = len({*steered["vector"]})
    is_random = texts["steering"] == "random"
    texts["vector"] = texts["vector"].where(~is_random, texts["vector"] % n_vectors)
    texts["count"] = _counts(texts["completion"].tolist(), count, question)
    pairs = list(zip(texts["prompt"], texts["completion"], strict=True))
    limits = (DEFAULT_PERPLEXITY, DEFAULT_REPETITION)
    texts["coherent"] = (
        judged(model, pairs, options["chat"], *limits, batch_size)["filtered_out"] == ""
    ).tolist()
    return DoseResponse(_table(texts), Table(texts))


def _random(
    model: Model, steering: Any, layer: int | None, n_random: int, seed: int
) -> tuple[torch.Tensor, int]:
    """Random vectors, `n_random` for each vector, and their layer."""
    if not isinstance(steering, SteeringVectors | torch.Tensor):
        what = f"{type(steering).__name__} has no random vectors of equal norm"
        raise ValueError(f"n_random={n_random}: {what}; pass n_random=0")
    theta = checks.as_matrix(steering, "steering")
    # Far from the seeds that vectors may have been drawn with: they must not come back.
    seeds = [(seed + 1_000_003 * number) % 2**63 for number in range(1, n_random + 1)]
    some = [random_like(theta, each) for each in seeds]
    return torch.cat(some), steering_layer(model, steering, layer)


def _counts(texts: Sequence[str], count: Callable[[str], Any], question: str | None) -> list[float]:
    """The number for each text; NaN where a judge gave none. Equal texts are counted once."""
    different = list(dict.fromkeys(texts))
    if question is None:
        known = {text: _number(count(text)) for text in different}
    else:
        checks.as_text(question, "question")
        asked = [f"{question}\n\nThe text:\n\n{text}" for text in different]
        answers = ask_for(count, asked, number_in, "a number")
        numbers = [math.nan if answer is None else answer for answer in answers]
        known = dict(zip(different, numbers, strict=True))
    return [known[text] for text in texts]


def _number(value: Any) -> float:
    if isinstance(value, str):
        advice = "if it is a judge, pass question= to ask it"
        raise TypeError(f"count: gave the text {quoted(value)}, expected a number; {advice}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"count: gave a {type(value).__name__}, expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"count: gave {number}, expected a finite number")
    return number


def number_in(answer: str) -> float | None:
    """The number in an answer; None where there is none, or more than one."""
    found = {float(each) for each in re.findall(r"(?<![\w.])-?\d{1,9}(?:\.\d{1,9})?(?!\w)", answer)}
    return found.pop() if len(found) == 1 else None


def _table(texts: pd.DataFrame) -> Table:
    rows = []
    for key, some in groups(texts, _ROW).items():
        drawn = pd.DataFrame(some[some["sample"] > 0])
        interval = _interval(_strata(some))
        greedy = np.mean(some["count"][some["sample"] == 0].tolist())
        coherent, invalid = np.mean(drawn["coherent"].tolist()), np.isnan(drawn["count"].tolist())
        rows.append((*key, len(drawn), *interval, greedy, coherent, int(invalid.sum())))
    rows.sort(key=lambda row: (_KINDS.index(row[0]), *row[1:3]))
    return Table(rows, columns=_TABLE)


def _strata(texts: pd.DataFrame) -> list[np.ndarray]:
    """Counts of samples that are drawn alike: of one prompt, under one vector."""
    known = pd.DataFrame(texts[(texts["sample"] > 0) & texts["count"].notna()])
    return [np.array(some["count"]) for some in groups(known, ["member", "prompt"]).values()]


def _mean(strata: Sequence[np.ndarray]) -> float:
    return float(np.concatenate(strata).mean()) if strata else math.nan


def _resampled(strata: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """The mean over samples drawn again, within each stratum, many times."""
    sums = [
        some[rng.integers(0, len(some), (_RESAMPLES, len(some)))].sum(1) for some in strata
    ] or [np.full(_RESAMPLES, math.nan)]
    return np.sum(sums, 0) / max(1, sum(map(len, strata)))


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - DEFAULT_CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _interval(strata: Sequence[np.ndarray]) -> tuple[float, float, float]:
    mean = _mean(strata)
    values = np.concatenate(strata) if strata else np.zeros(0)
    if len(values) and np.isin(values, (0, 1)).all():
        return mean, *wilson_interval(int(values.sum()), len(values))
    return mean, *_quantiles(_resampled(strata, np.random.default_rng(0)))


@shape_checked
def coherent_window(table: pd.DataFrame, least: float = 0.8) -> pd.DataFrame:
    """From which to which scale completions stay coherent, for each vector.

    Outwards from 0, to the last scale before the share of coherent completions falls below `least`
    of the unsteered model's.

    Returns:
        A row for each vector: vector, low, high; 0 where the first scale is too much already.
    """
    checks.columns(table, (*_ROW, "coherent"), "table", _ADVICE)
    checks.between(0, 1, "a share", least=least)
    known = table.to_dict("records")
    unsteered = [row["coherent"] for row in known if row["steering"] == "unsteered"]
    if len(unsteered) != 1:
        raise ValueError(f"table: {len(unsteered)} unsteered rows, expected one; {_ADVICE}")
    rows = [row for row in known if row["steering"] == "vector"]
    windows = {row["vector"]: {"vector": row["vector"], "low": 0.0, "high": 0.0} for row in rows}
    ended = set()
    for row in sorted(rows, key=lambda row: abs(row["scale"])):
        side = (row["vector"], "low" if row["scale"] < 0 else "high")
        if row["coherent"] < least * unsteered[0]:
            ended.add(side)
        if side not in ended:
            windows[row["vector"]][side[1]] = row["scale"]
    return Table([*windows.values()])
