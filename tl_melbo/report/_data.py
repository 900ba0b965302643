"""The page's data: what its script needs to build rows, cards and comparisons."""

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_melbo.analysis import Behaviours
from tl_melbo.analysis._rates import sampled
from tl_melbo.analysis._tags import TAGS
from tl_melbo.analysis._top_tokens import top_tokens_and_kl
from tl_melbo.concatenation import concatenate
from tl_melbo.generation import Tell
from tl_melbo.model.bridge import Model
from tl_melbo.plots._tokens import likeliest
from tl_melbo.probability import wilson_interval
from tl_melbo.report import _facts
from tl_melbo.report._render import TextPool, number, pooled, shown
from tl_melbo.vectors import SteeringVectors

_MOST_POINTS = 40
DIVERGENCE = ("vector", "scale", "prompt", "position", "token", "kl", "top", "unsteered_top")
_MOST_TOKENS = 8
# The rows of the page, by prompt, vector and sign.
Keys = Mapping[tuple[str, int, int], str]
# By prompt and sign, one a vector.
Divergences = dict[tuple[str, int], list[float]]


class Column(NamedTuple):
    """One column; its kind is "number", "word" or "text"."""

    name: str
    label: str
    kind: str
    hint: str


KL = Column("kl", "KL", "number", "Divergence of the next token from unsteered, in nats")
COSTS = (
    Column("specificity", "Specificity", "number", "1: acts on the prompt alone; 0.5: anywhere"),
    Column("loss_increase", "Loss increase", "number", "On prose, in nats a token"),
)


class Measured(NamedTuple):
    """What was measured of the vectors and their negatives, by prompt."""

    kl: Mapping[tuple[str, int], list[float]]
    baselines: pd.DataFrame | None
    side_effects: pd.DataFrame | None


def numbers_of(found: SteeringVectors) -> list[int]:
    """What the page calls the vectors: their numbers, or their places where numbers repeat."""
    numbers = found.columns["index"].tolist()
    return numbers if len({*numbers}) == len(numbers) else [*range(len(numbers))]


def greedy_first(texts: pd.DataFrame) -> pd.DataFrame:
    """The texts, samples after the greedy ones in their order."""
    return texts.sort_values("sample", kind="stable") if "sample" in texts else texts


def rows_data(
    found: SteeringVectors,
    prompts: list[str],
    completions: pd.DataFrame,
    groups: Behaviours | None,
    measured: Measured,
) -> dict[str, Any]:
    """Texts, rows and behaviours of the page."""
    pool: TextPool = {}
    written = _written(completions, pool)
    rows = [
        _row(found, prompts, (vector, sign, prompt), texts, measured)
        for prompt in range(len(prompts))
        for vector in range(len(found))
        for sign in (1, -1)
        # A negative without texts has no row.
        if (texts := written.get((prompts[prompt], vector, sign), {})) or sign > 0
    ]
    cards = [] if groups is None else _grouped(groups, len(found), rows, prompts, pool)
    scales = sorted({float(scale) for row in rows for scale in row["texts"]})
    return {
        "prompts": [shown(prompt) for prompt in prompts],
        "unsteered": [written.get((prompt, -1, 0), {}).get("0", []) for prompt in prompts],
        "scales": [f"{scale:g}" for scale in scales],
        "rows": rows,
        "behaviours": cards,
        "columns": [column._asdict() for column in columns_of(found, measured)],
        "history": _history(found),
        "texts": [*pool],
    }


def columns_of(found: SteeringVectors, measured: Measured) -> list[Column]:
    """The columns of numbers that hold something."""
    measure = _facts.measure_shown(found)
    costs = () if measured.side_effects is None else COSTS
    if measure is None:
        return [KL, *costs]
    label = measure["label"][:1].upper() + measure["label"][1:]
    hint = f"What the search measured of it, in {measure['unit']}"
    return [KL, Column(measure["column"], shown(label), "number", shown(hint)), *costs]


Written = dict[tuple[str, int, int], dict[str, list[int | None]]]


def _written(completions: pd.DataFrame, pool: TextPool) -> Written:
    """Numbers of texts by prompt, vector and sign, then by size of scale; samples in order."""
    written: Written = {}
    for row in greedy_first(completions).to_dict("records"):
        scale = float(row["scale"])
        is_unsteered = row["vector"] < 0
        signs = (0,) if is_unsteered else (1, -1) if scale == 0 else (1 if scale > 0 else -1,)
        text = pooled(row["completion"], pool)
        for sign in signs:
            place = written.setdefault((row["prompt"], int(row["vector"]), sign), {})
            place.setdefault("0" if is_unsteered else f"{abs(scale):g}", []).append(text)
    return written


