"""What random vectors of the same norm do: the baseline of a library's numbers and texts."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from tl_melbo import story
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._similarity import kl_divergence
from tl_melbo.discovery import melbo_objective, random_vectors
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

# How many are measured, and under how many the model writes.
_MEASURED, _WRITING = 8, 4
# Norms that differ by more than this share have no random vectors in common.
_SAME_NORM = 1e-3


def random_baseline(
    model: Model, f: ActivationMap, found: SteeringVectors, prompts: Sequence[str], **options: Any
) -> pd.DataFrame | None:
    """Random vectors of the library's norm, measured as its own; None where its norms differ.

    Args:
        options: layer, chat and batch_size, as `kl_divergence` takes them.

    Returns:
        A row for each prompt and random vector: kind, "random"; prompt; kl of the next token from
        unsteered, in nats; objective, of the library's own p, q and positions, NaN where the
        library has none.
    """
    drawn = _drawn(f, found, _MEASURED)
    if drawn is None:
        return None
    chosen = found.story.get("hyperparameters") or {}
    objective = [float("nan")] * _MEASURED
    if (story.measure_of(found.story) or {}).get("column") == "objective" and "p" in chosen:
        powers = {name: chosen[name] for name in ("p", "q", "norm") if chosen.get(name) is not None}
        with torch.no_grad():
            positions = story.slice_from_json(chosen.get("positions"))
            delta = f.delta(drawn.vectors.to(f.x.device), positions)
            objective = melbo_objective(delta, **powers).tolist()
    parts = []
    for prompt in prompts:
        kl = kl_divergence(model, prompt, drawn, **options).tolist()
        parts.append(Table({"kind": "random", "prompt": prompt, "kl": kl, "objective": objective}))
    return pd.concat(parts, ignore_index=True)


def random_texts(
    model: Model, f: ActivationMap, found: SteeringVectors, prompts: Sequence[str], **options: Any
) -> pd.DataFrame | None:
    """What the model writes under such vectors and their negatives, with options of `generate`."""
    drawn = _drawn(f, found, _WRITING)
    return None if drawn is None else generate(model, prompts, drawn, scales=[1, -1], **options)


def _drawn(f: ActivationMap, found: SteeringVectors, n_vectors: int) -> SteeringVectors | None:
    low, high = float(found.norms.min()), float(found.norms.max())
    same = high - low <= _SAME_NORM * high
    return random_vectors(f, n_vectors, radius=high, seed=0) if same else None
