"""What does a search find? Planted behaviours in completions, and searches over pairs of layers."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import behaviours, kl_divergence
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.discovery import melbo
from tl_melbo.discovery._calibration import Radius
from tl_melbo.engines import Engine
from tl_melbo.evaluation._planted import Backdoor
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model, check_layer, check_model
from tl_melbo.probability import DEFAULT_CONFIDENCE, wilson_interval
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Vectors, as_library
from tl_melbo.tables import Table

# Cosine of two sentences' embeddings from which one is taken for the other, in other words.
DEFAULT_SIMILARITY = 0.7
_HITS = ["behaviour", "match", "hits", "n", "vectors", "rate", "low", "high"]
_PAIR = ["source_layer", "target_layer", "radius", "kl"]
_COUNTED = ["coherent", "distinct", "per_100_vectors"]


@shape_checked
def hit_rate(
    model: Model,
    vectors: Vectors,
    backdoors: Sequence[Backdoor],
    prompts: str | Sequence[str],
    *,
    layer: int | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 24,
    similarity: float = DEFAULT_SIMILARITY,
    confidence: float = DEFAULT_CONFIDENCE,
    embedder: Embedder | None = None,
    batch_size: int = 32,
    engine: Engine | None = None,
) -> pd.DataFrame:
    """Let the model write under each vector, and count the planted behaviours in the completions.

    Args:
        prompts: clean ones, without a trigger or a behaviour.
        max_new_tokens: enough for the longest behaviour.
        similarity: the least cosine of some sentence's embedding with the behaviour's.

    Returns:
        A row for each behaviour and match, "exact" (but for case and spaces) or "similar" (that, or
        some sentence is close): behaviour; match; hits, of n vectors and prompts; vectors that hit
        at least once; rate; low and high, Wilson's interval of the rate.

    Raises:
        ValueError: no vectors, backdoors or clean prompts; a number out of its range.

    Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
    """
    check_model(model)
    library, texts = as_library(vectors), checks.as_texts(prompts)
    _check(backdoors, similarity, confidence)
    check_clean(model, backdoors, texts, max_new_tokens)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat": chat}
    options |= {"batch_size": batch_size, "engine": engine}
    frame = generate(model, texts, library, layer, **options)
    counting = {"similarity": similarity, "confidence": confidence, "embedder": embedder}
    return count_hits(frame, backdoors, **counting)


@shape_checked
def count_hits(
    completions: pd.DataFrame,
    backdoors: Sequence[Backdoor],
    *,
    similarity: float = DEFAULT_SIMILARITY,
    confidence: float = DEFAULT_CONFIDENCE,
    embedder: Embedder | None = None,
) -> pd.DataFrame:
    """The table of `hit_rate` for completions of `generate`, of vectors at scale 1; its errors."""
    _check(backdoors, similarity, confidence)
    advice = "pass what generate returns"
    checks.columns(completions, ("vector", "completion"), "completions", advice)
    counted = completions.loc[completions["vector"] >= 0]
    if "scale" in counted.columns:
        counted = counted.loc[counted["scale"] == 1]
    if counted.empty:
        raise ValueError(f"completions: none of a vector at scale 1; {advice}")
    texts = [text if isinstance(text, str) else "" for text in counted["completion"]]
    split = [re.split(r"[.!?\n]", text) for text in texts]
    sentences = [
        (each.strip(), at) for at, some in enumerate(split) for each in some if each.strip()
    ]
    sought = [backdoor.behaviour for backdoor in backdoors]
    points = embeddings([*sought, *(text for text, _ in sentences)], embedder or default_embedder())
    places = torch.tensor([at for _, at in sentences], dtype=torch.long)
    is_close = points[: len(sought)] @ points[len(sought) :].T >= similarity
    rows = []
    for behaviour, close in zip(sought, is_close, strict=True):
        alike = {*places[close].tolist()}
        exact = [_plain(behaviour) in _plain(text) for text in texts]
        similar = [is_exact or at in alike for at, is_exact in enumerate(exact)]
        for match, found in (("exact", exact), ("similar", similar)):
            hits, n = sum(found), len(found)
            low, high = wilson_interval(hits, n, confidence)
            which = sorted({*counted.loc[found, "vector"].tolist()})
            rows.append((behaviour, match, hits, n, which, hits / n, low, high))
    return Table(rows, columns=_HITS)


def check_clean(
    model: Model, backdoors: Sequence[Backdoor], prompts: Sequence[str], max_new_tokens: int
) -> None:
    """Make sure that a hit can only come from a vector, and that there is room for one."""
    for place, backdoor in enumerate(backdoors):
        length = len(model.tokenizer.encode(backdoor.behaviour, add_special_tokens=False))
        if length > max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}: backdoors[{place}].behaviour has {length} "
                "tokens, so it could never be written whole; allow more"
            )
        for number, text in enumerate(prompts):
            held = f"the trigger {backdoor.trigger!r}" if backdoor.trigger in text else ""
            if _plain(backdoor.behaviour) in _plain(text):
                held = f"the behaviour {backdoor.behaviour!r}"
            if held:
                raise ValueError(f"prompts[{number}]: holds {held}; pass clean prompts")


def _check(backdoors: Sequence[Backdoor], similarity: float, confidence: float) -> None:
    if not backdoors:
        raise ValueError("backdoors: none given; pass Planted.backdoors")
    checks.between(-1, 1, "a cosine", similarity=similarity)
    wilson_interval(0, 1, confidence)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


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
    on_pair: Callable[[pd.DataFrame], None] | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Search between several pairs of layers with MELBO, and say what each search brings.

    Args:
        pairs: (source layer, target layer) of each search; None spreads five over the depth.
        radius: "auto" is calibrated for each pair.
        backdoors: what was planted, to count hits.
        on_pair: called after each pair with the rows so far.
        settings: further arguments of `tm.melbo`.

    Returns:
        A row for each pair: source_layer, target_layer, radius; kl, the next token's median
        divergence from unsteered, in nats; coherent, the share of completions; distinct and
        per_100_vectors, see `analysis.behaviours`; for each backdoor "hits: " and its behaviour,
        exact; seconds, of the search; problem, why there are no numbers, or "".

    Raises:
        TypeError: a setting that MELBO does not have.
        ValueError: layers out of order or beyond the model; what `hit_rate` or MELBO refuses.
    """
    check_model(model)
    texts = checks.as_texts(prompts)
    chosen = _chosen_pairs(model, pairs)
    check_clean(model, backdoors, texts, max_new_tokens)

    def map_between(source: int, target: int) -> ActivationMap:
        return ActivationMap.from_prompts(model, texts, source, target, chat=chat)

    # MELBO checks its arguments at the call: do this before anything that takes long. A radius in
    # place of "auto", which would be calibrated at once; a pair's vectors cannot continue others.
    fixed = 1.0 if radius == "auto" else radius
    melbo.parts(map_between(*chosen[0]), n_vectors, fixed, previous=None, **settings)
    options = {"max_new_tokens": max_new_tokens, "chat": chat}
    unsteered = generate(model, texts, **options)
    hits = [f"hits: {backdoor.behaviour}" for backdoor in backdoors]
    columns = [*_PAIR, *_COUNTED, *hits, "seconds", "problem"]
    rows: list[dict[str, Any]] = []
    for source, target in chosen:
        row: dict[str, Any] = {"source_layer": source, "target_layer": target, "problem": ""}
        rows.append(row)
        began = time.monotonic()
        try:
            found = melbo(map_between(source, target), n_vectors, radius, **settings)
            row["seconds"] = round(time.monotonic() - began, 2)
            row["radius"] = found.story["hyperparameters"]["radius"]
            kl = torch.cat([kl_divergence(model, text, found, chat=chat) for text in texts])
            row["kl"] = float(kl.double().nanquantile(0.5))
            steered = generate(model, texts, found, **options)
            row |= _counted(model, unsteered, steered, backdoors, embedder)
        except (ValueError, FloatingPointError) as error:
            # The other pairs are still searched. Where none can be, the caller gets the error; also
            # where something else than the search or the model's numbers is wrong.
            row["problem"] = str(error)
            none_left = len(rows) == len(chosen) and all(each["problem"] for each in rows)
            if none_left or ("seconds" in row and not isinstance(error, FloatingPointError)):
                raise
        if on_pair is not None:
            on_pair(Table(rows, columns=columns))
    return Table(rows, columns=columns)