def _row(
    found: SteeringVectors,
    prompts: list[str],
    place: tuple[int, int, int],
    texts: Mapping[str, Any],
    measured: Measured,
) -> dict[str, Any]:
    """One vector or its negative on one prompt."""
    vector, sign, prompt = place
    measure = _facts.measure_shown(found)
    values = {"kl": number(measured.kl[prompts[prompt], sign][vector])}
    row: dict[str, Any] = {"times": None}
    if measure is not None:
        reached = float(found.columns[measure["column"]][vector])
        # The search measured the vector, not its negative.
        values[measure["column"]] = number(reached) if sign > 0 else None
        random = _facts.random_median(measured.baselines, measure["column"])
        if sign > 0 and random:
            row["times"] = number(float(f"{reached / random:.2g}"))
    if measured.side_effects is not None and sign > 0:
        for name, *_ in COSTS:
            values[name] = number(float(measured.side_effects[name].iloc[vector]))
    own = numbers_of(found)[vector]
    return row | {
        # "4", "4-" for the negative, "4p2" for the second prompt.
        "key": f"{own}{'-' if sign < 0 else ''}{f'p{prompt + 1}' if prompt else ''}",
        "vector": vector,
        "number": own,
        "sign": sign,
        "prompt": prompt,
        "values": values,
        "texts": texts,
        "behaviour": None,
        "filtered": "",
        "tags": {},
        "baseline": False,
    }


def _grouped(
    groups: Behaviours,
    n_found: int,
    rows: list[dict[str, Any]],
    prompts: list[str],
    pool: TextPool,
) -> list[dict[str, Any]]:
    """The cards, of which the baseline's are last; each row is told its own.

    Vectors from `n_found` on are random ones, which have neither rows nor cards.
    """
    place = {(prompts[row["prompt"]], row["vector"], row["sign"]): row for row in rows}
    samples: dict[str | None, list[str]] = {}
    texts = greedy_first(groups.texts)
    # Places among those of one vector, scale and prompt; 0 is the greedy one.
    places = texts.groupby(["vector", "scale", "prompt"]).cumcount()
    for told, sample in zip(texts.to_dict("records"), places, strict=True):
        sign = 1 if told["scale"] > 0 else -1
        row = place.get((told["prompt"], told["vector"], sign))
        if row is None:
            continue
        key = _card_key(int(told["behaviour"]), prompts.index(told["prompt"]))
        if sample:
            samples.setdefault(key, []).append(f"{row['key']}s{sample}")
        else:
            row["behaviour"] = key
            row["filtered"] = shown(told["filtered_out"]) if told["filtered_out"] else ""
            row["tags"] = _tags(told)
            # Alike an unsteered sample alone, it may be a behaviour of its own.
            row["baseline"] = bool(told["baseline"]) and int(told["behaviour"]) <= 0
    cards = [_card(each, rows, prompts, pool) for each in groups.groups.to_dict("records")]
    for card in cards:
        card["samples"] = [] if card["rows"] else samples.get(card["key"], [])
    _add_rates(cards, groups.of_vectors, prompts, place)
    _add_controls(cards, groups.texts, n_found, prompts)
    of_rows = [card for card in cards if card["rows"]]
    return of_rows + [card for card in cards if card["samples"]]


def _card_key(behaviour: int, prompt: int) -> str | None:
    """The baseline's group has one number for all prompts; what was filtered out has no card."""
    if behaviour < 0:
        return None
    return f"b{behaviour}" + (f"p{prompt + 1}" if behaviour == 0 and prompt else "")


def _tags(told: Mapping[Any, Any]) -> dict[str, str]:
    known = {name: told.get(name) for name in TAGS}
    # "none" is the tag of a text that nobody speaks.
    return {
        name: shown(tag)
        for name, tag in known.items()
        if isinstance(tag, str) and tag not in ("", "none")
    }


def _card(
    group: Mapping[Any, Any],
    rows: Sequence[Mapping[str, Any]],
    prompts: list[str],
    pool: TextPool,
) -> dict[str, Any]:
    prompt = prompts.index(group["prompt"])
    key = _card_key(int(group["behaviour"]), prompt)
    return {
        "key": key,
        "prompt": prompt,
        "name": shown(group["name"]),
        "baseline": int(group["behaviour"]) == 0,
        "tags": _tags(group),
        "rows": [row["key"] for row in rows if row["behaviour"] == key],
        "example": pooled(group["example"], pool),
        "rates": [],
        "unsteered": None,
        "random": None,
    }


def _add_rates(
    cards: Sequence[dict[str, Any]],
    of_vectors: pd.DataFrame,
    prompts: list[str],
    place: Mapping[tuple[str, int, int], Mapping[str, Any]],
) -> None:
    """In how many samples under a vector its behaviour shows, with the interval."""
    known, sizes = {card["key"]: card for card in cards}, {}
    for told in of_vectors.to_dict("records"):
        card = known.get(_card_key(int(told["behaviour"]), prompts.index(told["prompt"])))
        row = place.get((told["prompt"], told["vector"], 1 if told["scale"] > 0 else -1))
        if row:
            sizes[row["key"]] = told["n_samples"]
        if card and row and told["n"] and told["n_samples"] > 1:
            card["rates"].append({"key": row["key"], **_counts(told["n"], told["n_samples"])})
    for card in cards:  # of vectors that show it greedily, and in no sample
        for key in sorted({*card["rows"]} - {each["key"] for each in card["rates"]}):
            if (n_samples := sizes.get(key, 0)) > 1:
                card["rates"].append({"key": key, **_counts(0, n_samples)})


