"""Blocks called alone: with the arguments that they got in one ordinary forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_melbo.model.bridge import Model, frozen, residual_hook_name, whole_model

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


def run_layers(
    layers: Sequence[nn.Module], calls: list[BlockCall], rows: Tensor, positions: Tensor | None
) -> Tensor:
    """Push rows through layers, each with the arguments of its call; some positions of the end."""
    for layer, (args, kwargs) in zip(layers, calls, strict=True):
        rows = _first_tensor(layer(rows, *args, **kwargs))
    return rows if positions is None else rows[:, positions]


def capture(
    model: Model, tokens: Tensor, source_layer: int, target_layer: int
) -> tuple[Tensor, Tensor, list[BlockCall]]:
    """One ordinary pass: resid(source), resid(target), and how the blocks between were called."""
    residuals: dict[int, Tensor] = {}
    calls: list[BlockCall] = []

    def keep_residual(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            residuals[layer] = output.detach().clone()

        return hook

    def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = args if "hidden_states" in kwargs else args[1:]
        named = {k: _without_cache(v) for k, v in kwargs.items() if k != "hidden_states"}
        if "use_cache" in named:
            named["use_cache"] = False
        calls.append((tuple(_without_cache(v) for v in rest), named))

    handles = [
        model.hook_dict[residual_hook_name(layer)].register_forward_hook(keep_residual(layer))
        for layer in (source_layer, target_layer)
    ]
    handles += [
        block.register_forward_pre_hook(keep_call, with_kwargs=True)
        for block in model.blocks[source_layer + 1 : target_layer + 1]
    ]
    try:
        with torch.no_grad(), frozen(*whole_model(model)):
            model(tokens, return_type=None)
    finally:
        for handle in handles:
            handle.remove()
    return residuals[source_layer], residuals[target_layer], calls


def _without_cache(argument: Any) -> Any:
    """None for a KV cache: replayed, it would grow at every call and be attended to."""
    is_cache = hasattr(argument, "get_seq_length") or hasattr(argument, "past_keys")
    return None if is_cache else argument


def _first_tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
