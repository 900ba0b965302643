"""What libraries of any kind share: rows that are chosen, columns, a file with metadata."""

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks, vectors_file
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table
from tl_melbo.text import printable

# Not Self, which beartype knows in classes alone that it decorates.
Kept = TypeVar("Kept", bound="Library")
Index = int | slice | Sequence[int] | Tensor
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Library:
    """A base: tensors with a row for each thing, with the story of how they were made.

    A subclass adds the tensors that its `kind` of file names. Nothing changes one in place.

    Attributes:
        story: JSON-ready facts. Read-only.
        columns: by name, one number a row, or one row of numbers.
        history: what was measured at each step.
    """

    kind: ClassVar[vectors_file.Kind]
    story: Mapping[str, Any]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    history: Tensor | None = None

    def __post_init__(self) -> None:
        for name in self.kind.axes:
            tensor = getattr(self, name).detach().to("cpu", torch.float32, copy=True)
            checks.finite(tensor.flatten(1), name, self.kind.rows)
            object.__setattr__(self, name, tensor)
        columns = {"index": torch.arange(len(self)), **self.columns}
        for name, column in columns.items():
            if name in (*self.kind.axes, "history", "norm"):
                raise ValueError(f"columns: {name!r} cannot be the name of one; choose another")
            columns[name] = self._as_column(column, f"columns[{name!r}]")
        history = self.history
        # Through JSON and back: what cannot be saved is refused now, not at the end of a long run.
        try:
            story = json.loads(json.dumps(dict(self.story), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"story: {error}; pass what JSON can hold") from None
        for name, value in (
            ("story", MappingProxyType(story)),
            ("columns", MappingProxyType(columns)),
            ("history", None if history is None else self._as_column(history, "history")),
        ):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which cannot take read-only mappings."""
        facts = {"story": dict(self.story), "columns": dict(self.columns)}
        return functools.partial(type(self), **self._tensors(), **facts), ()

    def _tensors(self) -> dict[str, Tensor]:
        history = {} if self.history is None else {"history": self.history}
        return {name: getattr(self, name) for name in self.kind.axes} | history

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.kind.axes))))

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Index) -> Self:
        """One row (a library of length 1) or several, with their numbers; else IndexError."""
        chosen = self._chosen(index)
        return replace(
            self,
            columns={name: column[chosen] for name, column in self.columns.items()},
            **{name: tensor[chosen] for name, tensor in self._tensors().items()},
        )

    def table(self) -> pd.DataFrame:
        """One row each: its number, and every other number that is known of it."""
        return Table({n: column.numpy() for n, column in self.columns.items() if column.ndim == 1})

    def _described(self, *told: str) -> str:
        """For `repr`: the class, what is told, and how and in which model it was made."""
        facts = [str(self.story[fact]) for fact in ("method", "model") if self.story.get(fact)]
        return printable(f"{type(self).__name__}({', '.join([*told, *facts])})")

    @shape_checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the story in its metadata, whole or not at all.

        Raises:
            OSError: it cannot be written. An older file of that name is intact.
            ValueError: the story holds what `load` would refuse.
        """
        vectors_file.write(path, dict(self.story), {**self._tensors(), **self.columns}, self.kind)

    @classmethod
    @shape_checked
    def load(cls: type[Kept], path: str | Path) -> Kept:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            Damaged: it is cut or damaged, or not one that `save` wrote.
        """
        with vectors_file.damage_told(path):
            story, columns = vectors_file.read(path, cls.kind)
            own = [name for name in (*cls.kind.axes, "history") if name in columns]
            tensors = {name: columns.pop(name) for name in own}
            return cls(**tensors, story=story, columns=columns)

    def _chosen(self, index: Index) -> Tensor:
        """The positions that an index means."""
        n_rows = len(self)
        if isinstance(index, slice):
            return torch.tensor(list(range(n_rows))[index], dtype=torch.long)
        try:
            chosen = torch.as_tensor(index).cpu()
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.tensor(torch.nan)
        if chosen.dtype == torch.bool and chosen.shape == (n_rows,):
            return chosen.nonzero().flatten()
        if chosen.numel() and chosen.dtype not in _INTEGERS:
            raise TypeError(
                f"index: got {index!r}, expected an int, a slice, a list of ints, or a mask of "
                f"{n_rows} booleans"
            )
        chosen = chosen.long().flatten()
        outside = chosen[(chosen < -n_rows) | (chosen >= n_rows)]
        if len(outside):
            raise IndexError(
                f"index {outside.tolist()}: the {self.kind.called or self.kind.reader} holds "
                f"{n_rows} {self.kind.rows}, numbered 0 to {n_rows - 1}"
            )
        return chosen % max(1, n_rows)

    def _as_column(self, column: Any, name: str) -> Tensor:
        """A column as it can be saved: float32, float64 or int64, on the CPU, one entry a row."""
        known = isinstance(column, Tensor)
        if not known or column.is_complex() or column.is_meta or column.is_sparse:
            got = f"a {column.dtype} tensor" if known else type(column).__name__
            raise TypeError(f"{name}: {got}, expected a tensor of numbers")
        if column.shape[:1] != (len(self),):
            raise ValueError(
                f"{name}: shape {tuple(column.shape)}, expected a number or a row for each of the "
                f"{len(self)} {self.kind.rows}"
            )
        kind = column.dtype
        if kind not in (torch.float32, torch.float64):
            kind = torch.float32 if column.is_floating_point() else torch.int64
        return column.detach().to("cpu", kind, copy=True)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class VectorLibrary(Library):
    """A base: a library whose rows are vectors, which can be scaled."""

    vectors: Tensor

    @property
    def norms(self) -> Tensor:
        """The L2 norm of each vector."""
        return self.vectors.norm(dim=-1)

    def __mul__(self, scale: float) -> Self:
        """Scale every vector. What was measured of the unscaled ones (objective) is left out."""
        if isinstance(scale, bool) or not isinstance(scale, Real):
            return NotImplemented
        scale = float(scale)
        vectors = self.vectors * scale
        if not math.isfinite(scale) or not vectors.norm(dim=-1).isfinite().all():
            raise ValueError(f"scale={scale}: expected a finite number that keeps norms finite")
        scales = self.columns.get("scale", torch.ones(len(self), dtype=torch.float32)) * scale
        columns = {"index": self.columns["index"], "scale": scales}
        return replace(self, vectors=vectors, columns=columns, history=None)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        """Divide every vector by a number."""
        return self * (1 / divisor)

    def __neg__(self) -> Self:
        """Turn every vector around."""
        return self * -1.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BlockLibrary(Library):
    """A base: what belongs after some blocks, which the fact `layers` of its story names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.story.get("layers") or []
        if not layers or min(layers) < 0 or len({*layers}) < len(layers):
            raise ValueError(f"layers={layers}: numbers of blocks, each once")

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks after which something is added."""
        return tuple(self.story["layers"])

    @property
    def d_model(self) -> int:
        """The width of the residual stream: the last axis of what is added to it."""
        return getattr(self, [*self.kind.axes][-1]).shape[-1]
