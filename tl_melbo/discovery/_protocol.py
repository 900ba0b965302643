"""What a discovery method needs of the map that it searches: tensors and callables, no model."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

# Of an effect that is rounding alone: so many times the type's precision times the residual stream.
_ROUNDING = 32


@runtime_checkable
class EffectMap(Protocol):
    """A differentiable map from vectors to their effects; `ActivationMap` is one.

    A map may also have `resolution(positions)`, a bound on the norm of an effect that is rounding
    alone; without it, it is taken to be some rounding of `x`.
    """

    @property
    def x(self) -> Tensor:
        """The unsteered residual stream at the source, [prompt, pos, d_model]."""
        ...

    @property
    def mask(self) -> Tensor:
        """True where `x` holds a token, [prompt, pos]."""
        ...

    # The type is loose so that maps without `positions`, which find all effects, are maps, too.
    @property
    def delta(self) -> Callable[..., Tensor]:
        """(theta [vector, d_model], positions) -> effects, [vector, prompt, pos, d_model].

        Zero at all other positions than those of the slice `positions`.
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


def effects_at(f: EffectMap, positions: slice) -> Callable[[Tensor], Tensor]:
    """The function from vectors to their effects at some positions, and zeros at all others."""
    if "positions" in inspect.signature(f.delta).parameters:
        return functools.partial(f.delta, positions=positions)
    counted = f.position_mask(positions)[:, :, None]
    return lambda theta: f.delta(theta) * counted


def rounding(f: EffectMap, positions: slice) -> float:
    """A bound on the norm of an effect, over all these positions, that is rounding alone."""
    resolution = getattr(f, "resolution", None)
    if resolution is not None:
        return float(resolution(positions))
    x = f.x[f.position_mask(positions)].double()
    return _ROUNDING * torch.finfo(f.x.dtype).eps * float(x.norm())


def theta_like(f: EffectMap, theta: Tensor) -> Tensor:
    """Vectors on the map's device, and in float32 at least."""
    return theta.to(f.x.device, torch.promote_types(f.x.dtype, torch.float32))


def typical_norm(f: EffectMap) -> float:
    """The median norm of a token's residual at the source."""
    return float(f.x.float().norm(dim=-1)[f.mask].median())
