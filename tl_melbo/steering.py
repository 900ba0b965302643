"""Put vectors into a model: hooks, next-token log-probabilities, generation."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_melbo.finite import warn_of_rows
from tl_melbo.geometry import random_sphere
from tl_melbo.memory import is_out_of_memory, map_batches
from tl_melbo.models import (
    Model,
    check_layer,
    check_model,
    context_length,
    frozen,
    model_name,
    residual_hook_name,
    to_tokens,
    user_hooks,
    whole_model,
)
from tl_melbo.shapes import Bool, Float, Int, Theta, Tokens, checked_slice, shape_checked
from tl_melbo.text import quoted
from tl_melbo.vectors import SteeringVectors

if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.fast_generation import Writer

Vectors = SteeringVectors | Float[Tensor, "d_model"] | Theta
# Beside Vectors in one signature: an axis of the same name would have to be of the same size.
Reference = SteeringVectors | Float[Tensor, "d_model"] | Float[Tensor, "reference d_model"]
Positions = slice | Sequence[int]

# How far logits of the fast way may be from the model's own, relative to their size.
_FAST_TOLERANCE = 1e-5
# So much of a prompt shows whether the fast way does the same.
_PROBE_TOKENS = 12


@contextmanager
@shape_checked
def steered(
    model: Model,
    vectors: Vectors,
    layer: int | None = None,
    *,
    scale: float = 1.0,
    positions: Positions = slice(None),
) -> Iterator[Model]:
    """Add vectors to the residual stream after a layer, for everything the model does inside.

        with steered(model, found[5]):
            print(model.generate("Once upon a time"))

    Contexts nest: their vectors add up. Whatever happens inside, this hook goes and others stay.

    Args:
        model: a TransformerLens model.
        vectors: one vector for every row of the batch, or exactly one for each row.
        layer: after which block to add; None takes the layer that `vectors` were found at.
        scale: a factor, negative to go the other way.
        positions: which tokens of the sequence to steer: a slice or a list of indices, counted on
            what the first forward pass brings (the prompt). Tokens generated from the KV cache are
            steered if the slice has no end.

    Raises:
        TypeError: `model` is not a TransformerLens model, or `vectors` are not vectors.
        ValueError: wrong width, not finite, unknown layer, no layer given or known, or, inside, a
            batch whose size is neither that of `vectors` nor any size for a single one.
    """
    check_model(model)
    theta = _scaled(model, vectors, scale)
    layer = steering_layer(model, vectors, layer)
    positions = _checked_positions(positions)
    past_length = _PastLength(layer)

    def add(module: nn.Module, args: Any, residual: Tensor) -> Tensor:
        rows, length = residual.shape[:2]
        if len(theta) not in (1, rows):
            raise ValueError(
                f"vectors: {len(theta)} vectors, but a batch of {rows} came by; steer with one "
                "vector, or with one for each row"
            )
        if past_length.value == 0:
            past_length.prompt = length
        chosen = _chosen_positions(positions, past_length.value, length, past_length.prompt)
        addend = theta.to(residual.device, residual.dtype)[:, None, :]
        return torch.where(chosen.to(residual.device)[None, :, None], residual + addend, residual)

    handles = [
        model.blocks[layer].register_forward_pre_hook(past_length.read, with_kwargs=True),
        model.hook_dict[residual_hook_name(layer)].register_forward_hook(add),
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@shape_checked
def next_token_log_probs(
    model: Model,
    prompt: str,
    vectors: Vectors | None = None,
    layer: int | None = None,
    *,
    scale: float = 1.0,
    chat: bool | None = None,
    batch_size: int = 32,
) -> Float[Tensor, "vector d_vocab"]:
    """Log-probabilities of the token after the prompt, one row a vector.

    Args:
        model: a TransformerLens model.
        prompt: one text.
        vectors: which vectors to add, each in a row of its own; None for the unsteered model.
        layer: after which block to add them; None takes the layer that they were found at.
        scale: a factor on every vector.
        chat: format the prompt as chat; None does as was done when the vectors were found, or
            else does not.
        batch_size: rows of the batch.

    Returns:
        Natural logarithms, float32, on the CPU; their exponentials sum to one in each row.

    Raises:
        TypeError, ValueError: as `steered` and `to_tokens` do.
        FloatingPointError: the logits are not finite under any of the vectors, or without.

    Warns:
        UserWarning: they are not finite under some vectors, whose rows are NaN.
    """
    check_model(model)
    check_batch_size(batch_size)
    if vectors is None:
        tokens = to_tokens(model, prompt, as_chat(None, chat))
        with torch.no_grad(), frozen(*whole_model(model)):
            log_probs = model(tokens)[:, -1].float().log_softmax(-1).cpu()
        if log_probs.isnan().any():
            raise FloatingPointError(
                f"what {model_name(model)} makes of {quoted(prompt)} is not finite; load the model "
                "in a wider type, for example dtype=torch.float32"
            )
        return log_probs
    layer = steering_layer(model, vectors, layer)
    log_probs = log_probs_or_nan(
        model, prompt, vectors, layer, scale=scale, chat=chat, batch_size=batch_size
    )
    warn_of_log_probs(model, prompt, layer, log_probs.isnan().all(-1))
    return log_probs


def log_probs_or_nan(
    model: Model,
    prompt: str,
    vectors: Vectors,
    layer: int | None,
    *,
    scale: float,
    chat: bool | None,
    batch_size: int,
) -> Float[Tensor, "vector d_vocab"]:
    """`next_token_log_probs`, with rows of NaN, and no word, where logits are not finite."""
    tokens = to_tokens(model, prompt, as_chat(vectors, chat))
    layer = steering_layer(model, vectors, layer)

    def of_batch(theta: Theta) -> Tensor:
        with torch.no_grad(), frozen(*whole_model(model)), steered(model, theta, layer):
            logits = model(tokens.expand(len(theta), -1))[:, -1]
        return logits.float().log_softmax(-1).cpu()

    parts, _ = map_batches(of_batch, _scaled(model, vectors, scale), batch_size)
    log_probs = torch.cat(parts)
    return log_probs.masked_fill(log_probs.isnan().any(-1, keepdim=True), torch.nan)


def warn_of_log_probs(model: Model, prompt: str, layer: int, bad: Tensor) -> None:
    """Say under which vectors the logits after a prompt are not finite.

    Raises:
        FloatingPointError: under all of them.
    """
    what = f"what {model_name(model)}, steered after layer {layer}, makes of {quoted(prompt)}"
    warn_of_rows(bad.tolist(), what, "what is measured there is NaN")


@shape_checked
def generate(
    model: Model,
    prompts: str | Sequence[str],
    vectors: Vectors | None = None,
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

    Every row of a batch has its own vector, added to the prompt and to every new token; a KV cache
    is used. Text ends where the model ends it.

    Args:
        model: a TransformerLens model.
        prompts: one text or several.
        vectors: which vectors to add; None for the unsteered model.
        layer: after which block to add them; None takes the layer that they were found at.
        scales: one factor or several, negative ones included.
        max_new_tokens: the most tokens to write.
        temperature: 0 takes the likeliest token (greedy), above 0 samples.
        seed: for sampling; the global random state is left alone. The same seed gives the same
            texts for the same prompts, vectors, scales and batch size.
        chat: format the prompts as chat; None does as was done when the vectors were found, or
            else does not.
        batch_size: rows of the batch; fewer where they do not fit in memory.

    Returns:
        A frame with the columns vector (position in `vectors`, or -1 for unsteered), scale, prompt,
        completion.

    Raises:
        TypeError, ValueError: as `steered` and `to_tokens` do; also for a negative temperature,
            fewer than one new token or row, or no scale.
        FloatingPointError: the logits after a prompt are not finite under any of the vectors.

    Warns:
        UserWarning: they are not finite under some vectors; their texts end there.
    """
    import pandas as pd

    from tl_melbo.tables import Table

    check_model(model)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: 0 for greedy, or a positive finite number")
    factors = [scales] if isinstance(scales, int | float) else list(scales)
    if not factors or not all(math.isfinite(factor) for factor in factors):
        raise ValueError(f"scales={scales}: one finite number, or several")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("prompts: none given; pass one text or a list of texts")
    check_batch_size(batch_size)
    chat = as_chat(vectors, chat)
    prompt_tokens = [to_tokens(model, text, chat) for text in texts]
    _check_room(model, prompt_tokens, max_new_tokens)
    if vectors is None:
        # A row of zeros is the unsteered model, so one path serves both.
        rows, layer, labels = (
            torch.zeros(1, int(model.cfg.d_model), dtype=torch.float32),
            0,
            [(-1, 0.0)],
        )
    else:
        layer = steering_layer(model, vectors, layer)
        rows = torch.cat([_scaled(model, vectors, factor) for factor in factors])
        n_vectors = len(rows) // len(factors)
        labels = [(i, float(factor)) for factor in factors for i in range(n_vectors)]
    frames, not_finite = [], []
    with torch.no_grad(), frozen(*whole_model(model)), seeded(seed):
        longest = max(prompt_tokens, key=lambda tokens: tokens.shape[1])
        write = _writer(model, longest, rows, layer, max_new_tokens, temperature)
        for text, tokens in zip(texts, prompt_tokens, strict=True):
            written, batch_size = map_batches(
                lambda batch, tokens=tokens: write(tokens, batch), rows, batch_size
            )
            not_finite += [row for _, rows_broken in written for row in rows_broken.tolist()]
            completions = [_decode(model, row) for batch, _ in written for row in batch]
            frame = pd.DataFrame(labels, columns=["vector", "scale"])
            frames.append(frame.assign(prompt=text, completion=completions))
    frame = Table(pd.concat(frames, ignore_index=True))
    if not any(not_finite):
        return frame
    names = [
        f"{vector} at scale {scale:g} after {quoted(text)}"
        for vector, scale, text in zip(
            frame["vector"], frame["scale"], frame["prompt"], strict=True
        )
    ]
    what = f"what {model_name(model)} writes, steered after layer {layer},"
    warn_of_rows(not_finite, what, "their texts end where it began", names)
    return frame