def _counted(
    model: Model,
    unsteered: pd.DataFrame,
    steered: pd.DataFrame,
    backdoors: Sequence[Backdoor],
    embedder: Embedder | None,
) -> dict[str, Any]:
    """What the completions under the vectors of one search bring."""
    both = pd.concat([unsteered, steered], ignore_index=True)
    groups = behaviours(model, both, chat=unsteered.attrs["chat"], embedder=embedder)
    coherent = groups.texts["coherent"][groups.texts["vector"] >= 0].mean()
    row = dict(zip(_COUNTED, (coherent, groups.n_distinct, groups.per_100_vectors), strict=True))
    if backdoors:
        hits = count_hits(steered, backdoors, embedder=embedder)
        exact = hits[hits["match"] == "exact"]
        row |= dict(zip("hits: " + exact["behaviour"], exact["hits"], strict=True))
    return row


def _chosen_pairs(
    model: Model, pairs: Sequence[tuple[int, int]] | None
) -> Sequence[tuple[int, int]]:
    """The pairs given, or some a quarter of the depth apart, from the first layers to the last."""
    if pairs is None:
        n_layers = int(model.cfg.n_layers)
        width = max(1, n_layers // 4)
        starts = torch.linspace(0, n_layers - 1 - width, 5).round().int().tolist()
        return [(start, start + width) for start in dict.fromkeys(starts)]
    if not pairs:
        raise ValueError("pairs: none given; pass at least one, such as (8, 16)")
    for source, target in pairs:
        check_layer(model, source, "pairs: source")
        check_layer(model, target, "pairs: target")
        if source >= target:
            raise ValueError(f"pairs: ({source}, {target}): the source comes before the target")
    return pairs
