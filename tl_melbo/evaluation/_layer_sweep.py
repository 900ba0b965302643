"""Between which layers should one search? The same search over pairs of layers."""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import behaviours, kl_divergence
from tl_melbo.analysis._embedding import Embedder
from tl_melbo.checks import argument_names, as_texts
from tl_melbo.discovery import melbo
from tl_melbo.discovery._melbo import Radius, check_settings
from tl_melbo.evaluation._hits import check_clean, count_hits
from tl_melbo.evaluation._planted import Backdoor
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model, check_layer, check_model
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    "source_layer", "target_layer", "radius", "kl", "coherent", "distinct", "per_100_vectors",
)  # fmt: skip
OnPair = Callable[["pd.DataFrame"], None]


@shape_checked
def layer_sweep(
    model: Model,
    prompts: str | Sequence[str],
    pairs: Sequence[tuple[int, int]] | None = None,
    *,
    n_vectors: int = 16,
    radius: Radius = "auto",
    chat: bool = True,
    max_new_tokens: int = 40,
    backdoors: Sequence[Backdoor] = (),
    embedder: Embedder | None = None,
    on_pair: OnPair | None = None,
    **settings: Any,
) -> "pd.DataFrame":
    """Search between several pairs of layers, and say what each search brings.

    Args:
        model: a TransformerLens model.
        prompts: one text or several.
        pairs: (source layer, target layer) of each search; None takes five that are spread over
            the model's depth.
        n_vectors: of each search.
        radius: the same for all, or "auto", calibrated for each pair.
        chat: format the prompts as chat.
        max_new_tokens: the most tokens to write under each vector.
        backdoors: what was planted, if anything: then hits are counted, too.
        embedder: see `analysis.embeddings`; None takes sentences where the embedder is installed.
        on_pair: called after each pair with the rows so far, so that none is lost.
        settings: other arguments of `melbo`.

    Returns:
        One row a pair: source_layer, target_layer, radius; kl, the median divergence of the next
        token from unsteered, in nats; coherent, the share of texts; distinct, how many coherent
        behaviours, see `analysis.behaviours`; per_100_vectors, the same for every hundred; for
        each backdoor "hits: " and its behaviour, exact; seconds, of the calibration and search;
        problem, why a pair could not be searched, or "": its numbers are NaN then.

    Raises:
        TypeError: a setting that `melbo` does not have.
        ValueError: no prompt or pair, layers out of order or beyond the model; a prompt that holds
            a trigger or a behaviour, fewer new tokens than a behaviour has; as `melbo` does.
        FloatingPointError: as `melbo` does. Both only where no pair can be searched.
    """
    import pandas as pd

    from tl_melbo.tables import Table

    check_model(model)
    texts = as_texts(prompts, "prompts")
    chosen = _default_pairs(int(model.cfg.n_layers)) if pairs is None else list(pairs)
    if not chosen:
        raise ValueError("pairs: none given; pass at least one, such as (8, 16)")
    for source, target in chosen:
        check_layer(model, source, "pairs: source")
        check_layer(model, target, "pairs: target")
        if source >= target:
            raise ValueError(f"pairs: ({source}, {target}): the source comes before the target")
    argument_names("layer_sweep", settings, melbo)
    defaults = inspect.signature(melbo).parameters
    names = ("p", "q", "steps", "seed")
    numbers = {name: settings.get(name, defaults[name].default) for name in names}
    check_settings(n_vectors, radius, **numbers)
    check_clean(model, backdoors, texts, max_new_tokens)
    if on_pair is not None and not callable(on_pair):
        raise TypeError(f"on_pair: got {type(on_pair).__name__}, expected a function or None")
    unsteered = generate(model, texts, max_new_tokens=max_new_tokens, chat=chat)
    hits = [f"hits: {backdoor.behaviour}" for backdoor in backdoors]
    columns = [*_COLUMNS, *hits, "seconds", "problem"]
    rows: list[dict[str, Any]] = []
    for place, (source, target) in enumerate(chosen):
        row: dict[str, Any] = {"source_layer": source, "target_layer": target}
        began = time.monotonic()
        f = ActivationMap.from_prompts(model, texts, source, target, chat=chat)
        try:
            found = melbo(f, n_vectors, radius, **settings)
        except (ValueError, FloatingPointError) as error:
            # What one pair cannot do shall not cost the others; what none can is the caller's.
            if place == len(chosen) - 1 and all(row["problem"] for row in rows):
                raise
            row["problem"] = str(error)
        else:
            row |= {"seconds": round(time.monotonic() - began, 2), "problem": ""}
            frame = generate(model, texts, found, max_new_tokens=max_new_tokens)
            both = pd.concat([unsteered, frame], ignore_index=True)
            groups = behaviours(model, both, chat=chat, embedder=embedder)
            is_coherent = groups.texts["coherent"][groups.texts["vector"] >= 0]
            row |= {
                "radius": found.story["hyperparameters"]["radius"],
                "kl": _median_kl(model, texts, found, chat),
                "coherent": sum(is_coherent) / len(is_coherent),
                "distinct": groups.n_distinct,
                "per_100_vectors": groups.per_100_vectors,
            }
            if backdoors:
                counted = count_hits(frame, backdoors, embedder=embedder)
                exact = counted[counted["match"] == "exact"]
                row |= dict(zip(hits, map(int, exact["hits"]), strict=True))
        rows.append(row)
        if on_pair is not None:
            on_pair(Table(rows, columns=columns))
    return Table(rows, columns=columns)


def _median_kl(model: Model, texts: Sequence[str], found: SteeringVectors, chat: bool) -> float:
    """Of the next token from unsteered, over vectors and prompts; NaN where none is finite."""
    try:
        divergences = [kl_divergence(model, text, found, chat=chat) for text in texts]
    except FloatingPointError:
        return math.nan
    return float(torch.cat(divergences).double().nanquantile(0.5))


def _default_pairs(n_layers: int) -> list[tuple[int, int]]:
    """A quarter of the depth apart, from the first layers to the last."""
    width = max(1, n_layers // 4)
    starts = torch.linspace(0, n_layers - 1 - width, 5).round().int().tolist()
    return [(start, start + width) for start in dict.fromkeys(starts)]