def as_theta(model: Model, vectors: Vectors) -> Theta:
    """The matrix of vectors, float32, checked against the width of the model.

    Raises:
        TypeError: not a model.
        ValueError: another width than the residual stream, or values that are not finite.
    """
    check_model(model)
    theta = vectors.vectors if isinstance(vectors, SteeringVectors) else vectors
    theta = (theta[None] if theta.ndim == 1 else theta).detach().float()
    d_model = int(model.cfg.d_model)
    if not len(theta):
        raise ValueError("vectors: none given; pass at least one, or None for the unsteered model")
    if theta.shape[1] != d_model:
        raise ValueError(
            f"vectors: {theta.shape[1]} wide, but the residual stream of {model_name(model)} has "
            f"d_model={d_model}; these are vectors of another model"
        )
    if not torch.isfinite(theta).all():
        raise ValueError("vectors: some values are not finite; leave those vectors out")
    return theta


def _scaled(model: Model, vectors: Vectors, scale: float) -> Theta:
    """The vectors times a factor, as they will be added; refuses a factor that overflows."""
    theta = as_theta(model, vectors) * scale
    dtype = next(model.parameters()).dtype
    if not theta.to(dtype).isfinite().all():
        raise ValueError(
            f"scale={scale}: gives vectors that are not finite in the model's {dtype}; use a "
            "smaller one"
        )
    return theta


