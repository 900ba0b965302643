"""From an adapter to vectors: what it does to the residual stream on average, block by block."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tl_melbo import checks, story
from tl_melbo.adapters import _sampling
from tl_melbo.adapters._situations import held_out
from tl_melbo.additions import Additions
from tl_melbo.errors import NotFinite
from tl_melbo.generation import OnBatch
from tl_melbo.layered import LayeredVectors
from tl_melbo.model.bridge import (
    Model,
    model_name,
    model_type,
    plain_model,
    residual_streams,
    weights_digest,
)
from tl_melbo.model.tokens import check_room, to_tokens
from tl_melbo.shapes import Tokens, checked_slice
from tl_melbo.steering import as_chat, hooked, steering_rows

if TYPE_CHECKING:
    from tl_melbo.adapters._adapter import Adapter

# Texts sampled at once.
_BATCH = 16
_ABOUT = {
    "difference": "Each vector is the mean over tokens of the residual stream with the adapter "
    "less that without it; it holds what earlier blocks added, too.",
    "addition": "Each vector is the mean over tokens of what the adapter adds after the block.",
}


def extract(
    model: Model,
    adapter: "Adapter",
    prompts: str | Sequence[str] | None,
    estimator: str,
    max_new_tokens: int,
    positions: slice,
    seed: int,
    chat: bool | None,
    on_batch: OnBatch | None,
) -> LayeredVectors:
    """See `Adapter.vectors`."""
    checks.at_least(0, max_new_tokens=max_new_tokens)
    checks.seed(seed)
    positions = checked_slice(positions)
    rows = steering_rows(model, adapter, None, [1.0])
    texts = checks.as_texts(held_out() if prompts is None else prompts)
    chat = as_chat(adapter, chat)
    tokens = [to_tokens(model, text, chat) for text in texts]
    check_room(model, tokens, max_new_tokens)
    means, shares = [], []
    for row, number in enumerate(adapter.columns["index"].tolist()):
        added = rows[row : row + 1]
        whole = _continued(model, added, tokens, max_new_tokens, generator(seed, number))
        effects = (
            _effects(model, adapter, added, text, estimator)[:, [*range(text.shape[1])[positions]]]
            for text in whole
        )
        counts = row * len(tokens), len(rows) * len(tokens)
        mean, share = _mean_and_share(_told(effects, on_batch or (lambda *_: None), *counts))
        means.append(mean)
        shares.append(share)
    made = {name: adapter.story.get(name) for name in ("method", "seed", "hyperparameters")}
    facts = story.make(
        "adapter_vectors",
        model=model_name(model),
        model_type=model_type(model),
        weights=weights_digest(model),
        d_model=adapter.d_model,
        layers=list(adapter.layers),
        prompts=texts,
        chat=chat,
        seed=seed,
        adapter=made,
        hyperparameters={
            "estimator": estimator,
            "max_new_tokens": max_new_tokens,
            "positions": story.slice_to_json(positions),
        },
        about=_ABOUT[estimator],
    )
    columns = {"index": adapter.columns["index"], "constant_share": torch.stack(shares)}
    return LayeredVectors(torch.stack(means), story=facts, columns=columns)


def generator(*key: int) -> torch.Generator:
    """Random numbers of their own for each key, such as a seed and the number of an adapter."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _told(parts: Iterable[Tensor], tell: OnBatch, done: int, total: int) -> Iterator[Tensor]:
    """The same, each counted once it was taken."""
    for number, part in enumerate(parts, start=done + 1):
        yield part
        tell(number, total)


def _mean_and_share(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean over tokens of vectors, [layer, pos, d_model], and its share of the mean square."""
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for vectors in parts:
        total = total + vectors.sum(1)
        squares = squares + vectors.square().sum((1, 2))
        count += vectors.shape[1]
    if not count:
        raise ValueError("positions: no token of any text; pass a longer slice")
    if not squares.isfinite().all():
        raise NotFinite("the adapted residual stream is not finite; load the model in a wider type")
    mean, squares = total / count, squares / count
    share = mean.square().sum(-1) / squares.clamp_min(torch.finfo(torch.float64).tiny)
    return mean.float(), share.float()


def _continued(
    model: Model,
    added: Additions,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    random: torch.Generator,
) -> Iterator[Tokens]:
    """Each prompt and what the adapted model samples after it."""
    if not max_new_tokens:
        yield from prompts
        return
    _sampling.check_can_sample(model)
    plain = plain_model(model)
    for first in range(0, len(prompts), _BATCH):
        some = prompts[first : first + _BATCH]
        drawn = _sampling.sample(model, plain, added, some, max_new_tokens, random)
        yield from (row[kept][None] for row, kept in zip(drawn.tokens, drawn.text, strict=True))


def _effects(
    model: Model, adapter: "Adapter", added: Additions, tokens: Tokens, estimator: str
) -> Tensor:
    """What the adapter changes after each of its blocks: float64 [layer, pos, d_model]."""
    without = residual_streams(model, tokens, adapter.layers)
    if estimator == "addition":
        pairs = zip(adapter.layers, without, strict=True)
        effects = [added.after(layer, residual) for layer, residual in pairs]
    else:
        with hooked(model, added):
            adapted = residual_streams(model, tokens, adapter.layers)
        pairs = zip(adapted, without, strict=True)
        effects = [one.double() - other.double() for one, other in pairs]
    return torch.cat(effects).double().cpu()
