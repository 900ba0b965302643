"""Put vectors into a model: hooks, next-token log-probabilities, generation."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_melbo.models import (
    Model,
    check_layer,
    check_model,
    model_name,
    residual_hook_name,
    to_tokens,
)
from tl_melbo.shapes import Float, Int, Theta, shape_checked
from tl_melbo.vectors import SteeringVectors

if TYPE_CHECKING:
    import pandas as pd

Vectors = SteeringVectors | Float[Tensor, "d_model"] | Theta
Positions = slice | Sequence[int]


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
    theta = as_theta(model, vectors) * scale
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: expected a finite number")
    layer = _steering_layer(model, vectors, layer)
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
        return residual + addend * chosen.to(residual.device, residual.dtype)[None, :, None]

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
    """
    check_model(model)
    tokens = to_tokens(model, prompt, _as_chat(vectors, chat))
    if vectors is None:
        with torch.no_grad():
            return model(tokens)[:, -1].float().log_softmax(-1).cpu()
    layer = _steering_layer(model, vectors, layer)
    rows = []
    for theta in as_theta(model, vectors).split(_checked_batch_size(batch_size)):
        with torch.no_grad(), steered(model, theta, layer, scale=scale):
            logits = model(tokens.expand(len(theta), -1))[:, -1]
        rows.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(rows)


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
        seed: for sampling; the global random state is left alone.
        chat: format the prompts as chat; None does as was done when the vectors were found, or
            else does not.
        batch_size: rows of the batch.

    Returns:
        A frame with the columns vector (position in `vectors`, or -1 for unsteered), scale, prompt,
        completion.

    Raises:
        TypeError, ValueError: as `steered` and `to_tokens` do; also for a negative temperature,
            fewer than one new token or row, or no scale.
    """
    import pandas as pd

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
    chat = _as_chat(vectors, chat)
    if vectors is None:
        theta, layer = torch.zeros(1, int(model.cfg.d_model)), 0
        labels, factors = [(-1, 0.0)], [0.0]
    else:
        theta, layer = as_theta(model, vectors), _steering_layer(model, vectors, layer)
        labels = [(i, float(s)) for s in factors for i in range(len(theta))]
    rows = torch.cat([theta * factor for factor in factors])
    frames = []
    for text in texts:
        tokens = to_tokens(model, text, chat)
        completions: list[str] = []
        for batch in rows.split(_checked_batch_size(batch_size)):
            # A row of zeros is the unsteered model, so one path serves both.
            with steered(model, batch, layer):
                new = _generate_tokens(
                    model, tokens.expand(len(batch), -1), max_new_tokens, temperature, seed
                )
            completions += [_decode(model, row) for row in new]
        frame = pd.DataFrame(labels, columns=["vector", "scale"])
        frames.append(frame.assign(prompt=text, completion=completions))
    return pd.concat(frames, ignore_index=True)


def as_theta(model: Model, vectors: Vectors) -> Theta:
    """The matrix of vectors, float32, checked against the width of the model.

    Raises:
        ValueError: another width than the residual stream, or values that are not finite.
    """
    theta = vectors.vectors if isinstance(vectors, SteeringVectors) else vectors
    theta = (theta[None] if theta.ndim == 1 else theta).detach().float()
    d_model = int(model.cfg.d_model)
    if theta.shape[1] != d_model:
        raise ValueError(
            f"vectors: {theta.shape[1]} wide, but the residual stream of {model_name(model)} has "
            f"d_model={d_model}; these are vectors of another model"
        )
    if not torch.isfinite(theta).all():
        raise ValueError("vectors: some values are not finite; leave those vectors out")
    return theta


def _steering_layer(model: Model, vectors: Vectors | None, layer: int | None) -> int:
    if layer is None:
        layer = vectors.source_layer if isinstance(vectors, SteeringVectors) else None
    if layer is None:
        raise ValueError(
            "layer: not given, and the vectors do not know where they belong; pass layer=, "
            "for example layer=8"
        )
    check_layer(model, layer)
    return layer


def _as_chat(vectors: Vectors | None, chat: bool | None) -> bool:
    if chat is not None:
        return chat
    return bool(vectors.story.get("chat")) if isinstance(vectors, SteeringVectors) else False


def _checked_batch_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    return batch_size


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
    absolute = torch.arange(past, past + length)
    if isinstance(positions, slice):
        chosen = torch.zeros(past + length, dtype=torch.bool)
        chosen[: min(prompt, past + length)][positions] = True
        if positions.stop is None and (positions.step or 1) > 0:
            chosen[prompt:] = True
        return chosen[past:]
    wanted = torch.tensor([i + prompt if i < 0 else i for i in positions])
    return torch.isin(absolute, wanted)


def _generate_tokens(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Int[Tensor, "batch new"]:
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    # TransformerLens samples from the global generator: lend it a seeded one and put it back.
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else 1.0,
            return_type="tokens",
            verbose=False,
        )
    return out[:, tokens.shape[1] :]


def _decode(model: Model, tokens: Int[Tensor, "new"]) -> str:
    end = getattr(model.tokenizer, "eos_token_id", None)
    if end is not None and (tokens == end).any():
        tokens = tokens[: int((tokens == end).nonzero()[0])]
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))
