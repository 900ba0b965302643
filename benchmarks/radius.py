"""Which radius gives the best library? Distinct coherent behaviours over a sweep, and by criterion.

    python -m benchmarks.radius [--vectors 50] [--prompts 3]

on the embedded model; every search is kept in runs/radius as it ends.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

import tl_melbo as tm
from benchmarks.tables import markdown
from tl_melbo.analysis.behaviours import (
    DEFAULT_DISTANCES,
    DEFAULT_PERPLEXITY,
    DEFAULT_REPETITION,
)
from tl_melbo.discovery.melbo import DEFAULT_STEPS
from tl_melbo.files import replacing

KEPT = Path("runs/radius")
PROMPTS = (
    "Tell me about yourself.",
    "Give me advice for a job interview.",
    "Write one sentence about the future.",
)
SWEEP = (6.0, 9.0, 12.0, 16.0, 20.0, 26.0)
CRITERIA: dict[str, dict[str, Any]] = {
    "nonlinearity 0.4": {"criterion": "nonlinearity", "level": 0.4},
    "nonlinearity 0.5": {"criterion": "nonlinearity", "level": 0.5},
    "divergence 0.05": {"criterion": "divergence", "level": 0.05},
    "divergence 0.1": {"criterion": "divergence", "level": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vectors", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    chosen = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    model = tm.load_model()
    rows = []
    for prompt in PROMPTS[: chosen.prompts]:
        f = tm.ActivationMap.from_prompts(model, prompt, chat=True)
        radii = {name: tm.calibrate_radius(f, **which) for name, which in CRITERIA.items()}
        for radius in SWEEP:
            rows.append(library(f, radius, chosen.vectors) | {"chosen by": "sweep"})
        for name, radius in radii.items():
            rows.append(library(f, radius, chosen.vectors) | {"chosen by": name})
    frame = pd.DataFrame(rows)
    print(markdown(frame))
    # "auto" is held to a factor of 1.5 from the sweep's best radius.
    for prompt, some in frame.groupby("prompt", sort=False):
        sweep = some[some["chosen by"] == "sweep"]
        best = sweep.loc[sweep["distinct"].idxmax(), "radius"]
        ratios = {
            name: round(max(radius / best, best / radius), 2)
            for name, radius in zip(some["chosen by"], some["radius"], strict=True)
            if name != "sweep"
        }
        print(f"{prompt!r}: best of the sweep {best:g}; factors from it {ratios}")


def library(f: tm.ActivationMap, radius: float, n_vectors: int) -> dict[str, Any]:
    """One search's texts, grouped; kept on disk, and read from there the next time."""
    # What the number hangs on, too: with other thresholds it is another number.
    cuts = (DEFAULT_DISTANCES, DEFAULT_PERPLEXITY, DEFAULT_REPETITION, DEFAULT_STEPS["ascent"])
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
        groups = tm.analysis.behaviours(model, texts)
        steered = groups.texts[groups.texts["vector"] >= 0]
        row = {
            "prompt": prompt,
            "radius": radius,
            "median KL (nats)": round(float(f.divergence(found.vectors).median()), 2),
            "coherent": f"{steered['coherent'].mean():.0%}",
            "as unsteered": f"{(steered['behaviour'] == 0).mean():.0%}",
            "distinct": groups.n_distinct,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(row))
        print(row, flush=True)
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
