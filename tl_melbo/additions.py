"""What steers a model: additions inside some blocks, a row for each row of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tl_melbo.shapes import Float, Theta

# Where in a block something is read and added. "block": both in the residual stream after it.
# "attention": read is the input of attention's output projection, and added to is its output.
Place = Literal["block", "attention"]


class Additions(Protocol):
    """Rows of additions in some blocks; sliced as a tensor is."""

    @property
    def layers(self) -> Sequence[int]:
        """The blocks in which something is added."""

    @property
    def place(self) -> Place:
        """Where in these blocks."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor) -> Self: ...

    def to(self, device: torch.device) -> Self:
        """The same on another device."""

    def sizes(self, dtype: torch.dtype) -> Float[Tensor, "row"]:
        """A bound on what each row adds, in this type: 0 adds nothing, and must be exact."""

    def after(self, layer: int, read: Tensor) -> Tensor:
        """What to add in a block, to be broadcast, from what is read there: its type, its device.

        What is read has one row, or as many as there are rows here.
        """


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


@dataclass(frozen=True)
class VectorAdditions:
    """Vectors, whatever is read: `theta` is [row, layer, d_model], float32."""

    theta: Float[Tensor, "row layer d_model"]
    layers: Sequence[int]
    place: Place = "block"

    @classmethod
    def of(cls, theta: Theta, layer: int) -> Self:
        """Vectors after one block."""
        return cls(theta[:, None], (layer,))

    def __len__(self) -> int:
        return len(self.theta)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return replace(self, theta=self.theta[rows])

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, theta=self.theta.to(device))

    def sizes(self, dtype: torch.dtype) -> Float[Tensor, "row"]:
        """The largest absolute value of each row."""
        return self.theta.to(dtype).abs().amax((1, 2)).cpu()

    def after(self, layer: int, read: Tensor) -> Tensor:
        """The vectors of a block, at every position."""
        return self.theta[:, [self.layers.index(layer)]].to(read.device, read.dtype)


@dataclass(frozen=True)
class LowRankRows:
    """Rows of products A B and their sizes, [row]: what adapters and gated factors share."""

    A: Tensor
    B: Tensor
    size: Tensor
    layers: Sequence[int]

    def __len__(self) -> int:
        return len(self.A)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return replace(self, A=self.A[rows], B=self.B[rows], size=self.size[rows])

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, A=self.A.to(device), B=self.B.to(device), size=self.size.to(device))
