"""Continuations of a batch of prompts that an adapted model samples, with a KV cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_melbo.additions import Additions
from tl_melbo.errors import NotFinite
from tl_melbo.generation import greedy
from tl_melbo.model.bridge import Model, frozen, model_name, whole_model
from tl_melbo.model.tokens import end_tokens
from tl_melbo.reading import adding_below
from tl_melbo.shapes import Bool, Int, Tokens
from tl_melbo.steering import hooked


def generator(*key: int) -> torch.Generator:
    """Random numbers of their own for each key, such as a seed and the number of an adapter."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class Sampled(NamedTuple):
    """Prompts with what was sampled after them, its end included, padded at the right.

    `sampled` tells which tokens were sampled; `text` which are of the prompt or were sampled.
    """

    tokens: Int[Tensor, "prompt pos"]
    sampled: Bool[Tensor, "prompt pos"]
    text: Bool[Tensor, "prompt pos"]


@contextmanager
def running(model: Model, plain: Any, rows: Additions) -> Iterator[Any]:
    """The Hugging Face model with these additions; gradients flow into them, and nowhere else."""
    if plain is None:
        with frozen(*whole_model(model)), hooked(model, rows):
            yield model.original_model
    else:
        with adding_below(model, plain, rows):
            yield plain


def check_can_sample(model: Model) -> None:
    """A bridge can: it has the Hugging Face model's own loop."""
    if not hasattr(model, "original_model"):
        raise TypeError("model: a HookedTransformer; pass a TransformerBridge, as from load_model")


@torch.no_grad()
def sample(
    model: Model,
    plain: Any,
    rows: Additions,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    generator: torch.Generator,
) -> Sampled:
    """Sample at temperature 1 after each prompt; the numbers come from this generator alone."""
    from transformers import LogitsProcessorList

    ends = end_tokens(model.tokenizer, model.original_model, int(model.cfg.d_vocab))
    texts = [tokens[0] for tokens in prompts]
    padded = pad_sequence(texts, True, (ends or [0])[0], "left")
    mask = pad_sequence([torch.ones_like(text) for text in texts], True, 0, "left")
    choice = LogitsProcessorList([_Drawn(generator, model_name(model))])
    with running(model, plain, rows) as runs:
        # Always the likeliest, after what is drawn has been made that.
        writes, config = greedy(runs, max_new_tokens, ends)
        out = writes.generate(
            input_ids=padded, attention_mask=mask, generation_config=config, logits_processor=choice
        )
    return _put_right(out, [len(text) for text in texts], padded.shape[1], ends)


class _Drawn:
    """Scores whose largest is a sample from the softmax of the logits: p / q, q exponential."""

    def __init__(self, generator: torch.Generator, name: str) -> None:
        self.generator, self.name = generator, name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():
            what = f"the logits of {self.name} with the adapter are not finite"
            raise NotFinite(f"{what}; use a smaller length or learning rate, or a wider type")
        # On the CPU, so that all devices draw the same.
        noise = torch.empty(scores.shape).exponential_(generator=self.generator)
        return scores.float() - noise.log().to(scores.device)


def _put_right(out: Tensor, lengths: list[int], longest: int, ends: Sequence[int]) -> Sampled:
    """From left padding to right padding, and where each text ends."""
    new = out[:, longest:]
    is_end = torch.isin(new, torch.tensor(ends, device=out.device, dtype=out.dtype))
    counted = is_end.cumsum(1) - is_end.long() == 0  # the token that ends it, too
    tokens = torch.full_like(out, (list(ends) or [0])[0])
    sampled = torch.zeros_like(out, dtype=torch.bool)
    text = torch.zeros_like(sampled)
    for row, length in enumerate(lengths):
        width = length + new.shape[1]
        tokens[row, :width] = out[row, longest - length :]
        sampled[row, length:width] = counted[row]
        text[row, :length] = True
    return Sampled(tokens, sampled, text | sampled)
