"""The logits of a text under each vector, and what follows from them.

Rows that add nothing are the unsteered model to the last bit, whatever runs beside them.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.additions import Additions
from tl_melbo.errors import NotFinite, warn_of_rows
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import (
    Model,
    at_rest,
    model_name,
    module_below,
    plain_model,
    residual_streams,
)
from tl_melbo.model.tokens import to_tokens
from tl_melbo.probability import LogProbs
from tl_melbo.shapes import Float, Tokens, shape_checked
from tl_melbo.steering import Steerable, as_chat, hooked, place_told, steering_rows
from tl_melbo.text import quoted

# How many logits of whole texts are held at once: 128 MiB in float32.
_MOST_LOGITS = 2**25


@contextmanager
def adding(model: Model, plain: Any, rows: Additions) -> Iterator[Any]:
    """Add to each row what is its own; yields what to run: `plain_model(model)`, or the model."""
    if plain is None:
        with at_rest(model), hooked(model, rows):
            yield model
        return
    with torch.no_grad(), adding_below(model, plain, rows):
        yield plain


def read_ahead(plain: Any, tokens: Tokens) -> dict[str, Any]:
    """The keys and values of tokens, by what transformers calls them.

    Empty where the model keeps none, or something else as well: rows cannot share what is not of
    single tokens.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    known = inspect.signature(type(plain).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    cache = getattr(plain(tokens, use_cache=True, logits_to_keep=1), name, None)
    layers, shared = getattr(cache, "layers", ()), (DynamicLayer, DynamicSlidingWindowLayer)
    return {name: cache} if layers and all(type(layer) in shared for layer in layers) else {}


@contextmanager
def adding_below(model: Model, plain: Any, rows: Additions) -> Iterator[None]:
    """Hook the blocks of `plain_model(model)`; gradients flow into the rows."""
    rows = rows.to(next(plain.parameters()).device)
    with ExitStack() as hooks:
        for layer in rows.layers:
            module = module_below(model, plain, layer, rows.place)
            hooks.enter_context(module.register_forward_hook(_adder(rows, layer)))
        yield


def _adder(rows: Additions, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if rows.place == "attention":
            return output + rows.after(layer, args[0])
        if isinstance(output, tuple):
            return (output[0] + rows.after(layer, output[0]), *output[1:])
        return output + rows.after(layer, output)

    return add


@shape_checked
def next_token_log_probs(
    model: Model,
    prompt: str,
    vectors: Steerable | None = None,
    layer: int | None = None,
    *,
    scale: float = 1.0,
    chat: bool | None = None,
    batch_size: int = 32,
) -> Float[Tensor, "vector d_vocab"]:
    """Log-probabilities of the token after the prompt, one row a vector: float32, on the CPU.

    Args:
        vectors: vectors, vectors of several layers, adapters or gated factors; None for the
            unsteered model.
        layer, chat: None takes those that the vectors were found with.

    Raises:
        NotFinite: the logits are not finite under any of the vectors, or without; a warning if only
            under some, whose rows are NaN.
    """
    checks.at_least(1, batch_size=batch_size)
    rows = steering_rows(model, vectors, layer, [scale])
    options = {"chat": as_chat(vectors, chat), "batch_size": batch_size}
    log_probs = map_next_token(model, prompt, rows, lambda rows: rows, **options)
    if vectors is None and log_probs.isnan().any():
        raise NotFinite(
            f"what {model_name(model)} makes of {quoted(prompt)} is not finite; load the model "
            "in a wider type, for example dtype=torch.float32"
        )
    warn_of_log_probs(model, prompt, rows, log_probs.isnan().all(-1))
    return log_probs


def map_next_token(
    model: Model,
    prompt: str,
    rows: Additions,
    measure: Callable[[LogProbs], Tensor],
    *,
    chat: bool,
    batch_size: int = 32,
) -> Tensor:
    """What `measure` says of the next token's log-probabilities; of what is not finite, NaN."""

    def of_last(logits: Tensor) -> Tensor:
        log_probs = logits[:, -1].float().log_softmax(-1).cpu()
        return measure(log_probs.masked_fill(log_probs.isnan().any(-1, keepdim=True), torch.nan))

    tokens = to_tokens(model, prompt, chat)
    return map_rows(model, tokens, rows, of_last, batch_size, 1)


def map_rows(
    model: Model,
    tokens: Tokens,
    rows: Additions,
    measure: Callable[[Tensor], Tensor],
    batch_size: int,
    n_logits: int = 0,
) -> Tensor:
    """What `measure` says of the logits of one text under each vector.

    `measure` is from logits, [row, pos, d_vocab], to something for each row; `n_logits` is for how
    many of the last positions they are wanted, 0 for all.
    """
    plain = plain_model(model)

    def of_batch(some: Additions) -> Tensor:
        with adding(model, plain, some) as runs:
            if plain is None:
                return measure(runs(tokens.expand(len(some), -1))[:, -n_logits:])
            # Up to the steered layer all rows are alike: one runs, and the vectors make many of it.
            return measure(runs(tokens, use_cache=False, logits_to_keep=n_logits).logits)

    return _by_batches(model, rows, of_batch, batch_size)


def map_residuals(
    model: Model,
    tokens: Tokens,
    rows: Additions,
    layers: Sequence[int],
    measure: Callable[[Tensor], Tensor],
    batch_size: int,
    positions: slice | list[int] = slice(None),
) -> Tensor:
    """What `measure` says of the residual stream of one text after some layers, under each vector.

    `measure` is from [row, layer, pos, d_model] to something for each row.
    """

    def of_batch(some: Additions) -> Tensor:
        with at_rest(model), hooked(model, some):
            streams = residual_streams(model, tokens.expand(len(some), -1), layers, positions)
            # Blocks may be on several devices.
            return measure(torch.stack([each.to(streams[0].device) for each in streams], 1))

    return _by_batches(model, rows, of_batch, batch_size)


def _by_batches(
    model: Model, rows: Additions, of_batch: Callable[[Additions], Tensor], batch_size: int
) -> Tensor:
    """Batches of rows that fit; those that add nothing are one row, run once, on its own."""
    silent = rows.sizes(next(model.parameters()).dtype) == 0
    parts, _ = map_batches(of_batch, rows[~silent], batch_size)
    if silent.any():
        unsteered = of_batch(rows[silent][:1])
        parts += [unsteered] * int(silent.sum())
    # Back in their order: the silent ones were put at the end.
    return torch.cat(parts)[silent.to(torch.uint8).argsort(stable=True).argsort()]


def rows_at_once(model: Model, length: int, batch_size: int) -> int:
    """How many rows at once, where the logits of whole texts of so many tokens are held."""
    return max(1, min(batch_size, _MOST_LOGITS // (length * int(model.cfg.d_vocab))))


def warn_of_log_probs(model: Model, prompt: str, rows: Additions, bad: Tensor) -> None:
    """Say under which vectors the logits after a prompt are not finite; NotFinite if under all."""
    what = f"what {model_name(model)}, steered {place_told(rows)}, makes of {quoted(prompt)}"
    warn_of_rows(bad.tolist(), what, "what is measured there is NaN")