def _checked_positions(positions: Positions) -> Positions:
    if isinstance(positions, slice):
        positions = checked_slice(positions)
        if (positions.step or 1) < 0:
            raise ValueError(f"positions={positions}: a slice that runs backwards; turn it around")
    elif not len(positions):
        raise ValueError("positions: an empty list steers nothing; pass indices or a slice")
    return positions


def _check_room(model: Model, prompt_tokens: list[Tensor], max_new_tokens: int) -> None:
    longest, limit = max(tokens.shape[1] for tokens in prompt_tokens), context_length(model)
    if limit and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: after a prompt of {longest} tokens, "
            f"{model_name(model)} has room for {limit - longest} of its {limit}"
        )


def check_batch_size(batch_size: int) -> None:
    """Make sure that a batch has rows.

    Raises:
        ValueError: it has none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")


def steering_layer(model: Model, vectors: Vectors | None, layer: int | None) -> int:
    """The layer given, or the one that the vectors were found at.

    Raises:
        ValueError: neither is known, or the model has no such layer.
    """
    if layer is None:
        layer = vectors.source_layer if isinstance(vectors, SteeringVectors) else None
    if layer is None:
        raise ValueError(
            "layer: not given, and the vectors do not know where they belong; pass layer=, "
            "for example layer=8"
        )
    check_layer(model, layer)
    return layer


def as_chat(vectors: Vectors | None, chat: bool | None) -> bool:
    """Whether prompts are chat: as said, or else as the vectors were found.

    Raises:
        ValueError: not said, and some of the vectors were found one way and some the other.
    """
    if chat is not None or not isinstance(vectors, SteeringVectors):
        return bool(chat)
    if "chat" in vectors.story:
        return bool(vectors.story["chat"])
    ways = {part.get("chat") for part in vectors.story.get("parts", [])} - {None}
    if len(ways) > 1:
        raise ValueError(
            "chat: some of the vectors were found with chat prompts and some with raw ones; pass "
            "chat=True or chat=False"
        )
    return ways == {True}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lend the global generators, from which libraries sample, a seed of our own."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


class _PastLength:
    """How many positions the KV cache held when the block was last called."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.value = 0
        self.prompt = 0

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.value = 0
        for argument in (*args, *kwargs.values()):
            if hasattr(argument, "get_seq_length"):
                # Asked of this layer: those before it have taken in this pass's tokens already.
                self.value = int(argument.get_seq_length(self.layer))
            elif hasattr(argument, "past_keys"):
                self.value = int(argument.past_keys.shape[1])


