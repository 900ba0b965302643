"""What a discovery method needs of the map that it searches: tensors and callables, no model."""

from typing import Any, Protocol, runtime_checkable

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

    def delta(self, theta: Tensor, positions: slice = slice(None)) -> Tensor:
        """[vector, d_model] -> the effect of each vector, [vector, prompt, pos, d_model].

        Zeros outside `positions`, which are counted on each prompt's own tokens.
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
