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

# Norms that differ by more than this share have no random vectors in common.
_SAME_NORM = 1e-3


def random_baseline(
    model: Model,
    f: ActivationMap,
    found: SteeringVectors,
    prompts: Sequence[str],
    *,
    n_vectors: int = 8,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame | None:
    """Random vectors of the library's norm, measured as its own; None where its norms differ.

    Args:
        options: layer, chat and batch_size, as `kl_divergence` takes them.

    Returns:
        A row for each prompt and random vector: kind, "random"; prompt; kl of the next token from
        unsteered, in nats; objective, of the library's own p, q and positions, NaN where the
        library has none.
    """
    drawn = _drawn(f, found, n_vectors, seed)
    if drawn is None:
        return None
    chosen = found.story.get("hyperparameters") or {}
    objective = [float("nan")] * n_vectors
    if (story.measure_of(found.story) or {}).get("column") == "objective" and "p" in chosen:
        powers = {name: chosen[name] for name in ("p", "q", "norm") if chosen.get(name) is not None}
        with torch.no_grad():
            positions = story.slice_from_json(chosen.get("positions"))
            delta = f.delta(drawn.vectors.to(f.x.device), positions)
            objective = melbo_objective(delta, **powers).tolist()
    frames = [
        Table({"prompt": prompt, "kl": kl_divergence(model, prompt, drawn, **options).tolist()})
        for prompt in prompts
    ]
    table = pd.concat([frame.assign(objective=objective) for frame in frames], ignore_index=True)
    table.insert(0, "kind", "random")
    return table


def random_texts(
    model: Model,
    f: ActivationMap,
    found: SteeringVectors,
    prompts: Sequence[str],
    *,
    n_vectors: int = 4,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame | None:
    """What the model writes under random vectors of the library's norm, and under their negatives.

    The control of a library's texts: written with the same options, those of `generate`. None where
    the library's norms differ.
    """
    drawn = _drawn(f, found, n_vectors, seed)
    return None if drawn is None else generate(model, prompts, drawn, scales=[1, -1], **options)


def _drawn(
    f: ActivationMap, found: SteeringVectors, n_vectors: int, seed: int
) -> SteeringVectors | None:
    low, high = float(found.norms.min()), float(found.norms.max())
    if high - low > _SAME_NORM * high:
        return None
    return random_vectors(f, n_vectors, radius=high, seed=seed)
