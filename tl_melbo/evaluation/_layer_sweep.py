"""Between which layers should one search? The same search over pairs of layers."""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import behaviours, kl_divergence
from tl_melbo.analysis._embedding import Embedder
from tl_melbo.discovery import melbo
from tl_melbo.discovery._calibration import Radius
from tl_melbo.discovery._search import Method
from tl_melbo.evaluation._hits import check_clean, count_hits
from tl_melbo.evaluation._planted import Backdoor
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model, check_layer, check_model
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

_PAIR = ["source_layer", "target_layer", "radius", "kl"]
_COUNTED = ["coherent", "distinct", "per_100_vectors"]


@shape_checked
def layer_sweep(
    model: Model,
    prompts: str | Sequence[str],
    pairs: Sequence[tuple[int, int]] | None = None,
    *,
    method: Method = melbo,
    n_vectors: int = 16,
    radius: Radius = "auto",
    chat: bool = True,
    max_new_tokens: int = 40,
    backdoors: Sequence[Backdoor] = (),
    embedder: Embedder | None = None,
    on_pair: Callable[[pd.DataFrame], None] | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Search between several pairs of layers, and say what each search brings.

    Args:
        pairs: (source layer, target layer) of each search; None takes five that are spread over the
            model's depth.
        method: how to search: `tm.melbo`, or another discovery method.
        radius: "auto" is calibrated for each pair; a method that has no radius takes nothing else.
        backdoors: what was planted, if anything: then hits are counted, too.
        on_pair: called after each pair with the rows so far, so that none is lost.
        settings: other arguments of the method.

    Returns:
        One row a pair: source_layer, target_layer, radius; kl, the median divergence of the next
        token from unsteered, in nats; coherent, the share of completions; distinct and
        per_100_vectors, how many behaviours, see `analysis.behaviours`; for each backdoor "hits: "
        and its behaviour, exact; seconds, of the calibration and search; problem, why a pair could
        not be searched, or "": its numbers are NaN then.

    Raises:
        TypeError: a setting that the method does not have.
        ValueError: no prompt or pair, layers out of order or beyond the model; prompts or new
            tokens that `hit_rate` refuses; an argument that the method refuses for the first pair.
        FloatingPointError, ValueError: as the method does, where no pair can be searched.
    """
    check_model(model)
    texts = checks.as_texts(prompts)
    chosen = _checked_pairs(model, pairs)
    settings = _checked_settings(method, radius, settings)
    check_clean(model, backdoors, texts, max_new_tokens)

    def map_between(source: int, target: int) -> ActivationMap:
        return ActivationMap.from_prompts(model, texts, source, target, chat=chat)

    # A method checks its arguments at the call: do this before anything that takes long. A radius
    # in place of "auto", which would be calibrated at once.
    fixed = {"radius": 1.0} if settings.get("radius") == "auto" else {}
    method.parts(map_between(*chosen[0]), n_vectors=n_vectors, **{**settings, **fixed})
    options = {"max_new_tokens": max_new_tokens, "chat": chat}
    unsteered = generate(model, texts, **options)
    columns = [*_PAIR, *_COUNTED, *map(_hits_of, backdoors), "seconds", "problem"]
    rows: list[dict[str, Any]] = []
    for source, target in chosen:
        row: dict[str, Any] = {"source_layer": source, "target_layer": target, "problem": ""}
        rows.append(row)
        began = time.monotonic()
        f = map_between(source, target)
        try:
            found = method(f, n_vectors=n_vectors, **settings)
        except (ValueError, FloatingPointError) as error:
            # The other pairs are still searched. Where none can be, the caller gets the error.
            row["problem"] = str(error)
            if len(rows) == len(chosen) and all(each["problem"] for each in rows):
                raise
        else:
            row["seconds"] = round(time.monotonic() - began, 2)
            row["radius"] = found.story["hyperparameters"].get("radius", math.nan)
            row["kl"] = _median_kl(model, texts, found, chat)
            steered = generate(model, texts, found, **options)
            row |= _counted(model, unsteered, steered, backdoors, embedder)
        if on_pair is not None:
            on_pair(Table(rows, columns=columns))
    return Table(rows, columns=columns)


def _hits_of(backdoor: Backdoor) -> str:
    return f"hits: {backdoor.behaviour}"


def _counted(
    model: Model,
    unsteered: pd.DataFrame,
    steered: pd.DataFrame,
    backdoors: Sequence[Backdoor],
    embedder: Embedder | None,
) -> dict[str, Any]:
    """What the completions under the vectors of one search bring."""
    both = pd.concat([unsteered, steered], ignore_index=True)
    groups = behaviours(model, both, chat=steered.attrs["chat"], embedder=embedder)
    coherent = groups.texts["coherent"][groups.texts["vector"] >= 0].mean()
    row = dict(zip(_COUNTED, (coherent, groups.n_distinct, groups.per_100_vectors), strict=True))
    if backdoors:
        hits = count_hits(steered, backdoors, embedder=embedder)
        exact = hits.loc[hits["match"] == "exact", "hits"]
        row |= dict(zip(map(_hits_of, backdoors), exact, strict=True))
    return row


def _median_kl(model: Model, texts: Sequence[str], found: SteeringVectors, chat: bool) -> float:
    """Of the next token from unsteered, over vectors and prompts; NaN where none is finite."""
    try:
        kl = torch.cat([kl_divergence(model, text, found, chat=chat) for text in texts])
    except FloatingPointError:
        return math.nan
    return float(kl.double().nanquantile(0.5))


def _checked_pairs(
    model: Model, pairs: Sequence[tuple[int, int]] | None
) -> Sequence[tuple[int, int]]:
    chosen = _default_pairs(int(model.cfg.n_layers)) if pairs is None else pairs
    if not chosen:
        raise ValueError("pairs: none given; pass at least one, such as (8, 16)")
    for source, target in chosen:
        check_layer(model, source, "pairs: source")
        check_layer(model, target, "pairs: target")
        if source >= target:
            raise ValueError(f"pairs: ({source}, {target}): the source comes before the target")
    return chosen


def _checked_settings(method: Method, radius: Radius, settings: dict[str, Any]) -> dict[str, Any]:
    """What to pass to the method, the radius among it where the method has one."""
    checks.argument_names("layer_sweep", settings, method, ("f", "n_vectors", "radius", "previous"))
    if "radius" in inspect.signature(method).parameters:
        return {"radius": radius, **settings}
    if radius != "auto":
        raise TypeError(f"radius={radius}: {method.__name__} has no radius; leave it out")
    return settings


def _default_pairs(n_layers: int) -> list[tuple[int, int]]:
    """A quarter of the depth apart, from the first layers to the last."""
    width = max(1, n_layers // 4)
    starts = torch.linspace(0, n_layers - 1 - width, 5).round().int().tolist()
    return [(start, start + width) for start in dict.fromkeys(starts)]
