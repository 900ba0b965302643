"""Are texts coherent? Their perplexity, how often they repeat themselves, and what that means."""

import copy
import functools
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.generation import OnBatch, Tell, in_parts
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model, at_rest, plain_model
from tl_melbo.model.tokens import context_length, to_tokens
from tl_melbo.probability import mean_losses
from tl_melbo.reading import read_ahead, rows_at_once
from tl_melbo.shapes import Int, Tokens, shape_checked

DEFAULT_PERPLEXITY = 11.0
DEFAULT_REPETITION = 0.4
# The perplexity of a short completion depends on a few words. It is coherent if it exceeds the
# limit by at most so many nats in all, and its words in another order cost so many more a token.
COHERENCE_OF_SHORT = {"tokens": 25, "surprise": 55.0, "order": 1.0}
_SHUFFLES = 4
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
    on_batch: OnBatch | None = None,
) -> pd.DataFrame:
    """For each text after its prompt: perplexity, repetition, and why it is filtered out, or ""."""
    reader = _Reader(model, [prompt for prompt, _ in pairs], chat, batch_size)
    measured = reader.perplexities(pairs, on_batch)
    high = {
        pair for pair, value in measured.items() if value > largest_perplexity or value == math.inf
    }
    shuffled = {}
    for prompt, text in sorted(high):
        length, words = len(reader.tokens(text)), text.split()
        excess = length * (math.log(measured[prompt, text]) - math.log(largest_perplexity))
        short = length <= COHERENCE_OF_SHORT["tokens"] and excess <= COHERENCE_OF_SHORT["surprise"]
        if short and len(words) > 2:
            order = random.Random(text)  # the same text is judged alike each time
            mixed = [" ".join(order.sample(words, len(words))) for _ in range(_SHUFFLES)]
            shuffled[prompt, text] = [(prompt, other) for other in mixed]
    read = reader.perplexities(pair for mixed in shuffled.values() for pair in mixed)
    for pair, mixed in shuffled.items():
        loss = statistics.fmean(math.log(read[other]) for other in mixed)
        if loss - math.log(measured[pair]) >= COHERENCE_OF_SHORT["order"]:
            high.remove(pair)
    rows = []
    for pair in pairs:
        repeated = repetition(reader.tokens(pair[1]))
        why = "high perplexity" if pair in high else ""
        why = "repeats itself" if repeated > largest_repetition else why
        rows.append((measured[pair], repeated, why if pair[1].strip() else "empty"))
    return pd.DataFrame(rows, columns=["perplexity", "repetition", "filtered_out"])


class _Reader:
    """The unsteered model, reading texts after their prompts."""

    def __init__(self, model: Model, prompts: Sequence[str], chat: bool, batch_size: int) -> None:
        self.model, self.plain, self.batch_size = model, plain_model(model), batch_size
        self.prompts = {text: to_tokens(model, text, chat) for text in dict.fromkeys(prompts)}
        self.tokens = functools.cache(functools.partial(tokens_of, model))

    def perplexities(self, pairs: Iterable[Pair], tell: OnBatch | None = None) -> dict[Pair, float]:
        """Of each text after its prompt; infinite for an empty one."""
        found = dict.fromkeys(pairs, math.inf)
        counts = Counter(prompt for prompt, _ in found)
        tells = in_parts(tell, [counts[prompt] for prompt in self.prompts])
        for (prompt, before), of_prompt in zip(self.prompts.items(), tells, strict=True):
            room = (context_length(self.model) or math.inf) - before.shape[1]
            texts = [text for asked, text in found if asked == prompt and self.tokens(text)]
            if texts and room > 0:
                # The longest first: neighbours are of nearly one length, so little is padded.
                texts.sort(key=lambda text: -len(self.tokens(text)))
                longest = int(min(room, len(self.tokens(texts[0]))))
                cut = [self.tokens(text)[:longest] for text in texts]
                values = self._read(before, cut, of_prompt)
                found |= {(prompt, text): value for text, value in zip(texts, values, strict=True)}
        return found

    def _read(self, before: Tokens, texts: Sequence[list[int]], tell: Tell) -> list[float]:
        """The perplexity of each text, all after one prompt, which is read once."""
        rows = [torch.tensor(text) for text in texts]
        written = torch.nn.utils.rnn.pad_sequence(rows, True, _NO_TOKEN).to(before.device)
        past: dict[str, Any] = {}
        if self.plain is not None and before.shape[1] > 1:
            with torch.no_grad():
                past = read_ahead(self.plain, before[:, :-1])

        def of_batch(batch: Int[Tensor, "text pos"]) -> Tensor:
            batch = batch[:, : int((batch != _NO_TOKEN).sum(-1).max())]
            asked = before[:, -1:] if past else before
            rows = torch.cat([asked.expand(len(batch), -1), batch[:, :-1].clamp_min(0)], 1)
            wanted = batch.shape[1]
            given = copy.deepcopy(past)
            for cache in given.values():
                cache.batch_repeat_interleave(len(batch))
            with torch.no_grad():
                if self.plain is None:
                    with at_rest(self.model):
                        logits = self.model(rows)
                else:
                    given |= {"use_cache": bool(past), "logits_to_keep": wanted}
                    logits = self.plain(rows, **given).logits
            return mean_losses(logits[:, -wanted:], batch)

        at_once = rows_at_once(self.model, written.shape[1], self.batch_size)
        parts, _ = map_batches(of_batch, written, at_once, tell)
        return torch.cat(parts).exp().nan_to_num(math.inf, math.inf).tolist()


@shape_checked
def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """The share of a text's n-grams that already occurred in it, from 0 to nearly 1."""
    checks.at_least(1, n=n)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def tokens_of(model: Model, text: str) -> list[int]:
    """The tokens of a completion; none for one without a visible character."""
    return model.tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
