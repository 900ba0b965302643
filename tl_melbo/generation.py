"""Let the model write under each vector."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.additions import Additions
from tl_melbo.errors import warn_of_rows
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model, model_name, plain_model
from tl_melbo.model.tokens import check_room, end_tokens, to_tokens
from tl_melbo.reading import adding
from tl_melbo.shapes import Tokens, shape_checked
from tl_melbo.steering import Steerable, as_chat, place_told, steering_rows
from tl_melbo.text import quoted

if TYPE_CHECKING:
    import pandas as pd


@shape_checked
def generate(
    model: Model,
    prompts: str | Sequence[str],
    vectors: Steerable | None = None,
    layer: int | None = None,
    *,
    scales: float | Sequence[float] = 1.0,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
    batch_size: int = 32,
) -> "pd.DataFrame":
    """Let the model write under each vector, at each scale, after each prompt.

    Args:
        vectors: added to the prompt and to every new token: vectors, vectors of several layers, or
            adapters; None for the unsteered model.
        layer: None takes the layer that the vectors were found at.
        temperature: 0 takes the likeliest token (greedy), above 0 samples.
        seed: for sampling: the same texts, if all else is the same, the batch size included.
        chat: None takes the format that the vectors were found with.

    Returns:
        A frame with the columns vector (position in `vectors`, or -1 for unsteered), scale, prompt,
        completion; and `attrs["chat"]`, how the prompts were formatted.

    Raises:
        NotFinite: the logits after a prompt are not finite under any of the vectors; a warning if
            only under some, whose completions end there.
    """
    import pandas as pd

    from tl_melbo.tables import Table

    factors = [scales] if isinstance(scales, int | float) else list(scales)
    checks.at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    checks.seed(seed)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: 0 for greedy, or a positive finite number")
    if not factors or not all(math.isfinite(factor) for factor in factors):
        raise ValueError(f"scales={factors}: one finite number, or several")
    rows = steering_rows(model, vectors, layer, factors)
    texts, chat = checks.as_texts(prompts), as_chat(vectors, chat)
    prompt_tokens = [to_tokens(model, text, chat) for text in texts]
    check_room(model, prompt_tokens, max_new_tokens)
    numbers = range(len(rows) // len(factors))
    labels = [(i, float(factor)) for factor in factors for i in numbers]
    labels = [(-1, 0.0)] if vectors is None else labels
    write = _writer(model, max_new_tokens, temperature)
    frames, not_finite = [], []
    with seeded(seed):
        for text, tokens in zip(texts, prompt_tokens, strict=True):
            written, batch_size = map_batches(partial(write, tokens), rows, batch_size)
            completions = [each for some, _ in written for each in some]
            not_finite += [is_bad for _, some in written for is_bad in some]
            frame = pd.DataFrame(labels, columns=["vector", "scale"])
            frames.append(frame.assign(prompt=text, completion=completions))
    frame = Table(pd.concat(frames, ignore_index=True))
    frame.attrs["chat"] = chat
    labels = zip(frame["vector"], frame["scale"], frame["prompt"], strict=True)
    names = [f"{vector} at scale {scale:g} after {quoted(text)}" for vector, scale, text in labels]
    what = f"what {model_name(model)} writes, steered {place_told(rows)},"
    warn_of_rows(not_finite, what, "their completions end where it began", names)
    return frame


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lend the global generators, from which libraries sample, this seed."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


def _writer(
    model: Model, max_new_tokens: int, temperature: float
) -> Callable[[Tokens, Additions], tuple[list[str], list[bool]]]:
    """A function that writes one text a row, and tells whether its logits were not finite."""
    from transformers import GenerationConfig, LogitsProcessorList

    plain, bridged = plain_model(model), getattr(model, "original_model", None)
    ends = end_tokens(model.tokenizer, bridged, int(model.cfg.d_vocab))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    only_ours = {"top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(
        eos_token_id=ends or None, pad_token_id=(ends or [None])[0], **options, **only_ours
    )
    # With no settings but ours: some models bring a penalty or a temperature along.
    writes = copy.copy(bridged if plain is None else plain)
    if writes is not None:
        writes.generation_config = GenerationConfig()

    def write(tokens: Tokens, added: Additions) -> tuple[list[str], list[bool]]:
        rows = tokens.expand(len(added), -1)
        choice = _Choice(len(added), torch.tensor(ends, device=tokens.device), temperature)
        with adding(model, plain, added):
            if writes is None:  # a HookedTransformer
                with model.unembed.register_forward_hook(choice.of_logits):
                    out = model.generate(rows, return_type="tokens", verbose=False, **options)
            else:
                out = writes.generate(
                    input_ids=rows,
                    attention_mask=torch.ones_like(rows),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([choice]),
                )
        new = out[:, tokens.shape[1] :].tolist()
        kept = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in new]
        texts = [str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in kept]
        return texts, choice.not_finite.tolist()

    return write


class _Choice:
    """The scores by which the next token is picked: a text ends where they are not finite."""

    def __init__(self, n_rows: int, ends: Tensor, temperature: float) -> None:
        self.ends, self.temperature, self.began = ends, temperature, False
        self.not_finite = torch.zeros(n_rows, dtype=torch.bool, device=ends.device)
        self.ended = self.not_finite.clone()

    def of_logits(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        """A hook for a HookedTransformer, whose `generate` takes no function for its scores."""
        unknown = torch.full((len(logits), 1), -1, device=logits.device)
        return self(unknown, logits[:, -1].float())[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.began:
            self.ended |= torch.isin(input_ids[:, -1], self.ends)
        self.began = True
        # The largest is NaN if any is.
        largest = scores.amax(-1, keepdim=True)
        self.not_finite |= ~(largest[:, 0].isfinite() | self.ended)
        if self.temperature > 0:
            # From the largest down, so that no temperature makes infinities.
            scores = (scores - largest) / self.temperature
        certain = torch.full_like(scores[0], -torch.inf)
        certain[int(self.ends[0]) if len(self.ends) else 0] = 0.0
        return torch.where((self.not_finite | self.ended)[:, None], certain, scores)
