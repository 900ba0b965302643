"""The ways through the blocks: the model's own modules, and faster ones that do the same."""

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from tl_melbo.fast_blocks import FastBlocks
from tl_melbo.memory import free_memory, is_out_of_memory
from tl_melbo.model.bridge import (
    frozen,
    hook_tables,
    is_dispatched,
    user_hooks,
    without_bridge,
)
from tl_melbo.replay import Group, Picked, Run, each_layer, push, run_layers

Path = Literal["fast", "unhooked", "hooked"]

# How far a faster way may be from the model's own modules, relative to what the blocks add to each
# token, and to the token itself.
_FAST_TOLERANCE = {torch.float64: (1e-9, 1e-13), torch.float32: (1e-5, 1e-6)}
_NARROW_TOLERANCE = (0.05, 0.01)
# Tokens of one vector up to which packing the matrices of a CPU pays.
_MOST_HOT_ROWS = 512


class Way(NamedTuple):
    """One way through the blocks: its name, how a group of prompts goes, and f(x) by it."""

    path: Path
    run: Run
    y: Tensor


# From one prompt's row of x to a function that pushes derivatives, [tangent, pos, d_model], from
# before the block of that number to after it and each later one; some positions of the result.
Push = Callable[[Tensor, int, Tensor | None], Iterable[Tensor]]
Tangents = Callable[[Tensor, Group], Push]


class Shortcut(NamedTuple):
    """The ways without hooks."""

    way: Way  # the faster of the two
    differentiable: Way  # twice, or forward, or by torch.func
    tangents: Tangents


class _Short(NamedTuple):
    """A function, detached, that keeps what its own gradient needs, if it is asked to."""

    forward: Callable[[Tensor, bool], tuple[Tensor, Any]]
    backward: Callable[[Tensor, Any], Tensor]


_Made = tuple[Path, Callable[[Group, Tensor | None], _Short], Tangents]


def hooked_run(blocks: Sequence[nn.Module]) -> Run:
    """By the model's own modules, on which hooks fire."""

    def run(rows: Tensor, group: Group, positions: Tensor | None, recompute: bool) -> Tensor:
        def once(rows: Tensor) -> Tensor:
            with frozen(*blocks):
                return run_layers(blocks, group.calls, rows, positions)

        return Shortened.apply(rows, _graph(once), once, True) if recompute else once(rows)

    return run


def tangents_of(layers: Sequence[nn.Module]) -> Tangents:
    """By forward-mode differentiation of these layers, with the row anew for each derivative."""

    def of_row(row: Tensor, group: Group) -> Push:
        with frozen(*layers):
            inputs = [row, *each_layer(layers, group.calls, row)]

        def push(tangent: Tensor, first: int, positions: Tensor | None) -> Iterable[Tensor]:
            # Not a generator: the layers are as they were when this returns.
            with frozen(*layers), forward_ad.dual_level():
                rows = inputs[first].expand_as(tangent).contiguous()
                rows = forward_ad.make_dual(rows, tangent.to(rows.device).contiguous())
                duals = each_layer(layers[first:], group.calls[first:], rows)
                found = [_tangent(dual) for dual in duals]
            if positions is None:
                return found
            return [each[:, positions.to(each.device)] for each in found]

        return push

    return of_row


def find(
    blocks: Sequence[nn.Module], groups: Sequence[Group], x: Tensor, mask: Tensor
) -> Shortcut | None:
    """The fastest way without hooks that does what the model's own modules do."""
    if not all(hasattr(block, "_original_component") for block in blocks) or is_dispatched(*blocks):
        return None
    every = Picked.of(slice(None), mask)
    # One at a time: x, and x with noise a tenth as long as tokens.
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    length = x.norm(dim=-1)[mask].median() / x.shape[-1] ** 0.5
    probes = [x[None], ((x + 0.1 * length * noise) * mask[:, :, None])[None]]

    def pushed(run: Run) -> list[Tensor]:
        return [push(probe, groups, every, run) for probe in probes]

    with torch.no_grad():
        expected = pushed(hooked_run(blocks))
        for make in (_fast, _unhooked):
            try:
                path, short, tangents = make(blocks, groups, x, mask)
                plain = _plain_run(blocks)
                run = _shortened(short, plain)
                found = pushed(run)
                if all(map(_agree, found, expected, probes, [mask] * 2)):
                    y = push(x[None], groups, every, plain)[0]
                    way, other = Way(path, run, found[0][0]), Way(path, plain, y)
                    return Shortcut(way, other, tangents)
            except Exception as error:  # quantised layers, for one, fail in many ways
                if is_out_of_memory(error):
                    raise
    return None


def _agree(found: Tensor, expected: Tensor, probe: Tensor, mask: Tensor) -> bool:
    """Whether both add the same to the residual stream, over all tokens, each by its own size."""
    differences = found - expected, expected - probe, expected
    error, added, size = (part[0][mask].double().norm(dim=-1) for part in differences)
    relative, rounding = _FAST_TOLERANCE.get(found.dtype, _NARROW_TOLERANCE)
    return bool((error / (relative * added + rounding * size)).square().mean() <= 1)


