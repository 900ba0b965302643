"""A faster way through the blocks that does the same, and when it may be taken."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from tl_melbo.fast_blocks import FastBlocks
from tl_melbo.model.bridge import (
    without_bridge,
)
from tl_melbo.replay import BlockCall, run_layers

State = tuple[tuple[int, ...], tuple[tuple[int, int], ...], bool]


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The blocks without hooks: Hugging Face's layers, or their weights in our own.

    `differentiable` is slower, and can be differentiated twice, or forward.
    """

    layers: tuple[nn.Module, ...]
    differentiable: tuple[nn.Module, ...]
    block_calls: dict[int, list[BlockCall]]
    fast: FastBlocks | None
    rotations: dict[int, Tensor]
    run: Callable[..., Tensor]
    y: Tensor
    y_differentiable: Tensor

    @classmethod
    def of(
        cls,
        blocks: Sequence[nn.Module],
        block_calls: dict[int, list[BlockCall]],
        fast: FastBlocks | None = None,
        rotations: dict[int, Tensor] | None = None,
    ) -> "Shortcut":
        """The same blocks without hooks, by their own layers or by `fast`."""
        layers = tuple(without_bridge(block) for block in blocks)
        differentiable = tuple(without_bridge(block, "eager") for block in blocks)
        none = torch.empty(0)
        return cls(
            layers, differentiable, block_calls, fast, rotations or {}, run_layers, none, none
        )

    def __call__(self, rows: Tensor, length: int, positions: Tensor | None) -> Tensor:
        """Push rows of prompts of one length through."""
        if self.fast is not None:
            return self.fast(rows, self.rotations[length], positions)
        return self.run(self.layers, self.block_calls[length], rows, positions)


@dataclass(frozen=True, eq=False)
class Watched:
    """The modules and parameters of the blocks: looking at them is faster than finding them."""

    modules: tuple[nn.Module, ...]
    parameters: tuple[Tensor, ...]
    places: tuple[tuple[dict[str, Any], str, Any], ...]

    @classmethod
    def of(cls, blocks: Iterable[nn.Module]) -> "Watched":
        """Find them once."""
        modules = tuple({module: None for block in blocks for module in block.modules()})
        parameters = {p: None for module in modules for p in module._parameters.values()}
        places = tuple(
            (held, name, item)
            for module in modules
            for held in (module._modules, module._parameters)
            for name, item in held.items()
        )
        return cls(modules, tuple(p for p in parameters if p is not None), places)

    def are_in_place(self) -> bool:
        """Whether no module or parameter was exchanged since."""
        return all(held.get(name) is item for held, name, item in self.places)


class Shortened(torch.autograd.Function):
    """A function by its shortcut; by the long way where a gradient is to be differentiated.

    Neither our own gradient nor that of the fused attention kernels can be. The shortcut's graph is
    held until its gradient is taken, or, if it is to be recomputed, never.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        short: Callable[[Tensor], Tensor],
        long: Callable[[Tensor], Tensor],
        recompute: bool,
    ) -> Tensor:
        """By the shortcut."""
        ctx.save_for_backward(x)  # so that autograd sees it when x is changed in between
        ctx.short, ctx.long, ctx.graph = short, long, None
        if recompute or not ctx.needs_input_grad[0]:
            return short(x.detach())
        ctx.graph = _graph(short, x)
        return ctx.graph[1].detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """By the shortcut, or by the long way where this gradient is to be differentiated."""
        (x,), (gradient,) = ctx.saved_tensors, grad_outputs
        if torch.is_grad_enabled():
            (d_x,) = torch.autograd.grad(ctx.long(x), x, gradient, create_graph=True)
            return d_x, None, None, None
        leaf, y = _graph(ctx.short, x) if ctx.graph is None else ctx.graph
        ctx.graph = None  # a second gradient of the same result makes its own
        (d_x,) = torch.autograd.grad(y, leaf, gradient)
        return d_x, None, None, None


def _graph(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return leaf, function(leaf)


def is_transformed(x: Tensor) -> bool:
    """Whether forward-mode differentiation or a torch.func transform is at work on x."""
    return forward_ad.unpack_dual(x).tangent is not None or is_functorch_wrapped_tensor(x)
