"""Steering vectors and where they came from: slicing, arithmetic, saving, loading."""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import exchange, vectors_file
from tl_melbo.errors import Damaged
from tl_melbo.shapes import Float, Theta, shape_checked
from tl_melbo.story import now
from tl_melbo.tables import Table
from tl_melbo.text import printable
from tl_melbo.vectors_file import Parts

if TYPE_CHECKING:
    from steering_vectors import SteeringVector

Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors:
    """A library of steering vectors, with the story of how it was made.

    Slicing, arithmetic and `concatenate` give new libraries; nothing changes one in place.

    Attributes:
        vectors: float32, on the CPU, in the units of the residual stream.
        story: JSON-ready facts: method, model, prompts, layers, every hyperparameter, seed,
            versions, date. Read-only.
        columns: by name, one number a vector, such as "objective", which `table()` shows; or one
            row a vector, such as the output direction that belongs to it.
        history: the objective after each step of the search; NaN after a vector's last step.
    """

    vectors: Theta
    story: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    history: Float[Tensor, "vector step"] | None = None

    def __post_init__(self) -> None:
        _check_matrix(self.vectors)
        _check_parts(self.story, self.columns, self.history)
        vectors = self.vectors.detach().to("cpu", torch.float32, copy=True)
        _check_finite(vectors, "vectors")
        n_vectors = vectors.shape[0]
        columns = {"index": torch.arange(n_vectors), **self.columns}
        columns = {name: _number_column(name, column) for name, column in columns.items()}
        for name, column in columns.items():
            if column.shape[:1] != (n_vectors,):
                raise ValueError(
                    f"columns[{name!r}]: shape {tuple(column.shape)}, expected one number, or one "
                    f"row, for each of the {n_vectors} vectors"
                )
        history = None if self.history is None else _number_column("history", self.history)
        if history is not None and (history.ndim != 2 or history.shape[0] != n_vectors):
            raise ValueError(
                f"history: shape {tuple(history.shape)}, expected ({n_vectors}, steps)"
            )
        # Through JSON and back: what cannot be saved is refused now, not at the end of a long run.
        story = MappingProxyType(json.loads(json.dumps(dict(self.story), allow_nan=False)))
        for name, value in (
            ("vectors", vectors),
            ("story", story),
            ("columns", MappingProxyType(columns)),
            ("history", history),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    @shape_checked
    def from_tensor(
        cls,
        vectors: Float[Tensor, "d_model"] | Theta,
        *,
        source_layer: int | None = None,
        model: str | None = None,
        method: str = "from_tensor",
    ) -> "SteeringVectors":
        """Take vectors that were made elsewhere.

        Args:
            vectors: one vector or several, in the units of the residual stream.
            source_layer: the layer after which they are to be added.
            model: the name of the model that they are for.
            method: how they were made, in a word.

        Raises:
            ValueError: a value is not finite.
        """
        theta = vectors[None] if vectors.ndim == 1 else vectors
        _check_finite(theta, "vectors")
        if source_layer is not None and source_layer < 0:
            raise ValueError(f"source_layer={source_layer}: 0 or more, or None if not known")
        story = {"method": method, "model": model, "d_model": theta.shape[1]}
        return cls(theta, {**story, "source_layer": source_layer, "date": now()})

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which cannot take read-only mappings."""
        return type(self), (self.vectors, dict(self.story), dict(self.columns), self.history)

    def __len__(self) -> int:
        return self.vectors.shape[0]

    def __iter__(self) -> Iterator["SteeringVectors"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Index) -> "SteeringVectors":
        """One vector (still a library, of one) or several, with their numbers and the story.

        Raises:
            IndexError: there is no such vector.
        """
        chosen = self._positions(index)
        return replace(
            self,
            vectors=self.vectors[chosen],
            columns={name: column[chosen] for name, column in self.columns.items()},
            history=None if self.history is None else self.history[chosen],
        )

    def _positions(self, index: Index) -> Tensor:
        n_vectors = len(self)
        if isinstance(index, slice):
            return torch.tensor(list(range(n_vectors))[index], dtype=torch.long)
        expected = f"index: got {index!r}, expected an int, a slice, or a list of ints"
        try:
            chosen = torch.as_tensor(index)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(expected) from error
        if chosen.dtype == torch.bool and chosen.ndim:
            if chosen.shape != (n_vectors,):
                raise IndexError(
                    f"index: a mask of shape {tuple(chosen.shape)} for {n_vectors} vectors"
                )
            return chosen.nonzero().flatten()
        if chosen.dtype == torch.bool or (chosen.is_floating_point() and chosen.numel()):
            raise TypeError(expected)
        chosen = chosen.long().flatten()
        outside = chosen[(chosen < -n_vectors) | (chosen >= n_vectors)]
        if len(outside):
            raise IndexError(
                f"index {outside.tolist()}: the library holds {n_vectors} vectors, numbered 0 to "
                f"{n_vectors - 1}"
            )
        return chosen % n_vectors if n_vectors else chosen

    def __mul__(self, scale: float) -> "SteeringVectors":
        """Scale every vector. What was measured of the unscaled ones (objective) is left out."""
        if isinstance(scale, bool) or not isinstance(scale, Real):
            return NotImplemented
        scale = float(scale)
        if not math.isfinite(scale) or not (self.vectors * scale).norm(dim=-1).isfinite().all():
            raise ValueError(f"scale={scale}: expected a finite number that keeps norms finite")
        scales = self.columns.get("scale", torch.ones(len(self), dtype=torch.float32)) * scale
        return replace(
            self,
            vectors=self.vectors * scale,
            columns={"index": self.columns["index"], "scale": scales},
            history=None,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVectors":
        """Divide every vector by a number."""
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise ZeroDivisionError("divisor=0: vectors cannot be divided by zero")
        return self * (1 / float(divisor))

    def __neg__(self) -> "SteeringVectors":
        """Turn every vector around."""
        return self * -1.0

    @property
    def norms(self) -> Float[Tensor, "vector"]:
        """The L2 norm of each vector."""
        return self.vectors.norm(dim=-1)

    @property
    def objective(self) -> Float[Tensor, "vector"] | None:
        """What the search reached for each vector, or None where that is not known."""
        return self.columns.get("objective")

    @property
    def source_layer(self) -> int | None:
        """The layer after which the vectors are added, or None where that is not known."""
        return self.story.get("source_layer")

    def table(self) -> pd.DataFrame:
        """One row a vector: index, norm, objective and whatever other number is known of each."""
        frame = Table({"index": self.columns["index"].numpy(), "norm": self.norms.numpy()})
        for name, column in self.columns.items():
            if name != "index" and column.ndim == 1:
                frame[name] = self._named(name, column)
        return frame

    def _named(self, name: str, column: Tensor) -> Any:
        """A column's numbers, or the words that the story has for them."""
        words = self.story.get("categories", {}).get(name)
        return column.numpy() if words is None else pd.Categorical.from_codes(column, words)

    @shape_checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the story in its metadata, whole or not at all.

        Raises:
            FileNotFoundError: the folder does not exist.
            PermissionError: the folder cannot be written to.
            OSError: the disk is full, say. An older file of that name is intact.
            ValueError: the story holds what `load` would refuse.
        """
        vectors_file.write(path, Parts(self.vectors, self.story, self.columns, self.history))

    @classmethod
    @shape_checked
    def load(cls, path: str | Path) -> "SteeringVectors":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            Damaged: it is not a safetensors file, is cut or damaged, is not one of ours, or lacks
                its story.
            MemoryError: it does not fit.
        """
        parts = vectors_file.read(path)
        try:
            return cls(*parts)
        except ValueError as error:
            raise Damaged(f"{path}: {error}; save it again", Path(path)) from error

    @shape_checked
    def to_repeng_gguf(
        self, path: str | Path, *, layer: int | None = None, model_type: str | None = None
    ) -> None:
        """Write one vector as a control vector for llama.cpp and repeng.

        `llama-cli --control-vector FILE` adds it as it is, `--control-vector-scaled FILE:0.5` at
        half its norm (`FILE 0.5` in older versions). In repeng, give `ControlModel` the layer.

        Args:
            path: the .gguf file; replaced whole or not at all.
            layer: the block after which it is added; None takes the vectors' source layer.
            model_type: the architecture as in a Hugging Face config, "llama" for example; None
                takes what the story tells.

        Raises:
            ValueError: more or fewer than one vector; layer 0, or none known; no model type known.
            OSError: as `save`.

        Source: llama.cpp, common_control_vector_load; repeng 0.4, ControlVector.export_gguf.
        """
        exchange.write_control_vector(path, self, layer, model_type)

    @shape_checked
    def to_steering_vectors(self, *, layer: int | None = None) -> "SteeringVector":
        """One vector as an object of the steering-vectors package, for a Hugging Face model.

            with found[3].to_steering_vectors().apply(hugging_face_model):
                ...

        Args:
            layer: the block after which it is added; None takes the vectors' source layer.

        Raises:
            ValueError: more or fewer than one vector, or no layer known.
            ModuleNotFoundError: the package is not installed.
        """
        return exchange.as_steering_vector(self, layer)

    @shape_checked
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        completions: pd.DataFrame | None = None,
        token: str | None = None,
    ) -> str:
        """Put the vectors on the Hugging Face hub, with a model card that tells their story.

        The story holds the prompts that the vectors were found with; so does the card.

        Args:
            repo_id: "user/name"; made if need be, its card and vectors replaced.
            private: whether a new repository is for you alone.
            completions: what the model writes under them, as `generate` gives it, for the card.
            token: of your account; None takes the one that `hf auth login` left.

        Returns:
            The repository's address.

        Raises:
            ValueError: no vectors, a name that the hub does not allow, or a frame that `generate`
                did not give.
            OSError: the hub cannot be reached, or forbids it.
        """
        return exchange.upload(self, repo_id, private, completions, token)

    @classmethod
    @shape_checked
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, token: str | None = None
    ) -> "SteeringVectors":
        """Fetch what `push_to_hub` put there; a file already fetched is taken from the cache.

        Args:
            repo_id: "user/name".
            revision: a branch, tag or commit; None takes the newest.
            token: as in `push_to_hub`.

        Raises:
            FileNotFoundError: there is no such repository or revision, or no vectors in it.
            OSError: the hub cannot be reached.
            ValueError: a name that the hub does not allow, or a file that `load` refuses.
        """
        return cls.load(exchange.download(repo_id, revision, token))

    def __repr__(self) -> str:
        return f"SteeringVectors({self._summary()})"

    def _summary(self) -> str:
        count = f"{len(self)} vector{'' if len(self) == 1 else 's'}"
        parts = [f"{count} of width {self.vectors.shape[1]}"]
        if len(self):
            low, high = float(self.norms.min()), float(self.norms.max())
            same = high - low <= 1e-3 * high
            parts.append(f"norm {high:.4g}" if same else f"norms {low:.4g} to {high:.4g}")
        story = self.story
        if story.get("method"):
            parts.append(str(story["method"]))
        if story.get("model"):
            parts.append(str(story["model"]))
        if story.get("source_layer") is not None:
            target = story.get("target_layer")
            arrow = "" if target is None else f" -> {target}"
            parts.append(f"layer {story['source_layer']}{arrow}")
        return printable(", ".join(parts))

    def _repr_html_(self) -> str:
        story = html.escape(printable(json.dumps(dict(self.story), indent=2, ensure_ascii=False)))
        table = self.table()._repr_html_()
        return (
            f"<p><b>SteeringVectors</b>: {html.escape(self._summary())}</p>{table}"
            f"<details><summary>Story</summary><pre>{story}</pre></details>"
        )


