"""What a discovery method needs of the map that it searches: tensors and callables, no model."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class EffectMap(Protocol):
    """A differentiable map from vectors to their effects; `ActivationMap` is one."""

    @property
    def x(self) -> Tensor:
        """The unsteered residual stream at the source, [prompt, pos, d_model]."""
        ...

    @property
    def mask(self) -> Tensor:
        """True where `x` holds a token, [prompt, pos]."""
        ...

    def delta(self, theta: Tensor) -> Tensor:
        """[vector, d_model] -> the effect of each vector, [vector, prompt, pos, d_model].

        It may take `positions` as well, a slice as in `position_mask`, and save itself the others.
        """
        ...

    def position_mask(self, positions: slice) -> Tensor:
        """Which positions a slice picks in each prompt, [prompt, pos]."""
        ...

    def vectors_at_once(self, with_gradient: bool = True) -> int:
        """How many vectors fit in one call of `delta`."""
        ...

    def story(self) -> dict[str, Any]:
        """Where the map comes from, as JSON-ready facts."""
        ...


@runtime_checkable
class DivergenceMap(Protocol):
    """A map that also knows what its vectors do to the next token; `ActivationMap` is one."""

    def divergence(self, theta: Tensor) -> Tensor:
        """[vector, d_model] -> KL(P_vector || P_unsteered) in nats, [vector, prompt]."""
        ...


@contextmanager
def own_arithmetic(f: EffectMap) -> Iterator[None]:
    """Gradients, and the types that the map has, whatever the caller's surroundings ask for."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(f.x.device.type, enabled=False),
    ):
        yield


def effect_at(f: EffectMap, theta: Tensor, positions: slice) -> Tensor:
    """Effects at some positions, and zeros at all others, [vector, prompt, pos, d_model]."""
    if "positions" in inspect.signature(f.delta).parameters:
        return cast(Any, f).delta(theta, positions=positions)
    return f.delta(theta) * f.position_mask(positions)[:, :, None]
