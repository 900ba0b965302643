"""Let the model write under each vector."""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.additions import Additions
from tl_melbo.engines import Engine
from tl_melbo.engines._request import texts_by
from tl_melbo.errors import warn_of_rows
from tl_melbo.memory import free_memory, map_batches
from tl_melbo.model.bridge import Model, model_device, model_name, plain_model
from tl_melbo.model.tokens import check_room, end_tokens, to_tokens
from tl_melbo.reading import adding, read_ahead
from tl_melbo.shapes import Tokens, shape_checked
from tl_melbo.steering import Steerable, as_chat, place_told, steering_rows
from tl_melbo.text import quoted

if TYPE_CHECKING:
    import pandas as pd

# Of samples, where nothing else is asked for.
DEFAULT_TEMPERATURE = 0.7
# Prompts of one length are written together, up to so many texts.
_TEXTS_OF_SEVERAL = 32
OnBatch = Callable[[int, int], None]
# Of a part: called with the share that is done, or with what is done of it and its whole.
Tell = Callable[..., None]
_Write = Callable[[Tensor, Tensor, Tokens], tuple[list[str], list[bool]]]


@shape_checked
def generate(
    model: Model,
    prompts: str | Sequence[str],
    vectors: Steerable | None = None,
    layer: int | None = None,
    *,
    scales: float | Sequence[float] = 1.0,
    max_new_tokens: int = 50,
    n_samples: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    chat: bool | None = None,
    batch_size: int = 128,
    engine: Engine | None = None,
    on_batch: OnBatch | None = None,
) -> "pd.DataFrame":
    """Let the model write under each vector, at each scale, after each prompt.

    Args:
        vectors: added to the prompt and to every new token: vectors, vectors of several layers,
            adapters or gated factors; None for the unsteered model.
        layer: None takes the layer that the vectors were found at.
        n_samples: so many sampled completions of each, after the greedy one; None writes one
            completion of each, greedy or sampled as `temperature` says.
        temperature: 0 takes the likeliest token (greedy), above 0 samples. None takes 0, or 0.7
            with `n_samples`.
        seed: for sampling. Each row draws from a generator of its own, by its vector, scale, sample
            and its prompt's place in the list: the batch size changes nothing but rounding.
        chat: None takes the format that the vectors were found with.
        engine: what writes instead of the model, such as `tm.engines.vllm(folder)`. Its samples
            are drawn from other numbers than ours.
        batch_size: the most texts written at once; fewer where their keys and values would fill
            more than a quarter of the free memory.
        on_batch: called with the texts written, and those in all, after each batch.

    Returns:
        A frame with the columns vector (position in `vectors`, or -1 for unsteered), scale, prompt,
        completion; with `n_samples` also sample, 0 for greedy, before prompt; and `attrs["chat"]`,
        how the prompts were formatted.

    Raises:
        NotFinite: the logits after a prompt are not finite under any of the vectors; a warning if
            only under some, whose completions end there.
    """
    from tl_melbo.tables import Table

    factors = [scales] if isinstance(scales, int | float) else list(scales)
    checks.at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size, n_samples=n_samples)
    checks.seed(seed)
    temperature, samples = _sampling(n_samples, temperature)
    if not factors or not all(math.isfinite(factor) for factor in factors):
        raise ValueError(f"scales={factors}: one finite number, or several")
    rows = steering_rows(model, vectors, layer, factors)
    texts, chat = checks.as_texts(prompts), as_chat(vectors, chat)
    prompt_tokens = [to_tokens(model, text, chat) for text in texts]
    check_room(model, prompt_tokens, max_new_tokens)
    numbers = range(len(rows) // len(factors))
    places = [(i, float(factor)) for factor in factors for i in numbers]
    places = [(-1, 0.0)] if vectors is None else places
    labels = [(*place, sample) for sample in samples for place in places]
    if engine is not None:
        drawn = (temperature, seed, max_new_tokens, on_batch)
        completions, bad = texts_by(engine, model, prompt_tokens, rows, labels, *drawn), []
    else:
        write = _writer(model, rows, max_new_tokens, temperature)
        drawn = (max_new_tokens, seed, batch_size, on_batch)
        completions, bad = _by_model(model, write, prompt_tokens, len(rows), labels, *drawn)
    frame = Table(labels * len(texts), columns=["vector", "scale", "sample"])
    frame["prompt"] = [text for text in texts for _ in labels]
    frame["completion"] = completions
    frame = frame if n_samples else frame.drop(columns="sample")
    frame.attrs["chat"] = chat
    labels = zip(frame["vector"], frame["scale"], frame["prompt"], strict=True)
    names = [f"{vector} at scale {scale:g} after {quoted(text)}" for vector, scale, text in labels]
    what = f"what {model_name(model)} writes, steered {place_told(rows)},"
    warn_of_rows(bad, what, "their completions end where it began", names)
    return frame


def _by_model(
    model: Model,
    write: _Write,
    prompts: Sequence[Tokens],
    n_rows: int,
    labels: Sequence[tuple[int, float, int]],
    max_new_tokens: int,
    seed: int,
    batch_size: int,
    on_batch: OnBatch | None,
) -> tuple[list[str], list[bool]]:
    """One text a prompt and label, and whether its logits were not finite."""
    # The samples of a vector are neighbours: they share the reading of their prompt.
    places = torch.arange(len(labels)) % n_rows
    order = places.argsort(stable=True)
    found, total = {}, len(prompts) * len(labels)
    for numbers in _of_one_length(prompts, min(batch_size, _TEXTS_OF_SEVERAL) // len(labels)):
        keys = [(number, label) for number in numbers for label in order.tolist()]
        named = [(number, *labels[label]) for number, label in keys]
        drawn = [_draws(max_new_tokens, each[-1] > 0, seed, *each) for each in named]
        tokens = torch.cat([prompts[number] for number, _ in keys])
        texts = (places[order].repeat(len(numbers)), torch.stack(drawn), tokens)
        tell = in_parts(on_batch, [len(found), len(keys), total - len(found) - len(keys)])[1]
        at_once = min(batch_size, _fitting(model, tokens.shape[1], max_new_tokens))

        def write_some(some: Tensor, texts: Any = texts) -> tuple[list[str], list[bool]]:
            return write(*(each[some] for each in texts))

        parts, fitting = map_batches(write_some, torch.arange(len(keys)), at_once, tell)
        batch_size = batch_size if fitting == at_once else fitting
        written = [each for some in parts for each in zip(*some, strict=True)]
        found.update(zip(keys, written, strict=True))
    written, not_finite = zip(*(found[key] for key in sorted(found)), strict=True)
    return list(written), list(not_finite)


def _fitting(model: Model, n_prompt: int, n_new: int) -> int:
    """How many texts fill a quarter of the free memory with keys and values."""
    cfg, weight = model.cfg, next(model.parameters())
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    a_text = 2 * int(cfg.n_layers) * int(heads) * int(cfg.d_head) * (n_prompt + n_new)
    if not hasattr(model, "original_model"):
        a_text += n_prompt * int(cfg.d_vocab)  # a HookedTransformer makes logits of whole prompts
    free = free_memory(model_device(model)) / 4
    return max(1, int(free / (weight.element_size() * max(1, a_text))))


def _of_one_length(prompts: Sequence[Tokens], at_once: int) -> Iterator[list[int]]:
    """The numbers of prompts of as many tokens, at least one and at most so many at a time."""
    numbers = sorted(range(len(prompts)), key=lambda number: prompts[number].shape[1])
    for _, alike in itertools.groupby(numbers, lambda number: prompts[number].shape[1]):
        while some := list(itertools.islice(alike, max(1, at_once))):
            yield some


def in_parts(on_batch: OnBatch | None, sizes: Sequence[int]) -> list[Tell]:
    """For each part of some work, of these sizes, what tells how much of all is done."""
    tell, total = on_batch or (lambda *_: None), sum(sizes)

    def of_part(before: int, size: int) -> Tell:
        return lambda there, wanted=1: tell(before + round(size * there / wanted), total)

    return [of_part(sum(sizes[:part]), size) for part, size in enumerate(sizes)]


def _sampling(n_samples: int | None, temperature: float | None) -> tuple[float, list[int]]:
    """The temperature, and the numbers of the completions of each row: 0 is greedy."""
    if temperature is None:
        temperature = DEFAULT_TEMPERATURE if n_samples else 0.0
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: 0 for greedy, or a positive finite number")
    if n_samples and temperature == 0:
        given = f"temperature=0 with n_samples={n_samples}: all would be the greedy completion"
        raise ValueError(f"{given}; pass a positive temperature, such as 0.7")
    return temperature, list(range(n_samples + 1)) if n_samples else [int(temperature > 0)]


def _draws(n_tokens: int, is_sampled: bool, *name: float) -> Tensor:
    """Where in the distribution of each new token a row's text takes it; NaN for the likeliest."""
    if not is_sampled:
        return torch.full((n_tokens,), torch.nan, dtype=torch.float64)
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    own = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(n_tokens, generator=own, dtype=torch.float64)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lend the global generators, from which libraries sample, this seed."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


def _writer(model: Model, added: Additions, max_new_tokens: int, temperature: float) -> _Write:
    """From places in `added`, draws and tokens to a text a row, and if logits were not finite."""
    from transformers import LogitsProcessorList

    plain, bridged = plain_model(model), getattr(model, "original_model", None)
    ends = end_tokens(model.tokenizer, bridged, int(model.cfg.d_vocab))
    shares, writes, config = plain is not None, bridged if plain is None else plain, None
    if writes is not None:
        writes, config = greedy(writes, max_new_tokens, ends)

    def write(places: Tensor, draws: Tensor, rows: Tokens) -> tuple[list[str], list[bool]]:
        nonlocal shares
        past: dict[str, Any] = {}
        choice = _Choice(draws, torch.tensor(ends, device=rows.device), temperature)
        if shares and rows.shape[1] > 1:
            past = _past(model, plain, added, places, rows)
            shares = bool(past)
        with adding(model, plain, added[places]):
            if writes is None:  # a HookedTransformer
                with model.unembed.register_forward_hook(choice.of_logits):
                    out = model.generate(
                        rows, max_new_tokens, do_sample=False, return_type="tokens", verbose=False
                    )
            else:
                out = writes.generate(
                    input_ids=rows,
                    attention_mask=torch.ones_like(rows),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([choice]),
                    **past,
                )
        new = out[:, rows.shape[1] :].tolist()
        kept = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in new]
        texts = [str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in kept]
        return texts, choice.not_finite.tolist()

    return write


def greedy(hf_model: Any, max_new_tokens: int, ends: Sequence[int]) -> tuple[Any, Any]:
    """A model that writes the likeliest tokens, and the configuration to pass to its `generate`.

    With no settings but ours: some models bring a penalty or a temperature along.
    """
    from transformers import GenerationConfig

    writes = copy.copy(hf_model)
    writes.generation_config = GenerationConfig()
    told = {"eos_token_id": [*ends] or None, "pad_token_id": [*ends, None][0]}
    return writes, GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **told)


