"""Which radius gives the best library? Distinct coherent behaviours over a sweep, and by level.

    python -m benchmarks.radius [--vectors 50] [--table | --recount]

on the bundled model. Every search is one line of benchmarks/radius.csv, written as it ends, so the
same command goes on where it was; `--recount` counts the texts beside it anew, by today's grouping.
What `auto` does was chosen on the first three prompts; the others were held out.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import tl_melbo as tm
from benchmarks.cases import Case, bundled, counted_anew, in_cell, keep_texts, of_texts
from benchmarks.tables import markdown
from tl_melbo.discovery._calibration import DEFAULT_LEVEL

KEPT = Path(__file__).with_suffix(".csv")
CHOSEN_ON = (
    "Tell me about yourself.",
    "Give me advice for a job interview.",
    "Write one sentence about the future.",
)
HELD_OUT = (
    "What is the tallest mountain in Africa?",
    "How do I make a good cup of coffee?",
    "Explain to a child why the sky is blue.",
)
PROMPTS = CHOSEN_ON + HELD_OUT
SWEEP, AUTO = {"9": 9.0, "12": 12.0, "16": 16.0, "20": 20.0, "26": 26.0}, "auto"
LEVELS = (DEFAULT_LEVEL, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vectors", default=50, type=int, metavar="N", help="of each search (50)")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--recount", action="store_true", help="count the kept texts anew")
    chosen = parser.parse_args()
    case = bundled()
    if chosen.recount:
        counted_anew(KEPT, "at", {"bundled": lambda: case}).to_csv(KEPT, index=False)
    elif not chosen.table:
        for prompt in PROMPTS:
            fill(case, prompt, chosen.vectors)
    rows = pd.read_csv(KEPT)
    print(markdown(table(rows)))
    for prompt in PROMPTS:
        f = tm.ActivationMap.from_prompts(case.model, prompt, *case.layers, chat=case.chat)
        picked = [(level, tm.calibrate_radius(f, level=level)) for level in LEVELS]
        told = [told_level(rows[rows["prompt"] == prompt], *each) for each in picked]
        print(f"{prompt!r}: {'; '.join(told)}")


def fill(case: Case, prompt: str, n_vectors: int) -> None:
    """The searches of a prompt that are not in the file yet."""
    _, done = in_cell(KEPT, "at", "bundled", prompt, 0)
    f = tm.ActivationMap.from_prompts(case.model, prompt, *case.layers, chat=case.chat)
    options = {"max_new_tokens": case.n_tokens, "chat": case.chat}
    for at, radius in {**SWEEP, AUTO: None}.items():
        if at in done:
            continue
        radius = tm.calibrate_radius(f) if radius is None else radius
        found = tm.melbo(f, n_vectors, radius=radius)
        unsteered, texts = (tm.generate(case.model, prompt, v, **options) for v in (None, found))
        place: dict[str, Any] = {"model": "bundled", "prompt": prompt, "seed": 0, "at": at}
        kl = float(tm.analysis.kl_divergence(case.model, prompt, found).median())
        facts = {"vectors": n_vectors, "radius": radius, "median KL": round(kl, 2)}
        row = place | facts | of_texts(case, unsteered, texts)
        keep_texts(KEPT, place, pd.concat([unsteered, texts]))
        pd.DataFrame([row]).to_csv(KEPT, mode="a", header=not KEPT.is_file(), index=False)
        print(row, flush=True)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Distinct behaviours, and in brackets the share of texts that hold together."""
    share = rows["coherent"] / rows["vectors"]
    told = [f"{n} ({part:.0%})" for n, part in zip(rows["distinct"], share, strict=True)]
    wide = rows.assign(told=told).pivot_table("told", "prompt", "at", aggfunc="first")
    return wide.loc[[*PROMPTS], [*SWEEP, AUTO]].reset_index()


def told_level(rows: pd.DataFrame, level: float, radius: float) -> str:
    """What a level picks, how far that is from the sweep's best, and what its neighbours found."""
    sweep = rows[rows["at"] != AUTO].sort_values("radius")
    best = sweep.loc[sweep["distinct"].idxmax(), "radius"]
    between = np.interp(radius, sweep["radius"], sweep["distinct"])
    factor = max(radius / best, best / radius)
    return (
        f"{level:g} picks {radius:g}, {factor:.2f} from the best {best:g}, {between:.0f} distinct"
    )


if __name__ == "__main__":
    main()
