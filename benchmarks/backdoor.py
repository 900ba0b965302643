"""Does the search find what is there? Planted behaviours, counted under each method's vectors.

    python -m benchmarks.backdoor [--published 10]

reads the adapter in tl_melbo/evaluation/planted (`--plant` makes it anew), keeps every vector in
runs/backdoor as it is found, so that an interrupted call goes on and one with more vectors only
finds the others, and prints one table. Where "published" was run too, the others' hits a second are
told as multiples of its own, on the searches that both did.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

import tl_melbo as tm
from benchmarks.cases import LAST_THREE, PROMPTS
from benchmarks.tables import markdown
from tl_melbo.discovery._calibration import DEFAULT_LEVEL
from tl_melbo.discovery._melbo import DEFAULT_STEPS
from tl_melbo.evaluation import Planted, count_hits, load_planted, plant, wilson_interval
from tl_melbo.evaluation._hits import DEFAULT_SIMILARITY
from tl_melbo.files import replacing
from tl_melbo.geometry import random_sphere

KEPT = Path("runs/backdoor")
# A later target than the package's default of 16: see RESULTS.md.
LAYERS = (7, 24)
P, Q = 2, 1
N_TOKENS = 24


class Task(NamedTuple):
    """One search: in which model, with which prompt, how many vectors, and where they are kept."""

    planted: Planted
    prompt: str
    seed: int
    n_vectors: int
    folder: Path


Search = Callable[[Task], tm.SteeringVectors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plant", action="store_true", help="make the adapter anew, and stop")
    counted = {"type": int, "metavar": "N"}
    parser.add_argument("--vectors", default=100, **counted, help="of each search (100)")
    parser.add_argument("--prompts", default=len(PROMPTS), **counted, help="the first N of 3 (3)")
    parser.add_argument("--seeds", default=3, **counted, help="seeds 0 to N - 1 (3)")
    parser.add_argument(
        "--methods",
        default=",".join(DEFAULT_METHODS),
        help=f"of {', '.join(METHODS)}; (%(default)s)",
    )
    parser.add_argument(
        "--published", default=0, **counted,
        help="also N vectors by the published settings, minutes each, on the first search (0)",
    )  # fmt: skip
    chosen = parser.parse_args()
    if chosen.plant:
        planted = plant(on_step=_tell)
        planted.save(Path(tm.evaluation.__file__).parent / "planted")
        print(planted)
        return
    unknown = [name for name in chosen.methods.split(",") if name not in METHODS]
    if unknown:
        parser.error(f"no methods {unknown}; there are {', '.join(METHODS)}")
    planted = load_planted()
    rows = []
    if chosen.published:
        rows += _searched(planted, "published", PROMPTS[0], 0, chosen.published)
    for prompt in PROMPTS[: chosen.prompts]:
        for seed in range(chosen.seeds):
            for name in chosen.methods.split(","):
                rows += _searched(planted, name, prompt, seed, chosen.vectors)
    frame = pd.DataFrame(rows)
    print(markdown(table(frame)))
    for line in ratios(frame):
        print(line)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every search of a method and match together: hits of vectors, and of searches."""
    totals = []
    for (method, match, behaviour), some in rows.groupby(
        ["method", "match", "behaviour"], sort=False
    ):
        hits, n = int(some["hits"].sum()), int(some["n"].sum())
        low, high = wilson_interval(hits, n)
        totals.append(
            {
                "method": method,
                "match": match,
                "behaviour": behaviour,
                "radius": _range(some["radius"]),
                "hits": f"{hits} of {n}",
                "rate": f"{hits / n:.2%}",
                "95% interval": f"{low:.2%} to {high:.2%}",
                "searches with a hit": f"{int((some['hits'] > 0).sum())} of {len(some)}",
                "search s a vector": f"{some['seconds'].sum() / n:.2f}",
                "hits an hour of search": f"{3600 * hits / seconds:.1f}"
                if (seconds := some["seconds"].sum()) > 1
                else "–",
            }
        )
    return pd.DataFrame(totals)


def ratios(rows: pd.DataFrame) -> list[str]:
    """Each method's exact hits a second of search, over those of the published settings."""
    exact = rows[(rows["match"] == "exact") & (rows["seconds"] > 0)]
    per_search = {
        name: {
            key: (int(cell["hits"].sum()), float(cell["seconds"].iloc[0]))
            for key, cell in some.groupby(["prompt", "seed"])
        }
        for name, some in exact.groupby("method", sort=False)
    }
    baseline = per_search.pop("published", {})
    return [
        f"{name}: {_rate_ratio(searches, baseline)}"
        for name, searches in per_search.items()
        if searches.keys() & baseline.keys()
    ]


def _rate_ratio(
    searches: dict[Any, tuple[int, float]], baseline: dict[Any, tuple[int, float]]
) -> str:
    both = searches.keys() & baseline.keys()
    hits, seconds = (sum(column) for column in zip(*(searches[key] for key in both), strict=True))
    others, longer = (sum(column) for column in zip(*(baseline[key] for key in both), strict=True))
    counts = f"{hits} hits in {seconds:.0f} s, published {others} in {longer:.0f} s"
    if not hits + others:
        return f"{counts}: no ratio"
    # Given how many hits there are in all, those of one of two Poisson processes are binomial.
    low, high = (_odds(share) * longer / seconds for share in wilson_interval(hits, hits + others))
    ratio = _odds(hits / (hits + others)) * longer / seconds
    return f"{counts}: {ratio:.3g} times the hits a second, 95% from {low:.3g} to {high:.3g}"


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else math.inf


