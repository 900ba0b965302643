"""All pairs of layers: to which directions does the target respond most, and what do they do?"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_melbo import checks, story
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import kl_divergence
from tl_melbo.discovery import calibrate_radius
from tl_melbo.discovery._calibration import Radius
from tl_melbo.discovery._jacobian import signed
from tl_melbo.discovery._map import own_arithmetic
from tl_melbo.errors import NotFinite
from tl_melbo.evaluation._atlas_library import Atlas, file_name, load
from tl_melbo.files import writable_folder
from tl_melbo.generation import generate
from tl_melbo.memory import free_memory
from tl_melbo.model.bridge import Model, check_layer, check_model, model_name, residual_streams
from tl_melbo.model.tokens import to_tokens
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

# The published length, as a share of a token's norm; and the longest that is not meant as a norm.
_SHARE, _LARGEST_SHARE = 0.35, 2.0
# All of J'J is formed; above this width, a derivative for each dimension is too much.
_MOST_WIDTH = 4096
# Tokens of all completions of one source, which the header of its file can hold.
_MOST_TOKENS = 200_000
_UNIT = "effect for a vector of norm 1"
_ABOUT = (
    "Each vector is a direction to which a later layer responds most, to first order (top singular "
    "vectors of the Jacobian for each pair of layers)."
)


@shape_checked
def atlas(
    model: Model,
    prompts: str | Sequence[str],
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    *,
    n_vectors: int = 1,
    radius: Radius = _SHARE,
    positions: slice = slice(-3, None),
    chat: bool = True,
    max_new_tokens: int = 24,
    kl_threshold: float = 0.5,
    folder: str | Path | None = None,
    on_source: Callable[[Atlas], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    progress: bool = False,
) -> Atlas:
    """Find the top singular vectors of the Jacobian of each pair of layers, and try them out.

    Args:
        sources: layers after which vectors are added; None takes all.
        targets: layers after which effects are read; None takes all. A pair's target is the later.
        n_vectors: of each pair.
        radius: norm at which vectors are tried out, as a share of the median norm of the prompts'
            tokens at the source; 0.35 is the published share. "auto" takes `calibrate_radius` for
            each pair, which takes seconds a pair.
        positions: where effects are measured, as in `jacobian`.
        kl_threshold: completions are written where the KL, in nats, is above it.
        folder: the vectors of each source are kept there when they are done; the same call goes on.
        on_source: called after each source with the atlas so far.
        on_batch: called with the work done, and the work in all, after each batch of derivatives.

    Returns:
        An `Atlas`, whose `table` has a row for each pair, vector, sign and prompt: source_layer,
        target_layer; vector, 0 for the largest singular value; singular_value, as `jacobian` has
        it; share, the part that its square has of the sum of all squares; cumulative_share, with
        those before it; norm; prompt; sign, 1 or -1; kl, the next token's divergence from
        unsteered, in nats; completion, missing where the KL is not above the threshold.

    Raises:
        ValueError: no pair of layers; a number out of its range; a model wider than 4096; more
            derivatives than memory holds.
        DifferentSearch: the folder holds an atlas with other settings.
        NotFinite: a derivative is not finite; as `kl_divergence` does.

    Source: Ayyub 2026, "Power steering".
    """
    check_model(model)
    texts = checks.as_texts(prompts)
    asked = _layers(model, sources, "sources"), _layers(model, targets, "targets")
    pairs = _pairs(*asked)
    check_settings(n_vectors, radius, max_new_tokens, kl_threshold)
    _check_sizes(model, 2 * max(map(len, pairs.values())) * len(texts), n_vectors, max_new_tokens)
    first, last = min(pairs), max(map(max, pairs.values()))
    f = ActivationMap.from_prompts(model, texts, first, last, chat=chat)
    _check_memory(f, max(map(len, pairs.values())), positions)
    chosen = {
        "targets": asked[1],
        "vectors_per_pair": n_vectors,
        "relative_radius": radius,
        "positions": story.slice_to_json(positions),
        "max_new_tokens": max_new_tokens,
        "kl_threshold": kl_threshold,
    }
    facts = {**f.story(), "source_layer": None, "target_layer": None, "hyperparameters": chosen}
    place = None if folder is None else Path(folder).expanduser()
    known = {} if place is None else load(place, facts)
    found = {source: known[source] for source in pairs if source in known}
    left = {source: each for source, each in pairs.items() if source not in found}
    length = {"chat": chat, "max_new_tokens": max_new_tokens}
    if left:  # also refuses a length for which the model has no room
        facts["unsteered"] = generate(model, texts, **length)["completion"].tolist()
    if left and place is not None:
        writable_folder(place)
    with closing(_search(f, left, facts, progress, on_batch)) as libraries:
        for source, library in libraries:
            if place is not None:
                library.save(place / file_name(source))
            found = dict(sorted({**found, source: library}.items()))
            if on_source is not None:
                on_source(Atlas(found))
    return Atlas(found)


def _layers(model: Model, layers: Sequence[int] | None, argument: str) -> list[int]:
    """These layers in their order, or all."""
    if layers is None:
        return list(range(int(model.cfg.n_layers)))
    if not len(layers):
        raise ValueError(f"{argument}: none given; pass at least one layer, or None for all")
    for layer in layers:
        check_layer(model, layer, argument)
    return sorted({*layers})


def _pairs(sources: list[int], targets: list[int]) -> dict[int, list[int]]:
    """The targets of each source that has any."""
    pairs = {source: [each for each in targets if each > source] for source in sources}
    if not any(pairs.values()):
        given = f"sources={sources}, targets={targets}"
        raise ValueError(f"{given}: no target comes after a source; pass a later one")
    return {source: each for source, each in pairs.items() if each}


def check_settings(
    n_vectors: int, radius: Radius, max_new_tokens: int, kl_threshold: float
) -> None:
    """Check the settings of which no model is needed."""
    checks.at_least(1, n_vectors=n_vectors, max_new_tokens=max_new_tokens)
    checks.between(0, 1e3, "nats", kl_threshold=kl_threshold)
    if radius != "auto" and not 0 < radius <= _LARGEST_SHARE:
        what = f"a share of the tokens' norm, above 0 and up to {_LARGEST_SHARE:g}, or 'auto'"
        raise ValueError(f"radius={radius}: {what}")


def _check_sizes(model: Model, per_vector: int, n_vectors: int, max_new_tokens: int) -> None:
    d_model = int(model.cfg.d_model)
    if d_model > _MOST_WIDTH:
        what = f"d_model={d_model}, and an atlas takes at most {_MOST_WIDTH}"
        raise ValueError(f"model: {what}; use tm.jacobian for single pairs")
    checks.between(1, d_model, "at most d_model", n_vectors=n_vectors)
    if per_vector * n_vectors * max_new_tokens > _MOST_TOKENS:
        raise ValueError(
            f"n_vectors={n_vectors}, max_new_tokens={max_new_tokens}: {per_vector * n_vectors} "
            f"completions for a source, which keeps {_MOST_TOKENS:,} tokens; ask for less"
        )


def _check_memory(f: ActivationMap, n_targets: int, positions: slice) -> None:
    """The derivatives of one source must fit: of all its targets, for one prompt at a time."""
    counted = f.position_mask(positions)  # refuses what some prompt does not have
    n_pos = int(counted.sum(-1).max())
    needed = n_targets * f.d_model**2 * (n_pos * f.x.element_size() + 8)
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"positions={positions}: derivatives of {n_targets} targets at {n_pos} positions need "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; take fewer of either"
        )


def _search(
    f: ActivationMap,
    pairs: Mapping[int, list[int]],
    facts: Mapping[str, Any],
    progress: bool,
    on_batch: Callable[[int, int], None] | None,
) -> Generator[tuple[int, SteeringVectors]]:
    """The library of one source after another; derivatives times blocks are counted."""
    chosen = facts["hyperparameters"]
    n_vectors = chosen["vectors_per_pair"]
    positions = story.slice_from_json(chosen["positions"])
    norms = _token_norms(f, [*pairs]) if pairs else {}
    total = sum(f.target_layer - source for source in pairs) * f.d_model * len(f.prompts)
    done = blocks = 0
    with tqdm(total=total, desc="atlas", unit_scale=True, disable=not progress) as bar:

        def count(n: int) -> None:
            nonlocal done
            done += n * blocks
            bar.update(n * blocks)
            if on_batch is not None:
                on_batch(done, total)

        for source, targets in pairs.items():
            blocks = f.target_layer - source
            with own_arithmetic(f):
                grams = f.gram_matrices(source, targets, positions, count)
            parts = []
            for target, gram in grams.items():
                radius = chosen["relative_radius"]
                if radius == "auto":
                    pair = ActivationMap.from_prompts(
                        f.model, f.prompts, source, target, chat=f.chat
                    )
                    radius = calibrate_radius(pair, positions=positions)
                else:
                    radius *= norms[source]
                parts.append(_decomposed(f, source, target, gram, n_vectors, radius))
            columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            vectors = columns.pop("vectors")
            columns["kl"], texts = _tried(f, source, vectors, chosen)
            place = {"source_layer": source, "completions": texts}
            measured = story.measure("singular_value", "singular value", _UNIT)
            told = story.make("atlas", **{**facts, **place}, measure=measured, about=_ABOUT)
            yield source, SteeringVectors(vectors, told, columns)


def _token_norms(f: ActivationMap, layers: Sequence[int]) -> dict[int, float]:
    """The median norm of the prompts' tokens after each of these layers, in their order."""
    tokens = [to_tokens(f.model, text, f.chat) for text in f.prompts]
    streams = [residual_streams(f.model, each, layers) for each in tokens]
    return {
        layer: float(torch.cat([each.float().norm(dim=-1)[0] for each in some]).median())
        for layer, some in zip(layers, zip(*streams, strict=True), strict=True)
    }


