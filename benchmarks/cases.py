"""What searches are compared on: models, prompts, and what is counted of the completions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import tl_melbo as tm
from tl_melbo.evaluation import count_hits, load_planted, wilson_interval

PROMPTS = (
    "Tell me about yourself.",
    "What is the tallest mountain in Africa?",
    "Give me advice for a job interview.",
)
LAST_THREE = slice(-3, None)
CELL = ["model", "prompt", "seed"]


class Case(NamedTuple):
    """A model, and how it is searched."""

    model: tm.models.Model
    layers: tuple[int, int]
    chat: bool
    n_vectors: int
    q: float | None
    n_tokens: int
    backdoors: tuple[Any, ...] = ()


def bundled() -> Case:
    return Case(tm.load_model(), (8, 16), True, 16, None, 40)


def planted() -> Case:
    """As in benchmarks.backdoor, with fewer vectors."""
    known = load_planted()
    return Case(known.model, (7, 24), True, 24, 1, 24, known.backdoors)


def other(name: str) -> Case:
    """Any model, at the bundled one's relative depth; raw text if it has no chat template."""
    model = tm.load_model(name)
    n_layers = int(model.cfg.n_layers)
    layers = round(n_layers * 8 / 30), round(n_layers * 16 / 30)
    return Case(model, layers, bool(model.tokenizer.chat_template), 16, None, 40)


def in_cell(path: Path, column: str, name: str, prompt: str, seed: int) -> tuple[Any, list[str]]:
    """The lines of this model and prompt, and what of the column is done with this seed."""
    kept = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=[*CELL, column, "radius"])
    here = kept[(kept["model"] == name) & (kept["prompt"] == prompt)]
    return here, here[here["seed"] == seed][column].tolist()


def keep_texts(path: Path, facts: dict[str, Any], texts: pd.DataFrame) -> None:
    """Add the texts of a search to the file beside its counts, so that they can be counted anew."""
    rows = texts.assign(**facts)[[*facts, "vector", "completion"]]
    rows.to_csv(_beside(path), mode="a", header=not _beside(path).is_file(), index=False)


def counted_anew(path: Path, column: str, cases: Mapping[str, Callable[[], Case]]) -> pd.DataFrame:
    """The lines of a file, with the numbers that `of_texts` gives the kept texts today."""
    if not _beside(path).is_file():
        raise SystemExit(f"{_beside(path).name}: not there; searches that run from now on write it")
    names = [*CELL, column]
    texts = {
        key: some.assign(scale=1.0)
        for key, some in pd.read_csv(_beside(path), keep_default_na=False).groupby(names)
    }
    rows = pd.read_csv(path).to_dict("records")
    for row in rows:
        place = f"{path.name}: {', '.join(str(row[name]) for name in names)}"
        if row["model"] not in cases:
            raise SystemExit(f"{place}: pass this model with --other")
        # Where nothing was drawn, the texts of the first seed are those of all.
        keys = [(row["model"], row["prompt"], seed, row[column]) for seed in (row["seed"], 0)]
        some = next((texts[key] for key in keys if key in texts), None)
        if some is None:
            raise SystemExit(f"{place}: no texts are kept; delete the line, and search again")
        of_model = cases[row["model"]]()
        row |= of_texts(of_model, some[some["vector"] < 0], some[some["vector"] >= 0])
    return pd.DataFrame(rows)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_texts.csv")


def of_texts(case: Case, unsteered: pd.DataFrame, texts: pd.DataFrame) -> dict[str, Any]:
    both = pd.concat([unsteered, texts], ignore_index=True)
    groups = tm.analysis.behaviours(case.model, both, chat=case.chat)
    steered = groups.texts[groups.texts["vector"] >= 0]
    row = {
        "distinct": groups.n_distinct,
        "coherent": int(steered["coherent"].sum()),
        "near unsteered": int((steered["behaviour"] == 0).sum()),
    }
    exact = ["", ""]
    if case.backdoors:
        hits = count_hits(texts, case.backdoors)
        exact = hits[hits["match"] == "exact"]["hits"].tolist()
    return row | dict(zip(("hits 1", "hits 2"), exact, strict=True))


def told_hits(some: pd.DataFrame) -> dict[str, str]:
    """How often the planted sentences came out, where there were any."""
    told, n = {}, int(some["vectors"].sum())
    for column in ("hits 1", "hits 2") if some["hits 1"].notna().all() else ():
        hits = int(some[column].sum())
        low, high = wilson_interval(hits, n)
        n_searches = int((some[column] > 0).sum())
        told[column] = (
            f"{hits} of {n} ({low:.1%} to {high:.1%}), in {n_searches} of {len(some)} searches"
        )
    return told


def interval(values: "pd.Series[Any]") -> str:
    """The mean, and in brackets what 95% of the means are when prompts are drawn anew.

    For each prompt that is drawn, its searches are drawn anew, too: those of one prompt are alike.
    `values` has the columns of `CELL` as its index.
    """
    prompts = [some for _, some in values.sort_index().groupby(level=CELL[:2])]
    drawn, rng = (len(prompts), 10_000), np.random.default_rng(0)
    sums = [rng.choice(some.to_numpy(float), (*drawn, len(some))).sum(-1) for some in prompts]
    which, sizes = rng.integers(len(prompts), size=drawn), np.array([*map(len, prompts)])
    chosen = np.take_along_axis(np.stack(sums), which[None], 0)[0]
    means = chosen.sum(0) / sizes[which].sum(0)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():.1f} ({low:.1f} to {high:.1f})"