def _counts(n: int, n_samples: int) -> dict[str, Any]:
    low, high = map(number, wilson_interval(n, n_samples))
    return {"n": n, "n_samples": n_samples, "rate": n / n_samples, "low": low, "high": high}


def _add_controls(
    cards: Sequence[dict[str, Any]], texts: pd.DataFrame, n_found: int, prompts: list[str]
) -> None:
    """In how many texts without a vector, and under random ones, each behaviour shows."""
    counted = sampled(texts)
    vectors = counted["vector"]
    for name, some in (
        ("unsteered", counted[vectors < 0]),
        ("random", counted[vectors >= n_found]),
    ):
        places = [prompts.index(prompt) for prompt in some["prompt"]]
        hits = Counter(map(_card_key, some["behaviour"], places))
        for card in cards:
            n, of = hits[card["key"]], places.count(card["prompt"])
            if of:
                card[name] = _counts(n, of)


def _history(found: SteeringVectors) -> list[list[float | int | str | None]]:
    """The search of each vector, thinned out for a line of a finger's width."""
    if found.history is None or not found.history.numel():
        return []
    n_steps = found.history.shape[1]
    picked = np.unique(np.linspace(0, n_steps - 1, min(n_steps, _MOST_POINTS)).round().astype(int))
    return [[number(value) for value in line] for line in found.history[:, picked].tolist()]


def measured_after(
    model: Model, found: SteeringVectors, prompts: Sequence[str], on_batch: Tell, **options: Any
) -> tuple[pd.DataFrame, Divergences]:
    """After each prompt, of vectors and negatives: the top tokens, and the KL from unsteered."""
    frames, kl, n_found = [], {}, len(found)
    # Both signs at once: the unsteered model, with which they are compared, reads the prompt once.
    both = concatenate([found, -found])
    for prompt in prompts:
        frame, far = top_tokens_and_kl(model, prompt, both, _MOST_TOKENS, **options)
        signs = [1 if vector < n_found else -1 for vector in frame["vector"]]
        frames.append(frame.assign(prompt=prompt, sign=signs, vector=frame["vector"] % n_found))
        kl[prompt, 1], kl[prompt, -1] = far[:n_found].tolist(), far[n_found:].tolist()
        on_batch(len(frames), len(prompts))
    return pd.concat(frames, ignore_index=True), kl


def tokens_data(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    top_tokens: pd.DataFrame,
    divergence: pd.DataFrame | None,
) -> dict[str, Any]:
    """The tokens of each row of the page: those that change most, and where its text parts."""
    keys = {(prompts[row["prompt"]], row["vector"], row["sign"]): row["key"] for row in rows}
    changed: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in top_tokens.to_dict("records"):
        key = keys.get((row["prompt"], row["vector"], row["sign"]))
        if key is not None:
            some = changed.setdefault(key, {"promoted": [], "suppressed": []})[row["direction"]]
            change = number(float(row["log_prob_change"]))
            some.append({"token": shown(row["token"]), "change": change})
    return {"tokens": changed, "divergence": _divergence(divergence, keys)}


def _divergence(frame: pd.DataFrame | None, keys: Keys) -> dict[str, list[dict[str, Any]]]:
    """By row, the tokens of its greedy completion with their KL from unsteered, and what else."""
    if frame is None:
        return {}
    shown_here = frame["scale"].abs() == 1
    if "sample" in frame:
        shown_here &= frame["sample"] == 0
    frame = pd.DataFrame(frame[shown_here])
    told: dict[str, list[dict[str, Any]]] = {}
    for row in frame.sort_values("position", kind="stable").to_dict("records"):
        key = keys.get((row["prompt"], int(row["vector"]), 1 if row["scale"] > 0 else -1))
        if key is not None:
            tops = likeliest(row["top"]), likeliest(row["unsteered_top"])
            words = f"KL {row['kl']:.2g} nats; steered: {tops[0]}; unsteered: {tops[1]}"
            told.setdefault(key, []).append(
                {"token": shown(row["token"]), "value": number(float(row["kl"])), "told": words}
            )
    return told


def cosines_data(cosines: Tensor | None) -> str | None:
    """A matrix of cosines in hundredths, a byte each."""
    if cosines is None:
        return None
    hundredths = (100 * cosines.clamp(-1, 1)).round().to(torch.int8).cpu().numpy()
    return b64encode(hundredths.tobytes()).decode()


def library_id(found: SteeringVectors) -> str:
    """What the browser keeps a reader's notes under."""
    return hashlib.sha256(found.vectors.contiguous().numpy().tobytes()).hexdigest()[:16]
