"""Do higher orders of deep causal transcoding find more? Beside MELBO and random vectors.

    python -m benchmarks.transcoding [--seeds 3] [--table | --recount]

Every search is one line of benchmarks/transcoding.csv, written as the search ends, so the same
command goes on where it was; its texts are in transcoding_texts.csv, and can be counted anew. All
methods search one map at one radius, and give as many vectors.
"""

import argparse
import functools
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import tl_melbo as tm
from benchmarks.cases import (
    CELL,
    LAST_THREE,
    PROMPTS,
    Case,
    bundled,
    counted_anew,
    in_cell,
    interval,
    keep_texts,
    of_texts,
    planted,
    told_hits,
)
from benchmarks.tables import markdown

KEPT = Path(__file__).with_suffix(".csv")
N_VECTORS, STEPS = 16, {"quadratic": 20, "exponential": 30, "linear": 1}
SIGMA = {"linear": lambda z: z, "quadratic": torch.square, "exponential": torch.expm1}
METHODS = ("random", "melbo", "exponential", "linear", "quadratic")
# After the others.
LATER = "soft"
CONTRASTS = (
    ("exponential", "linear"), ("quadratic", "linear"), ("melbo", "exponential"),
    (LATER, "exponential"), ("exponential", "random"),
)  # fmt: skip
KEY = [*CELL, "method"]
# Nothing in it is drawn: its line is copied from the first seed's.
UNSEEDED = "linear"
# Vectors on the sphere that no method has seen: how well does a model of the effect predict theirs?
N_HELD_OUT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", default=3, type=int, metavar="N", help="seeds 0 to N - 1 (3)")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--recount", action="store_true", help="count in the kept texts anew")
    chosen = parser.parse_args()
    cases = {"bundled": functools.cache(bundled), "planted": functools.cache(planted)}
    if chosen.recount:
        counted_anew(KEPT, "method", cases).to_csv(KEPT, index=False)
    parts = [(METHODS, "bundled"), ((LATER,), "bundled"), (METHODS, "planted")]
    for methods, name in () if chosen.table or chosen.recount else parts:
        for seed, prompt in itertools.product(range(chosen.seeds), PROMPTS):
            fill_cell(name, cases[name], prompt, seed, methods)
    # Cells in which a method lacks would unbalance the table.
    rows = pd.read_csv(KEPT).groupby(CELL).filter(lambda some: {*METHODS} <= {*some["method"]})
    for name, some in rows.groupby("model", sort=False):
        print(f"\n{name}\n\n{markdown(table(some))}\n\n{markdown(contrasts(some))}")


def fill_cell(name: str, load: Any, prompt: str, seed: int, methods: tuple[str, ...]) -> None:
    """Run the searches of a cell that are not in the file yet, and add a line for each."""
    here, done = in_cell(KEPT, "method", name, prompt, seed)
    if {*methods} <= {*done}:
        return
    case = load()
    f = tm.ActivationMap.from_prompts(case.model, prompt, *case.layers, chat=case.chat)
    radius = float(here["radius"].iloc[0]) if len(here) else tm.calibrate_radius(f)
    options = {"max_new_tokens": case.n_tokens, "chat": case.chat}
    unsteered = tm.generate(case.model, prompt, **options)
    for method in methods:
        if method in done:
            continue
        if method == UNSEEDED and seed:
            row = here[(here["method"] == method) & (here["seed"] == 0)].assign(seed=seed)
            row.to_csv(KEPT, mode="a", header=False, index=False)
            continue
        began = time.process_time()
        found = searched(f, case, method, radius, seed)
        cpu_seconds = round(time.process_time() - began, 1)
        place = {"model": name, "prompt": prompt, "seed": seed, "method": method}
        texts = tm.generate(case.model, prompt, found, **options)
        facts = {**place, "vectors": len(found), "radius": radius, "cpu_seconds": cpu_seconds}
        row = facts | of_vectors(f, case, method, found, radius) | of_texts(case, unsteered, texts)
        keep_texts(KEPT, place, pd.concat([unsteered, texts]))
        pd.DataFrame([row]).to_csv(KEPT, mode="a", header=not KEPT.is_file(), index=False)
        print(row, flush=True)


def searched(
    f: tm.ActivationMap, case: Case, method: str, radius: float, seed: int
) -> tm.SteeringVectors:
    if method == "random":
        return tm.random_vectors(f, N_VECTORS, radius, seed=seed)
    if method == "melbo":
        return tm.melbo(f, N_VECTORS, radius, q=case.q, seed=seed)
    kind: dict[str, Any] = {"order": method}
    if method == "soft":
        kind = {"order": "exponential", "orthogonal": "soft"}
    return tm.dct(f, N_VECTORS, radius=radius, steps=STEPS[kind["order"]], seed=seed, **kind)


