"""How many gradients should a vector get? Judged by what is found, not by how high it climbs.

    python -m benchmarks.convergence [--other MODEL] [--seeds 3] [--only NAME] [--table | --recount]

Every search is one line of benchmarks/convergence.csv, written as the search ends, so the same
command goes on where it was. A (seed, prompt, model) cell is whole before the next one begins. Each
number of gradients is a search of its own: an orthogonal search depends on its earlier vectors.
The texts stand beside it, and `--recount` counts them anew, by today's grouping.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

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
    other,
    planted,
    told_hits,
)
from benchmarks.tables import markdown
from tl_melbo.discovery import _sphere
from tl_melbo.geometry import random_sphere

KEPT = Path(__file__).with_suffix(".csv")
# Gradients a vector; or at most so many, until a step climbs by less than a share of the objective.
STEPS, MOST_STEPS = {"5": 5, "10": 10, "20": 20, "40": 40}, 40
GAINS = {"stop at 5%": 0.05, "stop at 1%": 0.01}
RANDOM, REFERENCE = "random", "10"
RULES = (REFERENCE, "40", "stop at 5%", RANDOM, "20", "5")
# Nearly as long as 40, so it is run when all else is there.
LATER = ("stop at 1%",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--other", help="a third model: a hub id, a folder, or a .gguf file")
    parser.add_argument("--seeds", default=3, type=int, metavar="N", help="seeds 0 to N - 1 (3)")
    parser.add_argument("--only", metavar="NAME", help="search this model's cells alone")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--recount", action="store_true", help="count the kept texts anew")
    chosen = parser.parse_args()
    cases = {"bundled": bundled, "planted": planted}
    if chosen.other:
        cases[Path(chosen.other).stem] = functools.partial(other, chosen.other)
    cases = {name: functools.cache(load) for name, load in cases.items()}
    if chosen.only not in (None, *cases):
        parser.error(f"--only {chosen.only}: one of {', '.join(cases)}")
    if chosen.recount:
        counted_anew(KEPT, "rule", cases).to_csv(KEPT, index=False)
    elif not chosen.table:
        searched_now = [name for name in cases if chosen.only in (None, name)]
        for rules in (RULES, LATER):
            for seed, prompt, name in itertools.product(range(chosen.seeds), PROMPTS, searched_now):
                fill_cell(name, cases[name], prompt, seed, rules)
    rows = complete(pd.read_csv(KEPT))
    for name, some in rows.groupby("model", sort=False):
        print(f"\n{name}\n\n{markdown(table(some))}")
    print(f"\ntogether\n\n{markdown(table(rows))}")


def fill_cell(
    name: str, load: Callable[[], Case], prompt: str, seed: int, rules: tuple[str, ...]
) -> None:
    """Run the searches of a cell that are not in the file yet, and add a line for each."""
    here, done = in_cell(KEPT, "rule", name, prompt, seed)
    if {*rules} <= {*done}:
        return
    case = load()
    f = tm.ActivationMap.from_prompts(case.model, prompt, *case.layers, chat=case.chat)
    # Once for a model and prompt: what differs is to be the number of gradients alone.
    radius = tm.calibrate_radius(f) if here.empty else float(here["radius"].iloc[0])
    options = {"max_new_tokens": case.n_tokens, "chat": case.chat}
    unsteered = tm.generate(case.model, prompt, **options)
    for rule in rules:
        if rule in done:
            continue
        began = time.monotonic()
        found = searched(f, case, rule, radius, seed, PROMPTS.index(prompt))
        seconds = time.monotonic() - began
        texts = tm.generate(case.model, prompt, found, **options)
        place = {"model": name, "prompt": prompt, "seed": seed, "rule": rule}
        facts = {"vectors": case.n_vectors, "radius": radius, "seconds": round(seconds, 1)}
        row = place | facts | of_search(f, case, found) | of_texts(case, unsteered, texts)
        keep_texts(KEPT, place, pd.concat([unsteered, texts]))
        pd.DataFrame([row]).to_csv(KEPT, mode="a", header=not KEPT.is_file(), index=False)
        print(row, flush=True)


def searched(
    f: tm.ActivationMap, case: Case, rule: str, radius: float, seed: int, prompt_number: int
) -> tm.SteeringVectors:
    if rule == RANDOM:
        # Others for every prompt, too: added up, they are to be that many vectors.
        generator = torch.Generator().manual_seed(1000 * prompt_number + seed)
        theta = random_sphere(case.n_vectors, f.d_model, radius, generator=generator)
        return tm.SteeringVectors(theta, {"source_layer": case.layers[0], "chat": case.chat})
    settings: dict[str, Any] = {"radius": radius, "q": case.q, "seed": seed}
    if rule in STEPS:
        return tm.melbo(f, case.n_vectors, steps=STEPS[rule], **settings)
    with stopping_on_gain(GAINS[rule]) as on_step:
        return tm.melbo(f, case.n_vectors, steps=MOST_STEPS, on_step=on_step, **settings)


@contextmanager
def stopping_on_gain(smallest: float) -> Iterator[Callable[[Any], None]]:
    """Let a search of one vector at a time end each of them at its first small gain.

    The search has no such option. It ends a vector whose gradient is within an angle of it; here
    that angle is opened once the gain is small. A step that was taken back (gain 0) is none.
    """
    module: Any = _sphere
    usual, last = module._CONVERGED_ANGLE, 0.0

    def on_step(step: Any) -> None:
        nonlocal last
        value = float(step.objective[0])
        is_small = step.step > 1 and last < value < last * (1 + smallest)
        module._CONVERGED_ANGLE = float("inf") if is_small else usual
        last = value

    try:
        yield on_step
    finally:
        module._CONVERGED_ANGLE = usual


def of_search(f: tm.ActivationMap, case: Case, found: tm.SteeringVectors) -> dict[str, Any]:
    with torch.no_grad():
        effects = [f.delta(some, positions=LAST_THREE) for some in found.vectors.split(8)]
    objective = torch.cat([tm.melbo_objective(effect, 2, case.q) for effect in effects])
    none = torch.zeros(len(found))  # random vectors take no steps
    gains, gradients = found.columns.get("gain", none), found.columns.get("evaluations", none)
    return {
        "objective": float(f"{float(objective.mean()):.5g}"),
        "gradients": float(gradients.sum()),
        **{f"gaining over {share:.0%}": int((gains > share).sum()) for share in GAINS.values()},
    }


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The cells in which all of `RULES` were run: others would unbalance the table."""
    is_due = rows["rule"].isin(RULES)
    n_rules = rows["rule"].where(is_due).groupby([rows[name] for name in CELL]).transform("nunique")
    return rows[n_rules == len(RULES)]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a rule: means over its searches, beside those of 10 gradients in the same cells."""
    by_rule: Any = {rule: some.set_index(CELL) for rule, some in rows.groupby("rule")}
    usual = by_rule[REFERENCE]
    order = [rule for rule in (RANDOM, *STEPS, *GAINS) if rule in by_rule]
    return pd.DataFrame([line(rule, by_rule[rule], usual) for rule in order])


def line(rule: str, some: pd.DataFrame, usual: pd.DataFrame) -> dict[str, str]:
    usual, n = usual.loc[some.index], int(some["vectors"].sum())
    height = np.log(some["objective"].astype(float) / usual["objective"].astype(float))
    told = {
        "rule": rule,
        "searches": str(len(some)),
        "gradients a vector": f"{some['gradients'].sum() / n:.1f}",
        "objective / that of 10": f"{np.exp(height.mean()):.2f}",
        "last gain over 5%, 1%": ", ".join(
            f"{some[f'gaining over {share:.0%}'].sum() / n:.0%}" for share in GAINS.values()
        ),
        "coherent": f"{some['coherent'].sum() / n:.0%}",
        "distinct a search": interval(some["distinct"]),
        "minus those of 10": interval(some["distinct"] - usual["distinct"]),
        "distinct a 100 gradients": "–",
    }
    if gradients := some["gradients"].sum():
        told["distinct a 100 gradients"] = f"{100 * some['distinct'].sum() / gradients:.1f}"
    return told | told_hits(some)


if __name__ == "__main__":
    main()