def _check_matrix(vectors: Any) -> None:
    if not (isinstance(vectors, Tensor) and vectors.ndim == 2 and vectors.is_floating_point()):
        got = f"{vectors.dtype}{list(vectors.shape)}" if isinstance(vectors, Tensor) else vectors
        raise TypeError(
            f"vectors: got {got!s:.80}, expected a floating-point tensor [vector, d_model]; "
            "SteeringVectors.from_tensor takes a single vector, too"
        )
    if vectors.layout is not torch.strided or vectors.is_meta:
        raise TypeError("vectors: a sparse tensor, or one without numbers; pass vectors.to_dense()")
    if not vectors.shape[1]:
        raise ValueError(f"vectors: shape {tuple(vectors.shape)}; a vector has at least one number")


def _check_parts(story: Any, columns: Any, history: Any) -> None:
    if not isinstance(story, Mapping):
        raise TypeError(f"story: got {type(story).__name__}, expected a mapping of facts")
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns: got {type(columns).__name__}, expected a mapping of tensors")
    for name, column in (*columns.items(), ("history", history)):
        if not isinstance(name, str) or name == "norm":
            raise ValueError(f"columns: {name!r} cannot be the name of one; choose another word")
        if not isinstance(column, Tensor) and not (name == "history" and column is None):
            raise TypeError(f"columns[{name!r}]: got {type(column).__name__}, expected a tensor")


def _number_column(name: str, column: Tensor) -> Tensor:
    """The column as it can be saved: float32, float64 or int64, on the CPU."""
    if column.is_complex() or column.layout is not torch.strided or column.is_meta:
        raise TypeError(f"{name}: a {column.dtype} tensor on {column.device}, expected numbers")
    kind = column.dtype
    if kind not in (torch.float32, torch.float64):
        kind = torch.float32 if column.is_floating_point() else torch.int64
    return column.detach().to("cpu", kind, copy=True)


def _check_finite(vectors: Tensor, name: str) -> None:
    bad = (~torch.isfinite(vectors)).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name}: vectors {bad[:10]} hold values that are not finite")
