"""Blocks called alone: with the arguments that they got in one ordinary forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tl_melbo.model.bridge import Model, model_name, residual_streams
from tl_melbo.model.tokens import to_tokens
from tl_melbo.text import quoted

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


class Group(NamedTuple):
    """Prompts of one length in tokens, which run as one batch."""

    length: int
    prompts: Tensor | None  # their numbers; None where all prompts have this length
    calls: list[BlockCall]  # what each block was called with, beside the residual stream


class Picked(NamedTuple):
    """What a slice picks, counted on each prompt's own tokens."""

    mask: Tensor  # [prompt, pos]
    everything: bool  # whether that is all of `mask`: no other position, and no padding
    # By length, the positions in a row without padding, or None for all; and in a padded row.
    places: dict[int, tuple[Tensor | None, Tensor]]

    @classmethod
    def of(cls, positions: slice, mask: Tensor) -> "Picked":
        """Resolve a slice."""
        n_pos, lengths = mask.shape[1], mask.sum(-1)
        chosen, places = torch.zeros_like(mask), {}
        for length in dict.fromkeys(lengths.tolist()):
            own = sorted(range(length)[positions])
            own = torch.tensor(own, device=mask.device, dtype=torch.int64)
            into = own + n_pos - length
            chosen[(lengths == length).nonzero(), into] = True
            places[length] = (None if len(own) == length else own), into
        return cls(chosen, bool(chosen.all()), places)


# How prompts of one group go through the blocks: their rows, [row, pos, d_model]; the group; the
# positions of the result that are wanted, or None; whether the graph is made in the backward pass.
Run = Callable[[Tensor, Group, Tensor | None, bool], Tensor]


def push(
    x: Tensor, groups: Sequence[Group], picked: Picked, run: Run, recompute: bool = False
) -> Tensor:
    """Push [vector, prompt, pos, d_model] through; zeros at positions that are not picked."""
    y = None
    for group in groups if len(x) else ():
        wanted, into = picked.places[group.length]
        rows = x if group.prompts is None else x[:, group.prompts, -group.length :]
        found = run(rows.flatten(0, 1), group, wanted, recompute).unflatten(0, rows.shape[:2])
        found = found.to(x.device)  # the last block may be on another one
        if group.prompts is None and wanted is None:
            return found
        y = torch.zeros_like(x) if y is None else y
        y[:, slice(None) if group.prompts is None else group.prompts[:, None], into] = found
    return torch.zeros_like(x) if y is None else y


def run_layers(
    layers: Sequence[nn.Module], calls: list[BlockCall], rows: Tensor, positions: Tensor | None
) -> Tensor:
    """Push rows through layers, each with the arguments of its call; some positions of the end."""
    for after in each_layer(layers, calls, rows):
        rows = after
    return rows if positions is None else rows[:, positions.to(rows.device)]


def each_layer(
    layers: Sequence[nn.Module], calls: Sequence[BlockCall], rows: Tensor
) -> Iterator[Tensor]:
    """The rows after each layer."""
    for layer, (args, kwargs) in zip(layers, calls, strict=True):
        output = layer(rows, *args, **kwargs)
        rows = output[0] if isinstance(output, tuple) else output
        yield rows


def capture_prompts(
    model: Model, texts: Sequence[str], chat: bool, source_layer: int, target_layer: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Group, ...]]:
    """x, y and mask of the prompts, padded on the left, and the prompts of each length."""
    tokens = [to_tokens(model, text, chat) for text in texts]
    lengths = torch.tensor([row.shape[1] for row in tokens])
    longest = int(lengths.max())
    calls: dict[int, list[BlockCall]] = {}
    padded = []
    for text, row in zip(texts, tokens, strict=True):
        residuals, blocks = _capture(model, row, source_layer, target_layer)
        if not residuals[1].isfinite().all():
            raise ValueError(
                f"prompt {quoted(text)}: the residual stream of {model_name(model)} after "
                f"layer {target_layer} holds values that are not finite in {residuals.dtype}; "
                "load the model in a wider type, for example dtype=torch.float32"
            )
        padded.append(nn.functional.pad(residuals, (0, 0, longest - row.shape[1], 0)))
        calls.setdefault(row.shape[1], blocks)
    x, y = torch.cat(padded, 1)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).to(x.device)
    groups = []
    for length, blocks in calls.items():
        prompts = None if len(calls) == 1 else (lengths == length).nonzero().flatten().to(x.device)
        groups.append(Group(length, prompts, blocks))
    return x, y, mask, tuple(groups)


def _capture(
    model: Model, tokens: Tensor, source_layer: int, target_layer: int
) -> tuple[Tensor, list[BlockCall]]:
    """One ordinary pass: resid(source), resid(target), and how the blocks between were called."""
    calls: list[BlockCall] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = args if "hidden_states" in kwargs else args[1:]
        named = {k: _without_cache(v) for k, v in kwargs.items() if k != "hidden_states"}
        if "use_cache" in named:
            named["use_cache"] = False
        calls.append((tuple(map(_without_cache, rest)), named))

    with ExitStack() as hooks:
        for block in model.blocks[source_layer + 1 : target_layer + 1]:
            hooks.enter_context(block.register_forward_pre_hook(keep, with_kwargs=True))
        residuals = residual_streams(model, tokens, (source_layer, target_layer))
    return torch.stack([stream.to(residuals[0].device) for stream in residuals]), calls


def _without_cache(argument: Any) -> Any:
    """None for a KV cache: replayed, it would grow at every call and be attended to."""
    is_cache = hasattr(argument, "get_seq_length") or hasattr(argument, "past_keys")
    return None if is_cache else argument
