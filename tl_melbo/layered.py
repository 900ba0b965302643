"""Vectors of several blocks at once: what an adapter or a factor adds on average in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks, exchange, vectors_file
from tl_melbo.additions import Place, VectorAdditions
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.stored import BlockLibrary, VectorLibrary
from tl_melbo.story import now
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

if TYPE_CHECKING:
    from steering_vectors import SteeringVector


@dataclass(frozen=True, eq=False, repr=False)
class LayeredVectors(VectorLibrary, BlockLibrary):
    """Steering vectors that are added in several blocks at once, one vector a block.

        with tm.steered(model, layered[0]):
            print(model.generate("Once upon a time"))

    Attributes:
        vectors: float32, on the CPU, in the units of the residual stream.
    """

    kind = vectors_file.LAYERED
    vectors: Float[Tensor, "vector layer d_model"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vectors.shape[1] != len(self.layers):
            count = self.vectors.shape[1]
            raise ValueError(f"layers: {len(self.layers)} given, for vectors of {count} blocks")

    @classmethod
    @shape_checked
    def from_tensor(
        cls,
        vectors: Float[Tensor, "vector layer d_model"],
        layers: Sequence[int],
        *,
        model: str | None = None,
        method: str = "from_tensor",
    ) -> "LayeredVectors":
        """Take vectors that were made elsewhere, in the residual stream's units.

        Args:
            layers: the block after which each is to be added, none of them twice.
        """
        story: dict[str, Any] = {"method": method, "model": model, "d_model": vectors.shape[2]}
        return cls(vectors, story={**story, "layers": list(layers), "date": now()})

    @property
    def place(self) -> Place:
        """Where in its block each is added: after it, or to what its attention writes."""
        return self.story.get("place") or "block"

    @shape_checked
    def at(self, layer: int) -> SteeringVectors:
        """The vectors of one block, as a library of their own."""
        number = self._column(layer)
        story = {fact: value for fact, value in self.story.items() if fact != "layers"}
        columns = {
            name: column if column.ndim == 1 else column[:, number]
            for name, column in self.columns.items()
        }
        return SteeringVectors(
            self.vectors[:, number], {**story, "source_layer": layer}, columns, self.history
        )

    def _column(self, layer: int) -> int:
        if self.place != "block":
            raise ValueError(
                "vectors: they are added to what attention writes, inside their blocks, and not "
                "after them; use all with tm.steered or tm.generate"
            )
        if layer not in self.layers:
            raise ValueError(f"layer={layer}: there are vectors of the blocks {list(self.layers)}")
        return self.layers.index(layer)

    def additions(self, scales: Sequence[float]) -> VectorAdditions:
        """What `steered` adds: see `tl_melbo.additions.Steering`."""
        theta = torch.cat([self.vectors * scale for scale in scales])
        return VectorAdditions(theta, self.layers, self.place)

    def table(self) -> pd.DataFrame:
        """One row a vector and block: index, layer, norm, and what else is known of each."""
        n_vectors, n_layers = self.norms.shape
        frame = Table({"index": self.columns["index"].repeat_interleave(n_layers).numpy()})
        frame["layer"] = list(self.layers) * n_vectors
        frame["norm"] = self.norms.flatten().numpy()
        for name, column in self.columns.items():
            if name != "index" and column.ndim <= 2:
                each = column if column.ndim == 2 else column[:, None]
                frame[name] = each.expand(-1, n_layers).flatten().numpy()
        return frame

    @shape_checked
    def to_repeng_gguf(
        self,
        path: str | Path,
        *,
        layers: Sequence[int] | None = None,
        model_type: str | None = None,
    ) -> None:
        """Write the vectors of one index: see `SteeringVectors.to_repeng_gguf`.

        Args:
            layers: those of the blocks to write; None takes all. llama.cpp knows none after block
                0: pass those from 1 on.
        """
        directions = self._directions(layers, "to_repeng_gguf")
        exchange.write_control_vector(path, directions, model_type or self.story.get("model_type"))

    @shape_checked
    def to_steering_vectors(self, *, layers: Sequence[int] | None = None) -> "SteeringVector":
        """The vectors of one index, of some blocks or all, for the steering-vectors package."""
        return exchange.as_steering_vector(self._directions(layers, "to_steering_vectors"))

    def _directions(self, layers: Sequence[int] | None, function: str) -> dict[int, Tensor]:
        checks.exactly_one(self, function, f"pick one, as layered[3].{function}(...)")
        chosen = self.layers if layers is None else layers
        if not chosen:
            raise ValueError("layers: none given; pass at least one block, or None for all")
        return {layer: self.vectors[0, self._column(layer)] for layer in chosen}

    def __repr__(self) -> str:
        low, high = min(self.layers), max(self.layers)
        told = f"{len(self)} x {len(self.layers)} blocks, {low} to {high}, width {self.d_model}"
        return self._described(told)