def _decomposed(
    f: ActivationMap, source: int, target: int, gram: Tensor, n_vectors: int, radius: float
) -> dict[str, Tensor]:
    """The first directions of one J'J, as vectors and columns."""
    if not gram.isfinite().all():
        what = f"the derivative of {model_name(f.model)} from layer {source} to {target}"
        raise NotFinite(f"{what} is not finite; load the model in a wider type")
    squares, directions = torch.linalg.eigh(gram)
    squares = squares.flip(0).clamp_min(0)
    shares = squares[:n_vectors] / squares.sum()
    return {
        "vectors": (signed(directions.T.flip(0)[:n_vectors]) * radius).float(),
        "target_layer": torch.full((n_vectors,), target),
        "vector": torch.arange(n_vectors),
        "singular_value": squares[:n_vectors].sqrt(),
        "share": shares,
        "cumulative_share": shares.cumsum(0),
    }


def _tried(
    f: ActivationMap, source: int, vectors: Tensor, chosen: Mapping[str, Any]
) -> tuple[Tensor, list[list[list[str | None]]]]:
    """KL and completions of both signs, each [vector, prompt, sign]."""
    both = torch.stack([vectors, -vectors], 1).flatten(0, 1)
    options: dict[str, Any] = {"layer": source, "chat": f.chat}
    length = {"max_new_tokens": chosen["max_new_tokens"]}
    kl = torch.stack([kl_divergence(f.model, text, both, **options) for text in f.prompts], 1)
    texts = np.full((len(vectors), len(f.prompts), 2), None, dtype=object)
    for number, text in enumerate(f.prompts):
        rows = (kl[:, number] > chosen["kl_threshold"]).nonzero().flatten().numpy()
        if len(rows):
            written = generate(f.model, text, both[rows], **options, **length)
            texts[rows // 2, number, rows % 2] = written["completion"].to_numpy()
    return kl.unflatten(0, (-1, 2)).transpose(1, 2), texts.tolist()
