"""Do texts make sense? Their perplexity, how often they repeat themselves, and what that means."""

import copy
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model, frozen, plain_model, whole_model
from tl_melbo.model.tokens import context_length, to_tokens
from tl_melbo.probability import mean_losses
from tl_melbo.reading import rows_at_once
from tl_melbo.shapes import Int, Tokens, shape_checked

DEFAULT_PERPLEXITY = 11.0
DEFAULT_REPETITION = 0.4
# A short text, whose perplexity hangs on a few words, may be surprising, up to so many nats in all
# beyond the limit, if its words in another order are more so: tokens, nats, and nats a token.
COHERENCE_OF_SHORT = {"tokens": 25, "surprise": 55.0, "order": 1.0}
_SHUFFLES = 4
# Why a text is put aside.
EMPTY, REPEATS, SURPRISING = "empty", "repeats itself", "surprising"
# Stands where a shorter text has no token.
_NO_TOKEN = -100
# A prompt, and the text after it.
Pair = tuple[str, str]


def judged(
    model: Model,
    pairs: Sequence[Pair],
    chat: bool,
    largest_perplexity: float,
    largest_repetition: float,
    batch_size: int,
) -> pd.DataFrame:
    """For each text after its prompt: perplexity, repetition, and why it is put aside, or ""."""
    tokens = {text: _tokens(model, text) for _, text in pairs}
    prompts = {
        prompt: to_tokens(model, prompt, chat)
        for prompt in dict.fromkeys(asked for asked, _ in pairs)
    }
    measured = _perplexities(model, dict.fromkeys(pairs), prompts, tokens, batch_size)
    surprising = [
        pair
        for pair, perplexity in measured.items()
        if perplexity > largest_perplexity or perplexity == math.inf
    ]
    beyond = {
        (prompt, text): len(tokens[text])
        * (math.log(measured[prompt, text]) - math.log(largest_perplexity))
        for prompt, text in surprising
    }
    short = [
        pair
        for pair in surprising
        if len(tokens[pair[1]]) <= COHERENCE_OF_SHORT["tokens"]
        and beyond[pair] <= COHERENCE_OF_SHORT["surprise"]
    ]
    nonsense = {*surprising} - _ordered(model, short, measured, prompts, batch_size)
    rows = []
    for prompt, text in pairs:
        repeated = repetition(tokens[text])
        why = (
            EMPTY if not text.strip()
            else REPEATS if repeated > largest_repetition
            else SURPRISING if (prompt, text) in nonsense
            else ""
        )  # fmt: skip
        rows.append((measured[prompt, text], repeated, why))
    return pd.DataFrame(rows, columns=["perplexity", "repetition", "put_aside"])


def _ordered(
    model: Model,
    pairs: Sequence[Pair],
    measured: dict[Pair, float],
    prompts: dict[str, Tokens],
    batch_size: int,
) -> set[Pair]:
    """The texts whose words are in an order that the model expects more than others."""
    shuffled: dict[Pair, list[Pair]] = {}
    for prompt, text in pairs:
        words = text.split()
        if len(words) > 2:
            order = random.Random(text)  # the same text is judged alike each time
            shuffled[prompt, text] = [
                (prompt, " ".join(order.sample(words, len(words)))) for _ in range(_SHUFFLES)
            ]
    every = dict.fromkeys(pair for some in shuffled.values() for pair in some)
    tokens = {text: _tokens(model, text) for _, text in every}
    mixed = _perplexities(model, every, prompts, tokens, batch_size)

    def gain(pair: Pair) -> float:
        losses = [math.log(mixed[other]) for other in shuffled[pair]]
        return sum(losses) / len(losses) - math.log(measured[pair])

    return {pair for pair in shuffled if gain(pair) >= COHERENCE_OF_SHORT["order"]}


def _perplexities(
    model: Model,
    pairs: Iterable[Pair],
    prompts: dict[str, Tokens],
    tokens: dict[str, list[int]],
    batch_size: int,
) -> dict[Pair, float]:
    """Of each text after its prompt, under the unsteered model; infinite for an empty one."""
    found = dict.fromkeys(pairs, math.inf)
    for prompt, before in prompts.items():
        room = (context_length(model) or math.inf) - before.shape[1]
        texts = [text for asked, text in found if asked == prompt and tokens[text] and room > 0]
        # The longest first: neighbours are of nearly one length, so little is padded.
        texts.sort(key=lambda text: -len(tokens[text]))
        if not texts:
            continue
        longest = int(min(room, len(tokens[texts[0]])))
        rows = [torch.tensor(tokens[text][:longest]) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(rows, True, _NO_TOKEN).to(before.device)
        measured = _read(model, before, padded, batch_size)
        found |= {(prompt, text): value for text, value in zip(texts, measured, strict=True)}
    return found


def _read(
    model: Model, before: Tokens, written: Int[Tensor, "text pos"], batch_size: int
) -> list[float]:
    """The perplexity of each text, all after one prompt, which is read once.

    Padding is on the right, where a causal model does not look, so it needs no mask.
    """
    plain = plain_model(model)
    past: Any = None
    if plain is not None and before.shape[1] > 1:
        with torch.no_grad():
            past = plain(before[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def of_batch(batch: Int[Tensor, "text pos"]) -> Tensor:
        batch = batch[:, : int((batch != _NO_TOKEN).sum(-1).max())]
        read = batch[:, :-1].clamp_min(0)
        if plain is None:
            whole = torch.cat([before.expand(len(batch), -1), read], 1)
            with torch.no_grad(), frozen(*whole_model(model)):
                return mean_losses(model(whole)[:, before.shape[1] - 1 :], batch)
        cache = copy.deepcopy(past)
        if cache is not None:
            cache.batch_repeat_interleave(len(batch))
        rows = torch.cat([before[:, -1:].expand(len(batch), -1), read], 1)
        with torch.no_grad():
            return mean_losses(plain(rows, past_key_values=cache).logits, batch)

    at_once = rows_at_once(model, written.shape[1], batch_size)
    parts, _ = map_batches(of_batch, written, at_once)
    return torch.cat(parts).exp().nan_to_num(math.inf, math.inf).tolist()


@shape_checked
def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """The share of a text's n-grams that already occurred in it.

    Args:
        tokens: token ids, or anything else to count.
        n: how many tokens in a row are compared.

    Returns:
        From 0, every n-gram is new, to nearly 1; 0 for texts of fewer than n + 1 tokens.

    Raises:
        ValueError: n below one.
    """
    checks.at_least(1, n=n)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition_of(model: Model, text: str) -> float:
    """`repetition` of the tokens that the model's tokenizer makes of a text; 0 for no text."""
    return repetition(_tokens(model, text))


def _tokens(model: Model, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