def _fast(blocks: Sequence[nn.Module], groups: Sequence[Group], x: Tensor, mask: Tensor) -> _Made:
    """By `fast_blocks`; an exception where layers are of another kind, or copies do not fit."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError("Hugging Face widens norms and softmax of narrow types")
    n_bytes = sum(p.numel() * p.element_size() for block in blocks for p in block.parameters())
    room = free_memory(x.device) / 4
    if n_bytes * 2 > room:
        raise ValueError("no room for copies")
    lengths = mask.sum(-1)
    hot_rows = max(group.length * int((lengths == group.length).sum()) for group in groups)
    packs = n_bytes * 4 <= room and hot_rows <= _MOST_HOT_ROWS
    fast = FastBlocks([without_bridge(block) for block in blocks], hot_rows if packs else None)
    # Where layers of one model turn differently, as in Gemma 3, results will differ.
    turns = {group.length: group.calls[0][1]["position_embeddings"] for group in groups}
    rotations = {length: fast.rotation(*turn) for length, turn in turns.items()}

    def short(group: Group, positions: Tensor | None) -> _Short:
        rotation = rotations[group.length]

        def forward(x: Tensor, keep: bool) -> tuple[Tensor, Any]:
            kept = [] if keep else None
            return fast.forward(x, rotation, positions, kept), kept

        def backward(gradient: Tensor, kept: Any) -> Tensor:
            return fast.backward(gradient.contiguous(), rotation, positions, kept)

        return _Short(forward, backward)

    def tangents(row: Tensor, group: Group) -> Push:
        rotation, kept = rotations[group.length], []
        fast.forward(row, rotation, None, kept)
        return lambda tangent, first, positions: fast.tangents(
            tangent, rotation, positions, kept[first:]
        )

    return "fast", short, tangents


def _unhooked(blocks: Sequence[nn.Module], *_: Any) -> _Made:
    """By Hugging Face's own layers, with attention in one fused step."""
    layers = [without_bridge(block) for block in blocks]

    def short(group: Group, positions: Tensor | None) -> _Short:
        return _graph(lambda rows: run_layers(layers, group.calls, rows, positions))

    return "unhooked", short, tangents_of(_plain_layers(blocks))


def _plain_layers(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Hugging Face's own layers, with attention in steps."""
    return [without_bridge(block, "eager") for block in blocks]


def _plain_run(blocks: Sequence[nn.Module]) -> Run:
    """By Hugging Face's own layers, with attention in steps."""
    layers = _plain_layers(blocks)
    return lambda rows, group, positions, _: run_layers(layers, group.calls, rows, positions)


def _graph(function: Callable[[Tensor], Tensor]) -> _Short:
    """With the gradient that autograd makes."""

    def forward(x: Tensor, keep: bool) -> tuple[Tensor, Any]:
        if not keep:
            return function(x), None
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
        return y.detach(), (leaf, y)

    def backward(gradient: Tensor, kept: Any) -> Tensor:
        leaf, y = kept
        return torch.autograd.grad(y, leaf, gradient)[0]

    return _Short(forward, backward)


def _shortened(short: Callable[[Group, Tensor | None], _Short], plain: Run) -> Run:
    def run(rows: Tensor, group: Group, positions: Tensor | None, recompute: bool) -> Tensor:
        way = short(group, positions)
        if not (rows.requires_grad and torch.is_grad_enabled()):
            return way.forward(rows, False)[0]
        return Shortened.apply(rows, way, lambda x: plain(x, group, positions, False), recompute)

    return run


class Shortened(torch.autograd.Function):
    """A function by its shortcut; by the long way where a gradient is to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, short: _Short, long: Callable[[Tensor], Tensor], recompute: bool
    ) -> Tensor:
        """By the shortcut; nothing is kept if it is to be recomputed."""
        ctx.save_for_backward(x)  # so that autograd sees it when x is changed in between
        ctx.short, ctx.long = short, long
        y, ctx.kept = short.forward(x.detach(), not recompute and ctx.needs_input_grad[0])
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """By the shortcut, or by the long way where this gradient is to be differentiated."""
        (x,), (gradient,) = ctx.saved_tensors, grad_outputs
        if torch.is_grad_enabled():
            (d_x,) = torch.autograd.grad(ctx.long(x), x, gradient, create_graph=True)
            return d_x, None, None, None
        kept = ctx.short.forward(x.detach(), True)[1] if ctx.kept is None else ctx.kept
        ctx.kept = None  # a second gradient of the same result makes its own
        return ctx.short.backward(gradient, kept), None, None, None


State = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]


class Watched:
    """What the user may change of the blocks, found once."""

    # Not a closure, of which a deep copy of a map would still watch the model it was copied from.
    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        modules = list({module: None for block in blocks for module in block.modules()})
        parts = [each for module in modules for each in (module._modules, module._parameters)]
        places = [(each, name, item) for each in parts for name, item in each.items()]
        self.weights = list(dict.fromkeys(item for *_, item in places if isinstance(item, Tensor)))
        self.hooks = hook_tables(modules)
        self.places = list(zip(*places, strict=True))
        self.of_user: dict[tuple[int, ...], tuple[int, ...]] = {}

    def state(self) -> State:
        """The user's hooks, storage and version of each weight, and whether all is in place."""
        # This runs at every gradient, so it has no Python loop.
        hooks = tuple(chain.from_iterable(self.hooks))
        if hooks not in self.of_user:
            self.of_user.clear()
            self.of_user[hooks] = user_hooks(self.hooks)
        held, names, items = self.places
        return (
            self.of_user[hooks],
            tuple(map(Tensor.data_ptr, self.weights)),
            tuple(map(operator.attrgetter("_version"), self.weights)),
            all(map(operator.is_, map(dict.get, held, names), items)),
        )


def _tangent(dual: Tensor) -> Tensor:
    value, tangent = forward_ad.unpack_dual(dual)
    return torch.zeros_like(value) if tangent is None else tangent


def is_transformed(x: Tensor) -> bool:
    """Whether forward-mode differentiation or a torch.func transform is at work on x."""
    return forward_ad.unpack_dual(x).tangent is not None or is_functorch_wrapped_tensor(x)
