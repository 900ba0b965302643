"""Let the model write under each vector."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.errors import warn_of_rows
from tl_melbo.geometry import random_sphere
from tl_melbo.memory import is_out_of_memory, map_batches
from tl_melbo.model.bridge import (
    Model,
    check_model,
    frozen,
    model_name,
    user_hooks,
    whole_model,
)
from tl_melbo.model.tokens import context_length, to_tokens
from tl_melbo.shapes import Bool, Int, Theta, Tokens, shape_checked
from tl_melbo.text import quoted

if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.fast_generation import Writer

from tl_melbo.steering import Vectors, _scaled, as_chat, steered, steering_layer

# How far logits of the fast way may be from the model's own, relative to their size.
_FAST_TOLERANCE = 1e-5
# So much of a prompt shows whether the fast way does the same.
_PROBE_TOKENS = 12


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
    checks.at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    checks.seed(seed)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: 0 for greedy, or a positive finite number")
    factors = [scales] if isinstance(scales, int | float) else list(scales)
    if not factors or not all(math.isfinite(factor) for factor in factors):
        raise ValueError(f"scales={scales}: one finite number, or several")
    texts = checks.as_texts(prompts)
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


def _check_room(model: Model, prompt_tokens: list[Tensor], max_new_tokens: int) -> None:
    longest, limit = max(tokens.shape[1] for tokens in prompt_tokens), context_length(model)
    if limit and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: after a prompt of {longest} tokens, "
            f"{model_name(model)} has room for {limit - longest} of its {limit}"
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lend the global generators, from which libraries sample, a seed of our own."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


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
