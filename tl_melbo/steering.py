"""Put vectors into a model: a hook, and checks of vectors before they go in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.model.bridge import Model, check_layer, check_model, model_name, residual_hook_name
from tl_melbo.shapes import Float, Theta, checked_slice, shape_checked
from tl_melbo.vectors import SteeringVectors

Vectors = SteeringVectors | Float[Tensor, "d_model"] | Theta
# Beside Vectors in one signature: an axis of the same name would have to be of the same size.
Reference = SteeringVectors | Float[Tensor, "d_model"] | Float[Tensor, "reference d_model"]
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

    Contexts nest: their vectors add up.

    Args:
        vectors: one vector for every row of the batch, or exactly one for each row.
        layer: None takes the layer that the vectors were found at.
        positions: which tokens of the prompt, the first forward pass, to steer: a slice or indices.
            Tokens generated from the KV cache are steered if the slice has no end.

    Raises:
        ValueError: inside, for a batch with another number of rows.
    """
    theta, layer = steering_rows(model, vectors, layer, [scale])
    if isinstance(positions, slice):
        positions = checked_slice(positions)
        if (positions.step or 1) < 0:
            raise ValueError(f"positions={positions}: a slice that runs backwards; turn it around")
    elif not len(positions):
        raise ValueError("positions: an empty list steers nothing; pass indices or a slice")
    with hooked(model, theta, layer, positions):
        yield model


@contextmanager
def hooked(
    model: Model, theta: Theta, layer: int, positions: Positions = slice(None)
) -> Iterator[None]:
    """`steered`, of arguments that were checked."""
    past, prompt = 0, 0  # positions in the KV cache, and in the first pass

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal past
        past = 0
        for argument in (*args, *kwargs.values()):
            if hasattr(argument, "get_seq_length"):
                # Of this layer: those before it hold this pass's tokens already.
                past = int(argument.get_seq_length(layer))
            elif hasattr(argument, "past_keys"):
                past = int(argument.past_keys.shape[1])

    def add(module: nn.Module, args: Any, residual: Tensor) -> Tensor:
        nonlocal prompt
        rows, length = residual.shape[:2]
        if len(theta) not in (1, rows):
            raise ValueError(
                f"vectors: {len(theta)} vectors, but a batch of {rows} came by; steer with one "
                "vector, or with one for each row"
            )
        if past == 0:
            prompt = length
        chosen = _chosen_positions(positions, past, length, prompt).to(residual.device)
        addend = theta.to(residual.device, residual.dtype)[:, None, :]
        return torch.where(chosen[None, :, None], residual + addend, residual)

    point = model.hook_dict[residual_hook_name(layer)]
    with (
        model.blocks[layer].register_forward_pre_hook(read, with_kwargs=True),
        point.register_forward_hook(add),
    ):
        yield


def _chosen_positions(positions: Positions, past: int, length: int, prompt: int) -> Tensor:
    """For each position of this pass, whether it is to be steered."""
    chosen = torch.zeros(past + length, dtype=torch.bool)
    if isinstance(positions, slice):
        chosen[:prompt][positions] = True
        chosen[prompt:] = positions.stop is None
    elif outside := [i for i in positions if not -prompt <= i < prompt]:
        raise ValueError(f"positions: {outside} are outside the prompt's {prompt} tokens")
    else:
        chosen[:prompt][list(positions)] = True
    return chosen[past:]


def steering_rows(
    model: Model, vectors: Vectors | None, layer: int | None, scales: Sequence[float]
) -> tuple[Theta, int]:
    """The rows to add (zeros if no vectors), all at the first scale first, and their layer."""
    check_model(model)
    if vectors is None:
        return torch.zeros(1, int(model.cfg.d_model)), 0
    theta, dtype = as_theta(model, vectors), next(model.parameters()).dtype
    rows = [theta * scale for scale in scales]
    for scale, some in zip(scales, rows, strict=True):
        if not some.to(dtype).isfinite().all():
            raise ValueError(
                f"scale={scale}: vectors are not finite in the model's {dtype}; use a smaller one"
            )
    return torch.cat(rows), steering_layer(model, vectors, layer)


def as_theta(model: Model, vectors: Vectors) -> Theta:
    """The matrix of vectors, float32, checked against the width of the model."""
    check_model(model)
    theta = checks.as_matrix(vectors)
    of = f"the residual stream of {model_name(model)}"
    checks.width(theta, int(model.cfg.d_model), "vectors", of)
    return theta


def as_library(vectors: Vectors) -> SteeringVectors:
    """The vectors as a library with at least one vector in it."""
    theta = checks.as_matrix(vectors)
    known = isinstance(vectors, SteeringVectors)
    return vectors if known else SteeringVectors.from_tensor(theta)


def one_vector(vectors: Vectors, argument: str) -> SteeringVectors:
    """A library of one vector that has a direction."""
    checks.one_vector(vectors, argument)
    return as_library(vectors)


def check_place(model: Model, f: ActivationMap, library: SteeringVectors, argument: str) -> None:
    """Make sure that vectors belong where an activation map adds them, in the model it is of."""
    check_model(model)
    if model_name(model) != model_name(f.model):
        raise ValueError(
            f"f: made from {model_name(f.model)}, but model is {model_name(model)}; make it with "
            "ActivationMap.from_prompts(model, ...)"
        )
    if library.source_layer not in (None, f.source_layer):
        raise ValueError(
            f"{argument}: found at layer {library.source_layer}, but f starts at layer "
            f"{f.source_layer}; make f with source_layer={library.source_layer}"
        )


def steering_layer(model: Model, vectors: Vectors | None, layer: int | None) -> int:
    """The layer given, or the one that the vectors were found at: one that the model has."""
    if layer is None and isinstance(vectors, SteeringVectors):
        layer = vectors.source_layer
    if layer is None:
        raise ValueError(
            "layer: not given, and the vectors do not know where they belong; pass layer=, "
            "for example layer=8"
        )
    check_layer(model, layer)
    return layer


def as_chat(vectors: Vectors | None, chat: bool | None) -> bool:
    """Whether prompts are chat: as said, or else as the vectors were found, if all alike."""
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