def _past(
    model: Model, plain: Any, added: Additions, places: Tensor, tokens: Tokens
) -> dict[str, Any]:
    """The keys and values of prompts but for their last tokens, read once for each vector."""
    read = torch.cat([places[:, None].to(tokens.device), tokens[:, :-1]], 1)
    distinct, rows = read.unique(dim=0, return_inverse=True)
    places, tokens = distinct[:, 0].cpu(), distinct[:, 1:]
    if (tokens == tokens[0]).all():
        # One row runs up to the first steered layer, and the vectors make many of it.
        tokens = tokens[:1]
    with adding(model, plain, added[places]):
        past = read_ahead(plain, tokens)
    for cache in past.values():
        for layer in cache.layers:
            layer.batch_select_indices(rows % len(layer.keys))
    return past


class _Choice:
    """The scores by which the next token is picked: a text ends where they are not finite."""

    def __init__(self, draws: Tensor, ends: Tensor, temperature: float) -> None:
        self.ends, self.temperature, self.n_written = ends, temperature, 0
        self.draws = draws.to(ends.device)
        self.not_finite = torch.zeros(len(draws), dtype=torch.bool, device=ends.device)
        self.ended = self.not_finite.clone()

    def of_logits(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        """A hook for a HookedTransformer, whose `generate` takes no function for its scores."""
        unknown = torch.full((len(logits), 1), -1, device=logits.device)
        return self(unknown, logits[:, -1].float())[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.n_written:
            self.ended |= torch.isin(input_ids[:, -1], self.ends)
        draws = self.draws[:, self.n_written, None]
        self.n_written += 1
        # The largest is NaN if any is.
        largest = scores.amax(-1, keepdim=True)
        self.not_finite |= ~(largest[:, 0].isfinite() | self.ended)
        is_drawn = ~draws.isnan()
        if is_drawn.any():
            scores = torch.where(is_drawn, self._drawn(scores - largest, draws), scores)
        certain = torch.full_like(scores[0], -torch.inf)
        certain[int(self.ends[0]) if len(self.ends) else 0] = 0.0
        return torch.where((self.not_finite | self.ended)[:, None], certain, scores)

    def _drawn(self, scores: Tensor, draws: Tensor) -> Tensor:
        """Scores that leave one token of each row: where its cumulated probability passes `draws`.

        From the largest score down, so that no temperature makes infinities.
        """
        cumulated = (scores.double() / self.temperature).exp().cumsum(-1)
        token = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True)
        token = token.clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
