"""Put vectors into a model: a hook, and checks of vectors before they go in."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.additions import Additions, Steering, VectorAdditions
from tl_melbo.errors import warn_user
from tl_melbo.model.bridge import (
    Model,
    check_layer,
    check_model,
    check_projection,
    hook_points,
    model_name,
    weights_digest,
)
from tl_melbo.shapes import Float, Theta, checked_slice, shape_checked
from tl_melbo.vectors import SteeringVectors

Vectors = SteeringVectors | Float[Tensor, "d_model"] | Theta
# Whatever can be put into a model: vectors, vectors of several blocks, adapters, gated factors.
Steerable = Vectors | Steering
# Beside Vectors in one signature: an axis of the same name would have to be of the same size.
Reference = SteeringVectors | Float[Tensor, "d_model"] | Float[Tensor, "reference d_model"]
Positions = slice | Sequence[int]


@contextmanager
@shape_checked
def steered(
    model: Model,
    vectors: Steerable,
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
        vectors: one vector for every row of the batch, or exactly one for each row; or vectors of
            several layers, adapters or gated factors, which know their layers.
        layer: None takes the layer that the vectors were found at.
        positions: which tokens of the prompt, the first forward pass, to steer: a slice or indices.
            Tokens generated from the KV cache are steered if the slice has no end.

    Raises:
        ValueError: inside, for a batch with another number of rows.
    """
    rows = steering_rows(model, vectors, layer, [scale])
    if isinstance(positions, slice):
        positions = checked_slice(positions)
        if (positions.step or 1) < 0:
            raise ValueError(f"positions={positions}: a slice that runs backwards; turn it around")
    elif not len(positions):
        raise ValueError("positions: an empty list steers nothing; pass indices or a slice")
    with hooked(model, rows, positions):
        yield model


@contextmanager
def hooked(model: Model, rows: Additions, positions: Positions = slice(None)) -> Iterator[None]:
    """`steered`, of arguments that were checked."""
    with ExitStack() as hooks:
        for layer in rows.layers:
            hooks.enter_context(_hooked_in(model, layer, rows, positions))
        yield


@contextmanager
def _hooked_in(model: Model, layer: int, rows: Additions, positions: Positions) -> Iterator[None]:
    past, prompt = 0, 0  # positions in the KV cache, and in the first pass
    read: Tensor | None = None

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal past
        past = 0
        for argument in (*args, *kwargs.values()):
            if hasattr(argument, "get_seq_length"):
                # Of this layer: those before it hold this pass's tokens already.
                past = int(argument.get_seq_length(layer))
            elif hasattr(argument, "past_keys"):
                past = int(argument.past_keys.shape[1])

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal read
        read = output

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal prompt, read
        n_rows, length = output.shape[:2]
        if len(rows) not in (1, n_rows):
            raise ValueError(
                f"vectors: {len(rows)} vectors, but a batch of {n_rows} came by; steer with one "
                "vector, or with one for each row"
            )
        if past == 0:
            prompt = length
        chosen = _chosen_positions(positions, past, length, prompt).to(output.device)
        steered, read = output + rows.after(layer, cast(Tensor, read)), None
        return torch.where(chosen[None, :, None], steered, output)

    source, target = hook_points(model, layer, rows.place)
    with (
        model.blocks[layer].register_forward_pre_hook(count, with_kwargs=True),
        source.register_forward_hook(keep),
        target.register_forward_hook(add),
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
    model: Model, vectors: Steerable | None, layer: int | None, scales: Sequence[float]
) -> Additions:
    """The rows to add (zeros if no vectors), all at the first scale first."""
    check_model(model)
    if vectors is None:
        return VectorAdditions.of(torch.zeros(1, int(model.cfg.d_model)), 0)
    if isinstance(vectors, Steering):
        rows = _own_rows(model, vectors, layer, scales)
    else:
        theta = as_theta(model, vectors)
        theta = torch.cat([theta * scale for scale in scales])
        rows = VectorAdditions.of(theta, steering_layer(model, vectors, layer))
    sizes = rows.sizes(next(model.parameters()).dtype).reshape(len(scales), -1)
    for scale, some in zip(scales, sizes, strict=True):
        if not some.isfinite().all():
            raise ValueError(
                f"scale={scale}: vectors are not finite in the model's "
                f"{next(model.parameters()).dtype}; use a smaller one"
            )
    return rows


def _own_rows(
    model: Model, steering: Steering, layer: int | None, scales: Sequence[float]
) -> Additions:
    """The rows of what knows its layers: ones that the model has, and of its width."""
    kind = type(steering).__name__
    if layer is not None:
        raise ValueError(f"layer={layer}: {kind} knows its layers; leave it out")
    if not len(steering):
        raise ValueError(f"vectors: {kind} of length 0; pass one that holds something")
    if steering.d_model != int(model.cfg.d_model):
        raise ValueError(
            f"vectors: {kind} is {steering.d_model} wide, but the residual stream of "
            f"{model_name(model)} has d_model={model.cfg.d_model}; take both from the same model"
        )
    rows = steering.additions(scales)
    for own in rows.layers:
        check_layer(model, own)
        if rows.place == "attention":
            check_projection(model, own)
    return rows


def place_told(rows: Additions) -> str:
    """Where something is added, for a message."""
    where = "after" if rows.place == "block" else "in attention of"
    if len(rows.layers) == 1:
        return f"{where} layer {rows.layers[0]}"
    return f"{where} {len(rows.layers)} layers, {min(rows.layers)} to {max(rows.layers)}"


def as_theta(model: Model, vectors: Vectors) -> Theta:
    """The matrix of vectors, float32, checked against the width of the model."""
    check_model(model)
    theta = checks.as_matrix(vectors)
    of = f"the residual stream of {model_name(model)}"
    checks.width(theta, int(model.cfg.d_model), "vectors", of)
    if isinstance(vectors, SteeringVectors):
        _warn_of_another(model, vectors.story)
    return theta


def _warn_of_another(model: Model, story: Mapping[str, Any]) -> None:
    """A model may have another name, or be kept in another type, and be the same."""
    found_in, weights = story.get("model"), story.get("weights")
    if found_in == model_name(model) or weights in (None, weights_digest(model)):
        return
    warn_user(
        f"vectors: found in {found_in}, not in {model_name(model)}; a vector fits only the model "
        "that it was found in"
    )


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
        raise ValueError("layer: not given, nor known from the vectors; pass one, such as layer=8")
    check_layer(model, layer)
    return layer


def as_chat(vectors: Steerable | None, chat: bool | None) -> bool:
    """Whether prompts are chat: as said, or else as the vectors were found, if all alike."""
    story = getattr(vectors, "story", {})
    return agreed_chat([story] if "chat" in story else story.get("parts", []), chat)


def agreed_chat(stories: Iterable[Mapping[str, Any]], chat: bool | None) -> bool:
    """The same of several stories; those that do not tell agree with any."""
    if chat is not None:
        return chat
    ways = {story.get("chat") for story in stories} - {None}
    if len(ways) > 1:
        raise ValueError("chat: the vectors were found with both; pass chat=True or chat=False")
    return ways == {True}
