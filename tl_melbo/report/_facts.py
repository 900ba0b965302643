"""What the page tells of a library before its table: how it was found, and what is random."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tl_melbo import story
from tl_melbo.analysis import Behaviours
from tl_melbo.analysis._effect_plane import largest_cosine
from tl_melbo.vectors import SteeringVectors

# A search that was cut short is worth so many times its steps.
_MORE_STEPS = 3


def library_facts(found: SteeringVectors, baselines: pd.DataFrame | None) -> dict[str, Any]:
    """What the page's template tells of a library."""
    about = found.story
    source, target = about.get("source_layer"), about.get("target_layer")
    low, high = float(found.norms.min()), float(found.norms.max())
    radius = f"{high:.4g}" if high - low <= 1e-3 * high else f"{low:.4g} to {high:.4g}"
    told = {
        "Model": story.model_of(about),
        "Method": story.method_of(about),
        "Layers": source if target is None else f"{source} → {target}",
        "Vectors": len(found),
        "Norm": f"{radius} (calibrated)" if "calibration" in about else radius,
        "Largest |cosine|": f"{largest_cosine(found.vectors):.1g}" if len(found) > 1 else None,
        "Effect (median)": _effect(found, random_median(baselines, "objective")),
        "Seed": about.get("seed"),
        "Date": str(about.get("date", ""))[:10] or None,
    }
    return {
        "facts": told,
        "settings": settings(about),
        "about": story.about_of(about),
        "layer": source,
        "positions": story.slice_text(positions_of(found)),
        "n_vectors": len(found),
        "measure": measure_shown(found),
        "not_converged": not_converged(found),
        "random_kl": random_median(baselines, "kl"),
    }


def _effect(found: SteeringVectors, random: float | None) -> str | None:
    if not random or found.objective is None:
        return None
    own = float(found.objective.double().nanmedian())
    return f"{own:.3g}, {own / random:.2g} × random"


def groups_told(
    groups: Behaviours | None, data: Mapping[str, Any], n_found: int, is_judged: bool = False
) -> dict[str, Any]:
    """What the template says of the behaviours in words; it counts what the page shows."""
    if groups is None:
        return {"n_distinct": None, "n_incoherent": 0, "grouped_by_words": False}
    vectors = groups.texts["vector"]
    random = pd.DataFrame(groups.texts[vectors >= n_found])
    return {
        "n_distinct": sum(not card["baseline"] for card in data["behaviours"]),
        "n_known": sum(
            bool(c["unsteered"] and c["unsteered"]["n"]) and not c["baseline"]
            for c in data["behaviours"]
        ),
        "n_incoherent": sum(bool(row["filtered"]) for row in data["rows"]),
        "grouped_by_words": groups.embedder == "words",
        "is_judged": is_judged,
        "is_refused": "complies" in {*groups.texts["stance"]},
        "n_texts": int(vectors.between(0, n_found - 1).sum()),
        "n_random": random["vector"].nunique(),
        "n_random_texts": len(random),
        "n_of_random": len({*random["behaviour"]} - {-1, 0}),
    }


def random_median(baselines: pd.DataFrame | None, column: str) -> float | None:
    """The median of a column over the random vectors; None where it is not known."""
    if baselines is None or column not in baselines:
        return None
    values = baselines[column].astype(float).tolist()
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else None


def positions_of(found: SteeringVectors) -> slice:
    """Where the effects of a library's vectors were measured."""
    return story.slice_from_json(found.story.get("hyperparameters", {}).get("positions"))


def settings(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every fact of the metadata as name and text, nested ones flattened."""
    pairs: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            inner = "" if name == "hyperparameters" else f"{name}: "
            pairs += settings(value, prefix + inner)
            continue
        if name == "positions":
            value = story.slice_text(story.slice_from_json(value))
        elif name in ("prompts", "other") and isinstance(value, list):
            value = "\n".join(map(str, value))
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        pairs.append((prefix + name, text))
    return pairs


def measure_shown(found: SteeringVectors) -> dict[str, Any] | None:
    """What the method measured of each vector, if the library holds it."""
    measure = story.measure_of(found.story) or story.measure("objective", "objective")
    return measure if measure["column"] in found.columns else None


def not_converged(found: SteeringVectors) -> str:
    """How many vectors still gained when their search ended, of those of which it is known.

    And what to do; "" where none did.
    """
    table = found.table()
    known = [*table["converged"].dropna()] if "converged" in table else []
    if "no" not in known:
        return ""
    told = f"{known.count('no')} of {len(known)} still gained more than 1% in their last step"
    if n_unknown := len(found) - len(known):
        told += f"; of {n_unknown} more it is not known"
    steps = found.story.get("hyperparameters", {}).get("steps")
    if not isinstance(steps, int):
        return told
    more = f"--steps {_MORE_STEPS * steps} raises their numbers, but may find nothing new"
    return f"{told}; {more}"