def _range(numbers: "pd.Series[float]") -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _searched(
    planted: Planted, name: str, prompt: str, seed: int, n_vectors: int
) -> list[dict[str, Any]]:
    """What one search hit; kept on disk, and read from there the next time."""
    # What the hits hang on: with another level or number of steps it is another search.
    search = (LAYERS, P, Q, LAST_THREE, DEFAULT_LEVEL, DEFAULT_STEPS)
    facts = (planted.recipe["adapter"], search, N_TOKENS, DEFAULT_SIMILARITY)
    mark = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    folder = KEPT / mark / f"{name}-{PROMPTS.index(prompt)}-{seed}"
    path = folder / f"hits-{n_vectors}.json"
    if not path.is_file():
        found = SEARCHES[name](Task(planted, prompt, seed, n_vectors, folder))
        texts = tm.generate(planted.model, prompt, found, max_new_tokens=N_TOKENS, chat=True)
        hits = count_hits(texts, planted.backdoors)
        radius = float(f"{float(found.norms.median()):.3g}")
        # Another call may have found more vectors than are asked for here.
        clock = _clock(folder)
        if (folder / "vectors.safetensors").is_file() and not clock["seconds"]:
            raise FileNotFoundError(
                f"{folder}: holds vectors, but no clock.json that says how long they took; delete "
                "the folder"
            )
        seconds = clock["seconds"] * len(found) / max(len(found), clock["vectors"])
        facts = {"method": name, "prompt": prompt, "seed": seed, "seconds": seconds}
        rows = [{**facts, "radius": radius, **row} for row in hits.to_dict("records")]
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=1))
        exact = [f"{row['hits']} of {row['n']}" for row in rows if row["match"] == "exact"]
        print(f"{name}, {prompt!r}, seed {seed}: {', '.join(exact)} ({seconds:.0f} s)", flush=True)
    return json.loads(path.read_text())


def _clock(folder: Path) -> dict[str, float]:
    path = folder / "clock.json"
    return json.loads(path.read_text()) if path.is_file() else {"vectors": 0, "seconds": 0.0}


def _tell(step: int, n_steps: int, loss: float, divergence: float) -> None:
    if step % 10 == 0:
        print(f"step {step} of {n_steps}: {loss:.4f} and {divergence:.4f} nats a token", flush=True)


def _timed(task: Task, layers: tuple[int, int], **settings: Any) -> tm.SteeringVectors:
    """A search, and how long it took, the map and the calibration included.

    The time is written with every vector: a search that goes on adds to it. What an interruption
    threw away is not counted.
    """
    before, began = _clock(task.folder)["seconds"], time.monotonic()

    def kept(n_found: int, n_vectors: int | None) -> None:
        if n_found > _clock(task.folder)["vectors"]:
            clock = {"vectors": n_found, "seconds": before + time.monotonic() - began}
            with replacing(task.folder / "clock.json") as temporary:
                temporary.write_text(json.dumps(clock))

    f = tm.ActivationMap.from_prompts(task.planted.model, task.prompt, *layers, chat=True)
    chosen = {"p": P, "q": Q, "positions": LAST_THREE, **settings, "seed": task.seed}
    return tm.Run(task.folder).melbo(f, task.n_vectors, on_vector=kept, **chosen)


def orthogonal(task: Task) -> tm.SteeringVectors:
    return _timed(task, LAYERS, radius="auto")


def independent(task: Task) -> tm.SteeringVectors:
    return _timed(task, LAYERS, radius="auto", orthogonal=False)


def published(task: Task) -> tm.SteeringVectors:
    """The original code's settings for backdoors, whole."""
    preset = tm.PRESETS["backdoor"]
    layers = preset.layers(int(task.planted.model.cfg.n_layers))
    chosen = {name: value for name, value in preset.search.items() if name != "n_vectors"}
    return _timed(task, (layers["source_layer"], layers["target_layer"]), **chosen)


def published_optimiser(task: Task) -> tm.SteeringVectors:
    """The published optimiser at our layers and radius."""
    return _timed(task, LAYERS, radius="auto", optimiser="adamw", steps=300)


def random(task: Task) -> tm.SteeringVectors:
    """Random directions of the length that the search takes; no time is counted."""
    f = tm.ActivationMap.from_prompts(task.planted.model, task.prompt, *LAYERS, chat=True)
    radius = tm.calibrate_radius(f)
    # Others for every prompt, too: added up, they are to be that many vectors.
    generator = torch.Generator().manual_seed(1000 * PROMPTS.index(task.prompt) + task.seed)
    theta = random_sphere(task.n_vectors, f.d_model, radius, generator=generator)
    return tm.SteeringVectors(theta, {"source_layer": LAYERS[0], "chat": True})


METHODS: dict[str, Search] = {
    "orthogonal": orthogonal,
    "independent": independent,
    "random": random,
    "published-optimiser": published_optimiser,
}
SEARCHES = {**METHODS, "published": published}
# The published optimiser takes hours for as many vectors: ask for few, with --vectors.
DEFAULT_METHODS = ("orthogonal", "independent", "random")


if __name__ == "__main__":
    main()
