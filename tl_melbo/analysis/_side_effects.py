"""What does a vector cost where nobody asked for it, and how far does it reach?"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.additions import VectorAdditions
from tl_melbo.analysis._completions import transfer
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.analysis._similarity import kl_divergence
from tl_melbo.analysis._texts import PASSAGES, UNRELATED_PROMPTS
from tl_melbo.model.bridge import Model
from tl_melbo.model.tokens import to_tokens
from tl_melbo.probability import mean_losses
from tl_melbo.reading import map_rows, rows_at_once
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Vectors, as_library, as_theta, steering_layer
from tl_melbo.tables import Table

COLUMNS = ("vector", "kl_target", "kl_unrelated", "specificity", "loss_increase")
# Below this (nats), a divergence is the rounding of a vector that does nothing.
_NOTHING = 1e-6
# Where unsteered texts are as near as this (one minus their cosine), none can be made more alike.
_SAME_TEXT = 0.02


@shape_checked
def side_effects(
    model: Model,
    vectors: Vectors,
    prompts: str | Sequence[str],
    *,
    unrelated: str | Sequence[str] | None = None,
    passages: str | Sequence[str] | None = None,
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
    on_text: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Measure each vector on the prompts that it is meant for, on others, and on ordinary prose.

    Args:
        unrelated: prompts on which the vectors are to have no effect; None takes UNRELATED_PROMPTS.
        passages: raw texts that the model is to predict; None takes PASSAGES.
        on_text: called with the texts done, and the texts in all, after each.

    Returns:
        A row for each vector: vector, its position; kl_target and kl_unrelated, the mean divergence
        of the next token from unsteered, in nats; specificity, kl_target / (kl_target +
        kl_unrelated), 0.5 for a vector without effect; loss_increase on the passages, in nats a
        token. NaN where the model's numbers are not finite.

    Raises:
        ValueError: no vectors or texts; an unrelated prompt among the prompts; a passage of one
            token; as `kl_divergence` does.
    """
    library = as_library(vectors)
    meant = checks.as_texts(prompts)
    others = _others(unrelated, meant, "unrelated")
    prose = checks.as_texts(PASSAGES if passages is None else passages, "passages")
    layer = steering_layer(model, library, layer)
    options = {"layer": layer, "chat": chat, "batch_size": batch_size}
    theta = as_theta(model, library)
    # The last row is the unsteered model.
    rows = VectorAdditions.of(torch.cat([theta, torch.zeros_like(theta[:1])]), layer)

    def divergence(text: str) -> Tensor:
        return kl_divergence(model, text, library, **options)

    def loss_increase(text: str) -> Tensor:
        tokens = to_tokens(model, text)
        if tokens.shape[1] < 2:
            raise ValueError(f"passages: {text!r} is a single token; pass a sentence")

        def loss(logits: Tensor) -> Tensor:
            return mean_losses(logits[:, :-1], tokens[:, 1:].expand(len(logits), -1))

        at_once = rows_at_once(model, tokens.shape[1], batch_size)
        losses = map_rows(model, tokens, rows, loss, at_once)
        return losses[:-1] - losses[-1]

    tasks = [(divergence, text) for text in meant + others]
    tasks += [(loss_increase, text) for text in prose]
    measured = []
    for n_done, (measure, text) in enumerate(tasks, 1):
        measured.append(measure(text).double())
        if on_text is not None:
            on_text(n_done, len(tasks))
    sizes = [len(meant), len(others), len(prose)]
    on_target, on_others, losses = (part.mean(0) for part in torch.stack(measured).split(sizes))
    total = on_target + on_others
    specificity = torch.where(total < _NOTHING, 0.5, on_target / total)
    columns = (torch.arange(len(library)), on_target, on_others, specificity, losses)
    return Table({name: column.numpy() for name, column in zip(COLUMNS, columns, strict=True)})


def _others(texts: str | Sequence[str] | None, prompts: Sequence[str], argument: str) -> list[str]:
    """Other prompts than these: those given, or some that come with the package."""
    if texts is None:
        texts = [text for text in UNRELATED_PROMPTS if text not in prompts]
        if not texts:
            raise ValueError(f"{argument}: those that come with the package are prompts; pass some")
    others = checks.as_texts(texts, argument)
    for prompt in set(prompts).intersection(others):
        raise ValueError(f"{argument}: holds the prompt itself, {prompt!r}; leave it out")
    return others


@shape_checked
def reach(
    model: Model,
    vectors: Vectors,
    prompt: str,
    prompts: str | Sequence[str] | None = None,
    *,
    max_new_tokens: int = 40,
    layer: int | None = None,
    chat: bool | None = None,
    embedder: Embedder | None = None,
) -> pd.DataFrame:
    """How far does each vector transfer: has it the same effect on other prompts?

    Args:
        prompt: where the vectors were found, or are meant to act.
        prompts: the others; None takes UNRELATED_PROMPTS.

    Returns:
        A row for each vector: vector, its position; kl, the median of the next token's divergence
        from unsteered, in nats; changed, the share of prompts whose completion it changes, by more
        than spaces; agreement, sum(c - u) / sum(1 - u), c and u the cosines of its completions
        there and on `prompt`, and of the unsteered ones: NaN where it changes nothing.

    Raises:
        ValueError: no vectors or prompts; as `analysis.transfer` does.
    """
    library = as_library(vectors)
    every = [checks.as_text(prompt), *_others(prompts, [prompt], "prompts")]
    frame = transfer(model, library, every, max_new_tokens=max_new_tokens, layer=layer, chat=chat)
    # [prompt, vector]: transfer goes through the vectors for each prompt.
    shape = (len(every), len(library))
    texts = frame["completion"].tolist(), frame["unsteered_completion"].tolist()
    points = embeddings(texts[0] + texts[1], embedder or default_embedder())
    alike, anyway = (
        (some[:1] * some[1:]).sum(-1) for some in points.unflatten(0, (2, *shape)).unbind()
    )
    pairs = zip(*texts, strict=True)
    changed = torch.tensor([text.split() != other.split() for text, other in pairs]).reshape(shape)
    told = changed[:1] & changed[1:]
    room = ((1 - anyway) * told).sum(0)
    agreement = ((alike - anyway) * told).sum(0) / room
    kl = torch.from_numpy(frame["kl"].to_numpy(copy=True)).reshape(shape)[1:]
    return Table(
        {
            "vector": range(len(library)),
            "kl": kl.double().quantile(0.5, dim=0).numpy(),
            "changed": changed[1:].double().mean(0).numpy(),
            "agreement": agreement.masked_fill(room <= _SAME_TEXT * told.sum(0), torch.nan).numpy(),
        }
    )
