"""What does a vector cost where nobody asked for it, and how far does it reach?"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.analysis._completions import transfer
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.analysis._similarity import kl_divergence
from tl_melbo.analysis._texts import PASSAGES, UNRELATED_PROMPTS
from tl_melbo.model.bridge import Model, check_model
from tl_melbo.model.tokens import to_tokens
from tl_melbo.probability import mean_losses
from tl_melbo.reading import map_rows, rows_at_once
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.steering import Vectors, as_library, as_theta, steering_layer
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

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
    """Measure each vector on the prompt that it is meant for, on others, and on ordinary prose.

    No number here is high or low by itself: measure random vectors of the same norm beside.

    Args:
        prompts: where the vectors are meant to have an effect.
        unrelated: prompts on which they are not; None takes UNRELATED_PROMPTS.
        passages: texts that the model is to predict, as they stand; None takes PASSAGES.
        on_text: called with the texts done, and the texts in all, after each.

    Returns:
        One row a vector: vector, its position; kl_target, KL(P_vector || P_unsteered) of the next
        token after the prompt, in nats, the mean over the prompts; kl_unrelated, the same after the
        unrelated ones; specificity, kl_target / (kl_target + kl_unrelated): 1 where it acts on the
        prompts alone, 0.5 where it acts alike everywhere, or not at all; loss_increase, by how much
        it raises the loss on the passages, in nats a token. NaN where the model's numbers are not
        finite.

    Raises:
        ValueError: no vectors or texts, an empty text, an unrelated prompt that is one of the
            prompts, a passage of a single token; as `kl_divergence` does.
    """
    library = as_library(vectors)
    meant = checks.as_texts(prompts)
    others = _others(unrelated, meant, "unrelated")
    prose = checks.as_texts(PASSAGES if passages is None else passages, "passages")
    checks.batch_size(batch_size)
    place = steering_layer(model, library, layer)

    def divergence(text: str) -> Tensor:
        return kl_divergence(model, text, library, layer=place, chat=chat, batch_size=batch_size)

    def loss(text: str) -> Tensor:
        return _loss_increases(model, text, library, place, batch_size)

    parts = ((divergence, meant), (divergence, others), (loss, prose))
    tasks = [(measure, text) for measure, texts in parts for text in texts]
    measured = []
    for n_done, (measure, text) in enumerate(tasks, 1):
        measured.append(measure(text).double())
        if on_text is not None:
            on_text(n_done, len(tasks))
    on_target, on_others, losses = (
        some.mean(0) for some in torch.stack(measured).split([len(texts) for _, texts in parts])
    )
    total = on_target + on_others
    specificity = torch.where(total < _NOTHING, 0.5, on_target / total)
    columns = (torch.arange(len(library)), on_target, on_others, specificity, losses)
    return Table({name: column.numpy() for name, column in zip(COLUMNS, columns, strict=True)})


def _others(texts: str | Sequence[str] | None, prompts: Sequence[str], argument: str) -> list[str]:
    """Other prompts than these: those given, or some that come with the package."""
    if texts is None:
        others = [text for text in UNRELATED_PROMPTS if text not in prompts]
        if not others:
            raise ValueError(f"{argument}: those that come with the package are prompts; pass some")
        return others
    others = checks.as_texts(texts, argument)
    for prompt in set(prompts).intersection(others):
        raise ValueError(f"{argument}: holds the prompt itself, {prompt!r}; leave it out")
    return others


def _loss_increases(
    model: Model, text: str, library: SteeringVectors, layer: int, batch_size: int
) -> Float[Tensor, "vector"]:
    """By how much each vector raises the loss on a text, in nats a token."""
    tokens = to_tokens(model, text)
    if tokens.shape[1] < 2:
        raise ValueError(f"passages: {text!r} is a single token; pass a sentence")

    def loss(logits: Tensor) -> Tensor:
        return mean_losses(logits[:, :-1], tokens[:, 1:].expand(len(logits), -1))

    theta = as_theta(model, library)
    # The last row is the unsteered model.
    theta = torch.cat([theta, torch.zeros_like(theta[:1])])
    at_once = rows_at_once(model, tokens.shape[1], batch_size)
    losses = map_rows(model, tokens, theta, layer, loss, at_once)
    return losses[:-1] - losses[-1]


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

    Its completions on two prompts are compared by their embeddings, beyond how alike the unsteered
    ones are. `analysis.transfer` gives the completions themselves.

    Args:
        prompt: where the vectors were found, or are meant to act.
        prompts: the others; None takes UNRELATED_PROMPTS.

    Returns:
        One row a vector: vector, its position; kl, the median over the prompts of the next token's
        divergence from unsteered, in nats; changed, the share of prompts whose completion it
        changes, by more than spaces; agreement, how much more alike its completions there and on
        `prompt` are than the unsteered ones: 1, the same text everywhere; 0, no more alike; below,
        more different. It is the sum of c - u over the sum of 1 - u, c and u the cosines of the
        steered and of the unsteered pair, over the prompts where it changes both completions; NaN
        where there are none.

    Raises:
        ValueError: no vectors or prompts; as `analysis.transfer` does.
    """
    check_model(model)
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
    # Not from the points: the same text in another batch is a rounding error away.
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
