"""What steers a model: additions inside some blocks, a row for each row of a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from tl_melbo.shapes import Float, Theta

# Where in a block something is read and added. "block": both in the residual stream after it.
# "attention": read is the input of attention's output projection, and added to is its output.
Place = Literal["block", "attention"]


class Additions:
    """A base: rows of additions in some blocks; sliced as a tensor is.

    A subclass is a dataclass, and all its tensors have these rows.

    Attributes:
        layers: the blocks in which something is added.
        place: where in these blocks.
    """

    layers: Sequence[int]
    place: Place

    def __len__(self) -> int:
        return next(len(each) for each in vars(self).values() if isinstance(each, Tensor))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, of: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: of(each) for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(cast(Any, self), **tensors)

    def sizes(self, dtype: torch.dtype) -> Float[Tensor, "row"]:
        """A bound on what each row adds, in this type: 0 adds nothing, and must be exact."""
        raise NotImplementedError

    def after(self, layer: int, read: Tensor) -> Tensor:
        """What to add in a block, to be broadcast, from what is read there: its type, its device.

        What is read has one row, or as many as there are rows here.
        """
        raise NotImplementedError


@runtime_checkable
class Steering(Protocol):
    """What knows its own blocks, and can steer: it has a length, rows, metadata and additions."""

    @property
    def story(self) -> Mapping[str, Any]:
        """How it was made."""

    @property
    def d_model(self) -> int:
        """The width of the residual stream that it belongs to."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Self: ...

    def additions(self, scales: Sequence[float]) -> Additions:
        """All at the first scale, then all at the second, and so on."""


@dataclass(eq=False)
class VectorAdditions(Additions):
    """Vectors, whatever is read: `theta` is [row, layer, d_model], float32."""

    theta: Float[Tensor, "row layer d_model"]
    layers: Sequence[int]
    place: Place = "block"

    @classmethod
    def of(cls, theta: Theta, layer: int) -> Self:
        """Vectors after one block."""
        return cls(theta[:, None], (layer,))

    def sizes(self, dtype: torch.dtype) -> Float[Tensor, "row"]:
        """The largest absolute value of each row."""
        return self.theta.to(dtype).abs().amax((1, 2)).cpu()

    def after(self, layer: int, read: Tensor) -> Tensor:
        """The vectors of a block, at every position."""
        return self.theta[:, [self.layers.index(layer)]].to(read.device, read.dtype)


@dataclass(eq=False)
class LowRankRows(Additions):
    """Rows of products A B and their sizes, [row]: what adapters and gated factors share."""

    A: Tensor
    B: Tensor
    size: Tensor
    layers: Sequence[int]