def _chosen_positions(positions: Positions, past: int, length: int, prompt: int) -> Tensor:
    """For each position of this pass, whether it is to be steered."""
    if isinstance(positions, slice):
        chosen = torch.zeros(past + length, dtype=torch.bool)
        chosen[: min(prompt, past + length)][positions] = True
        if positions.stop is None:
            chosen[prompt:] = True
        return chosen[past:]
    outside = [i for i in positions if not -prompt <= i < prompt]
    if outside:
        raise ValueError(f"positions: {outside} are outside the prompt's {prompt} tokens")
    wanted = torch.tensor([i + prompt if i < 0 else i for i in positions])
    return torch.isin(torch.arange(past, past + length), wanted)


def _writer(
    model: Model, tokens: Tokens, rows: Theta, layer: int, max_new_tokens: int, temperature: float
) -> Callable[[Tokens, Theta], tuple[Int[Tensor, "row new"], Bool[Tensor, "row"]]]:
    """What writes after a prompt under each vector: the fast way where nothing forbids it.

    It tells, too, for which rows the logits came to be not finite; these texts end there.
    """
    ends = torch.tensor(_end_tokens(model), device=tokens.device, dtype=tokens.dtype)

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        # From the largest down, so that no temperature makes infinities.
        below = logits.float() - logits.float().amax(-1, keepdim=True)
        return torch.multinomial((below / temperature).softmax(-1), 1)[:, 0]

    def write_hooked(tokens: Tokens, theta: Theta) -> tuple[Tensor, Tensor]:
        with steered(model, theta, layer), _ending_where_not_finite(model, ends) as broken:
            out = model.generate(
                tokens.expand(len(theta), -1),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature if temperature > 0 else 1.0,
                return_type="tokens",
                verbose=False,
            )
        return out[:, tokens.shape[1] :], broken.rows

    writer = _fast_writer(model, tokens, float(rows.norm(dim=-1).max()), layer)
    if writer is None:
        return write_hooked
    dtype = next(model.parameters()).dtype

    def write_fast(tokens: Tokens, theta: Theta) -> tuple[Tensor, Tensor]:
        theta = theta.to(tokens.device, dtype)
        return writer.write(tokens, theta, max_new_tokens, ends, choose)

    return write_fast