@torch.no_grad()
def of_vectors(
    f: tm.ActivationMap, case: Case, method: str, found: tm.SteeringVectors, radius: float
) -> dict[str, Any]:
    deltas = torch.cat([f.delta(some, positions=LAST_THREE) for some in found.vectors.split(8)])
    height = tm.melbo_objective(deltas, 2, case.q)
    row = {
        "objective": float(f"{float(height.mean()):.5g}"),
        "effect": float(f"{float(mean_effect(f, found.vectors).norm(dim=-1).mean()):.5g}"),
        "predicted": "",
    }
    if "output" in found.columns:
        unseen = tm.random_vectors(f, N_HELD_OUT, radius, seed=1000).vectors
        row["predicted"] = round(predicted(found, mean_effect(f, unseen), unseen, radius), 4)
    return row


def mean_effect(f: tm.ActivationMap, vectors: Tensor) -> Tensor:
    """Over prompts and the last three positions, [vector, d_model]."""
    count = int(f.position_mask(LAST_THREE).sum())
    parts = [f.delta(some, positions=LAST_THREE).sum((1, 2)) / count for some in vectors.split(8)]
    return torch.cat(parts).double()


def predicted(found: tm.SteeringVectors, effects: Tensor, vectors: Tensor, radius: float) -> float:
    """The share of the effects' squared norm that the sum of factors predicts."""
    factors = (found.vectors / found.norms[:, None]).double()
    sigma = SIGMA[found.story["hyperparameters"]["order"]]
    responses = sigma(vectors.double() @ factors.T / radius)
    modelled = (responses * found.columns["importance"].double()) @ found.columns["output"].double()
    return 1 - float((effects - modelled).square().sum() / effects.square().sum())


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a method: means over its searches, beside random and linear in the same cells."""
    by_method: Any = {name: some.set_index(CELL) for name, some in rows.groupby("method")}
    others = by_method["random"], by_method["linear"]
    return pd.DataFrame(
        [line(name, by_method[name], *others) for name in (*METHODS, LATER) if name in by_method]
    )


def contrasts(rows: pd.DataFrame) -> pd.DataFrame:
    """Differences in distinct behaviours a hundred vectors, of the same searches."""
    found = (100 * rows["distinct"] / rows["vectors"]).groupby([rows[name] for name in KEY]).first()
    by_method: Any = found.unstack()
    lines = []
    for method, other in CONTRASTS:
        if method not in by_method:
            continue
        more = (by_method[method] - by_method[other]).dropna()
        each = more.groupby(level="prompt", sort=False).mean()
        lines.append(
            {
                "of the same searches": f"{method} - {other}",
                "difference a hundred vectors": interval(more),
                "of each prompt": ", ".join(f"{value:.1f}" for value in each),
                "more, equal, fewer": ", ".join(
                    str(int((np.sign(more) == sign).sum())) for sign in (1, 0, -1)
                ),
            }
        )
    return pd.DataFrame(lines)


def line(
    method: str, some: pd.DataFrame, random: pd.DataFrame, linear: pd.DataFrame
) -> dict[str, str]:
    n, hundred = int(some["vectors"].sum()), 100 / some["vectors"]
    random, linear = random.reindex(some.index), linear.reindex(some.index)
    effect = np.log(some["effect"].astype(float) / random["effect"].astype(float))
    objective = np.log(some["objective"].astype(float) / random["objective"].astype(float))
    known = some["predicted"].notna().all()
    return {
        "method": method,
        "searches": str(len(some)),
        "CPU seconds": f"{some['cpu_seconds'].mean():.0f}",
        "objective / random's": f"{np.exp(objective.mean()):.1f}",
        "mean effect / random's": f"{np.exp(effect.mean()):.2f}",
        "predicted": f"{some['predicted'].astype(float).mean():.1%}" if known else "–",
        "coherent": f"{some['coherent'].sum() / n:.0%}",
        "distinct per 100": interval(hundred * some["distinct"]),
        "minus random's": interval(hundred * (some["distinct"] - random["distinct"])),
        "minus linear's": interval(hundred * (some["distinct"] - linear["distinct"]).dropna()),
        **told_hits(some),
    }


if __name__ == "__main__":
    main()
