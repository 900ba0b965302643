"""Which radius gives the best library? Distinct coherent behaviours over a sweep, and by level.

    python -m benchmarks.radius [--vectors 50] [--prompts 6]

on the embedded model; every search is kept in runs/radius as it ends. What `auto` does was chosen
on the first three prompts; the others were held out.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import tl_melbo as tm
from benchmarks.tables import markdown
from tl_melbo.analysis._behaviours import DEFAULT_DISTANCES
from tl_melbo.analysis._coherence import (
    COHERENCE_OF_SHORT,
    DEFAULT_PERPLEXITY,
    DEFAULT_REPETITION,
)
from tl_melbo.analysis._embedding import default_embedder
from tl_melbo.discovery._calibration import DEFAULT_LEVEL
from tl_melbo.discovery._melbo import DEFAULT_STEPS
from tl_melbo.files import replacing

KEPT = Path("runs/radius")
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
SWEEP = (9.0, 12.0, 16.0, 20.0, 26.0)
AUTO = f"nonlinearity {DEFAULT_LEVEL:g}"
CRITERIA: dict[str, dict[str, Any]] = {
    AUTO: {},
    "nonlinearity 0.5": {"level": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    counted = {"type": int, "metavar": "N"}
    parser.add_argument("--vectors", default=50, **counted, help="of each search (50)")
    parser.add_argument("--prompts", default=len(PROMPTS), **counted, help="the first N of 6 (6)")
    chosen = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    model = tm.load_model()
    rows = []
    for prompt in PROMPTS[: chosen.prompts]:
        f = tm.ActivationMap.from_prompts(model, prompt, chat=True)
        radii = {name: tm.calibrate_radius(f, **which) for name, which in CRITERIA.items()}
        for radius in SWEEP:
            rows.append(library(f, radius, chosen.vectors) | {"chosen by": "sweep"})
        rows.append(library(f, radii[AUTO], chosen.vectors) | {"chosen by": "auto"})
        # "auto" is held to a factor of 1.5 from the sweep's best radius.
        sweep = [row for row in rows if row["prompt"] == prompt and row["chosen by"] == "sweep"]
        best = max(sweep, key=lambda row: row["distinct"])["radius"]
        curve = [row["radius"] for row in sweep], [row["distinct"] for row in sweep]
        factors = [
            f"{name}: {radius:g}, a factor of {max(radius / best, best / radius):.2f}, "
            f"{np.interp(radius, *curve):.0f} distinct between its neighbours"
            for name, radius in radii.items()
        ]
        print(f"{prompt!r}: best of the sweep {best:g}; {'; '.join(factors)}", flush=True)
    print(markdown(pd.DataFrame(rows)))


def library(f: tm.ActivationMap, radius: float, n_vectors: int) -> dict[str, Any]:
    """One search's texts, grouped; kept on disk, and read from there the next time."""
    # What the number hangs on, too: with other thresholds it is another number.
    rules = (DEFAULT_DISTANCES, DEFAULT_PERPLEXITY, DEFAULT_REPETITION, COHERENCE_OF_SHORT)
    cuts = (rules, default_embedder(), DEFAULT_STEPS["ascent"])
    mark = hashlib.sha256(repr(cuts).encode()).hexdigest()[:8]
    path = KEPT / f"{PROMPTS.index(f.prompts[0])}-{radius:g}-{n_vectors}-{mark}.json"
    if not path.is_file():
        prompt, model = f.prompts[0], f.model
        found = tm.melbo(f, n_vectors, radius=radius)
        texts = pd.concat(
            [
                tm.generate(model, prompt, max_new_tokens=40, chat=True),
                tm.generate(model, prompt, found, max_new_tokens=40),
            ]
        )
        # Kept, so that they can be counted anew when the grouping changes.
        texts.to_csv(path.with_suffix(".csv"), index=False)
        groups = tm.analysis.behaviours(model, texts)
        steered = groups.texts[groups.texts["vector"] >= 0]
        kl = tm.analysis.kl_divergence(model, prompt, found)
        row = {
            "prompt": prompt,
            "radius": radius,
            "median KL (nats)": round(float(kl.median()), 2),
            "coherent": f"{steered['coherent'].mean():.0%}",
            "near unsteered": f"{(steered['behaviour'] == 0).mean():.0%}",
            "distinct": groups.n_distinct,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(row))
        print(row, flush=True)
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