@contextmanager
def _ending_where_not_finite(model: Model, ends: Tensor) -> Iterator["_Broken"]:
    """End the text of each row whose logits are not finite, of which sampling would choke."""
    broken = _Broken(ends)
    handle = model.unembed.register_forward_hook(broken.end)
    try:
        yield broken
    finally:
        handle.remove()


class _Broken:
    """Which rows of a batch have had logits that are not finite."""

    def __init__(self, ends: Tensor) -> None:
        self.ends, self.rows = ends, torch.empty(0, dtype=torch.bool)

    def end(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        bad = ~logits[:, -1].isfinite().all(-1)
        if not len(self.rows):
            self.rows = torch.zeros_like(bad)
        self.rows |= bad
        if not bad.any():
            return logits
        certain = torch.zeros_like(logits[0, -1])
        certain[int(self.ends[0]) if len(self.ends) else 0] = torch.finfo(logits.dtype).max
        return torch.where(bad[:, None, None], certain, logits)


def _fast_writer(model: Model, tokens: Tokens, norm: float, layer: int) -> "Writer | None":
    """The fast way to write, if there are no hooks to fire and it gives the model's own logits.

    Asked about the beginning of the longest prompt, under two vectors as long as those to be used.
    Layers that need what the bridge adds to them, or quantised ones, fail in ways of their own, so
    every error means the slow way, but full memory.
    """
    if not hasattr(model, "original_model"):
        return None
    if user_hooks(module for root in whole_model(model) for module in root.modules()):
        return None
    from tl_melbo.fast_generation import Writer

    generator = torch.Generator().manual_seed(0)
    theta = random_sphere(2, int(model.cfg.d_model), norm or 1.0, generator=generator)
    theta = theta.to(tokens.device, next(model.parameters()).dtype)
    if not theta.isfinite().all():  # a long sparse vector can fit where a dense one does not
        return None
    tokens = tokens[:, :_PROBE_TOKENS]
    with steered(model, theta, layer):
        first = model(tokens.expand(2, -1))[:, -1]
    new = first[1:].argmax(-1, keepdim=True)
    with steered(model, theta[1:], layer):
        second = model(torch.cat([tokens, new], 1))[:, -1]
    try:
        writer = Writer(model, layer)
        found = writer.probe(tokens, theta, new)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    tolerance = _FAST_TOLERANCE if first.dtype in (torch.float32, torch.float64) else 0.05
    for ours, theirs in zip(found, (first, second), strict=True):
        error = (ours - theirs).double().norm() / theirs.double().norm()
        if not error <= tolerance:
            return None
    return writer


def _decode(model: Model, tokens: Int[Tensor, "new"]) -> str:
    ends = torch.tensor(_end_tokens(model), device=tokens.device)
    at_end = torch.isin(tokens, ends).nonzero()
    if len(at_end):
        tokens = tokens[: int(at_end[0])]
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))


def _end_tokens(model: Model) -> list[int]:
    """Every token that ends a text: some chat models name more than their tokenizer does."""
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends: list[int] = []
    for source in (model.tokenizer, config):
        named = getattr(source, "eos_token_id", None)
        ends += named if isinstance(named, list) else [] if named is None else [named]
    return ends
