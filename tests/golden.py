"""What the published optimisers reach, recorded in tests/data: `make golden` computes it anew.

The quick tests hold our searches to these numbers, and the slow tests compute the numbers again.
Each record holds its settings, so that a reader, or a test, can repeat it.

    python -m tests.golden [NAME ...]
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tl_melbo as tm
from tests.tiny_models import TINY_ARCHITECTURES, tiny_bridge

FOLDER = Path(__file__).parent / "data"
PROMPT = "Tell me about yourself."


@cache
def bundled_map() -> tm.ActivationMap:
    return tm.ActivationMap.from_prompts(tm.load_model(), PROMPT, 8, 16, chat=True)


@cache
def tiny_map(architecture: str) -> tm.ActivationMap:
    return tm.ActivationMap.from_prompts(tiny_bridge(architecture), PROMPT, 1, 4)


def adamw(f: tm.ActivationMap, radius: float, seed: int) -> dict[str, Any]:
    """300 published steps from four starts, each for itself."""
    settings = {"n_vectors": 4, "radius": radius, "orthogonal": False, "seed": seed}
    found = tm.melbo(f, **settings, optimiser="adamw", steps=300)
    return {"settings": settings, "steps": 300, "objective": found.objective.tolist()}


def adam(
    f: tm.ActivationMap, radius: float, steps_to_theta0: int, n_vectors: int, steps: int
) -> dict[str, Any]:
    """The first vectors of a family by the published optimiser; 1000 steps are published."""
    theta0 = {"n_vectors": 1, "radius": radius, "seed": 0, "steps": steps_to_theta0}
    found = tm.melbo_ortho(f, tm.melbo(f, **theta0), n_vectors, optimiser="adam", steps=steps)
    return {"theta0": theta0, "steps": steps, "distance": found.columns["distance"].tolist()}


def of_every_architecture(search: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    return {name: search(tiny_map(name), *arguments) for name in TINY_ARCHITECTURES}


RECORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "adamw_3": lambda: adamw(bundled_map(), 3.0, 11),
    "adamw_6": lambda: adamw(bundled_map(), 6.0, 11),
    "adamw_12": lambda: adamw(bundled_map(), 12.0, 11),
    "adam_125": lambda: adam(bundled_map(), 12.0, 4, 1, 125),
    "adam_1000": lambda: adam(bundled_map(), 12.0, 4, 1, 1000),
    "tiny_adamw_0.5": lambda: of_every_architecture(adamw, 0.5, 1),
    "tiny_adamw_2": lambda: of_every_architecture(adamw, 2.0, 1),
    "tiny_adam_320": lambda: of_every_architecture(adam, 2.0, 6, 2, 320),
}


def recorded(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"golden_{name}.json").read_text(encoding="utf-8"))


def record(name: str) -> None:
    numbers = RECORDS[name]()
    numbers["versions"] = {"torch": torch.__version__, "tl_melbo": tm.__version__}
    text = json.dumps(numbers, indent=1) + "\n"
    (FOLDER / f"golden_{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or RECORDS:
        record(name)
        print(name)  # noqa: T201
