"""Steering vectors and where they came from: slicing, arithmetic, saving, loading."""

import html
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_melbo import exchange
from tl_melbo.files import replacing
from tl_melbo.memory import is_out_of_memory
from tl_melbo.shapes import Float, Theta, shape_checked
from tl_melbo.story import now
from tl_melbo.text import printable

if TYPE_CHECKING:
    import pandas as pd
    from steering_vectors import SteeringVector

_FORMAT = "tl_melbo.vectors"
_FORMAT_VERSION = "1"
_COLUMN = "column."
# A story is text: a header of this size is damage or an attack, not a long prompt.
_MAX_HEADER_BYTES = 2 * 2**20
# So is a file of more tensors than anybody has columns.
_MOST_TENSORS = 256

Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors:
    """A library of steering vectors, with the story of how it was made.

    Slicing, arithmetic and `concatenate` give new libraries; nothing changes one in place.

    Attributes:
        vectors: float32, on the CPU, in the units of the residual stream.
        story: JSON-ready facts: method, model, prompts, layers, every hyperparameter, seed,
            versions, date. Read-only.
        columns: one number a vector and name, such as "objective"; `table()` shows them.
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
            if column.shape != (n_vectors,):
                raise ValueError(
                    f"columns[{name!r}]: shape {tuple(column.shape)}, expected one number for "
                    f"each of the {n_vectors} vectors"
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
            return (
                torch.arange(n_vectors)[index]
                if (index.step or 1) > 0
                else torch.tensor(list(range(n_vectors))[index], dtype=torch.long)
            )
        if isinstance(index, bool):
            raise TypeError("index: a bool; pass an int, a slice, or a list of ints")
        try:
            chosen = torch.as_tensor(index)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"index: got {index!r}, expected an int, a slice, or a list of ints"
            ) from error
        if chosen.dtype == torch.bool:
            if chosen.shape != (n_vectors,):
                raise IndexError(
                    f"index: a mask of shape {tuple(chosen.shape)} for {n_vectors} vectors"
                )
            return chosen.nonzero().flatten()
        if chosen.is_floating_point() and chosen.numel():
            raise TypeError(f"index: got {index!r}, expected an int, a slice, or a list of ints")
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

    def table(self) -> "pd.DataFrame":
        """One row a vector: index, norm, objective and whatever else is known of each."""
        from tl_melbo.tables import Table

        frame = Table({"index": self.columns["index"].numpy(), "norm": self.norms.numpy()})
        for name, column in self.columns.items():
            if name != "index":
                frame[name] = self._named(name, column)
        return frame

    def _named(self, name: str, column: Tensor) -> Any:
        """A column's numbers, or the words that the story has for them."""
        import pandas as pd

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
        _check_story("story", dict(self.story), self.columns, "correct it")
        tensors = {"vectors": self.vectors}
        tensors |= {_COLUMN + name: column for name, column in self.columns.items()}
        if self.history is not None:
            tensors["history"] = self.history
        story = json.dumps(dict(self.story), allow_nan=False)
        if len(story) > _MAX_HEADER_BYTES // 2 or len(tensors) > _MOST_TENSORS:
            raise ValueError(
                f"story: {len(story):,} characters and {len(tensors)} tensors, more than can be "
                f"saved ({_MAX_HEADER_BYTES // 2:,} and {_MOST_TENSORS}); shorten its prompts"
            )
        metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "story": story}
        with replacing(path) as temporary:
            try:
                save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
            except SafetensorError as error:
                raise OSError(
                    f"{path}: cannot be written ({error}); what was there before is intact"
                ) from error

    @classmethod
    @shape_checked
    def load(cls, path: str | Path) -> "SteeringVectors":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: it is a folder.
            ValueError: it is not a safetensors file, is cut or damaged, is not one of ours, or
                lacks its story.
            MemoryError: it does not fit.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name the vector file in it")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        _check_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                _check_metadata(path, metadata)
                story = json.loads(metadata["story"], parse_int=_json_int)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._from_file(path, tensors, story)
        except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a safetensors file, or damaged ({error}); save it again"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            size = path.stat().st_size // 2**20
            raise MemoryError(f"{path}: its {size:,} MiB do not fit into memory") from error

    @classmethod
    def _from_file(cls, path: Path, tensors: dict[str, Tensor], story: Any) -> "SteeringVectors":
        vectors = tensors.pop("vectors", None)
        if vectors is None or vectors.ndim != 2 or vectors.dtype != torch.float32:
            raise ValueError(f"{path}: holds no float32 matrix of vectors; save it again")
        history = tensors.pop("history", None)
        columns = {k.removeprefix(_COLUMN): v for k, v in tensors.items() if k.startswith(_COLUMN)}
        _check_story(path, story, columns, "save it again")
        known = (torch.float32, torch.float64, torch.int64)
        for name, column in [("history", history), *columns.items()]:
            if name == "norm" or (column is not None and column.dtype not in known):
                raise ValueError(f"{path}: the column {name!r} is not one that we write")
        index = columns.get("index", torch.empty(0, dtype=torch.int64))
        if index.dtype != torch.int64 or (index < 0).any():
            raise ValueError(f"{path}: the column 'index' does not hold numbers of vectors")
        try:
            return cls(vectors, story, columns, history)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; save it again") from error

    @shape_checked
    def to_repeng_gguf(
        self, path: str | Path, *, layer: int | None = None, model_type: str | None = None
    ) -> None:
        """Write one vector as a control vector for llama.cpp and repeng.

        `llama-cli --control-vector FILE` adds it as it is, `--control-vector-scaled FILE:0.5` at
        half its length (`FILE 0.5` in older versions). In repeng, give `ControlModel` the layer.

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
        model_type = self.story.get("model_type") if model_type is None else model_type
        if not model_type:
            raise ValueError(
                "model_type: not given, and the story does not tell; pass the one in the model's "
                "config, for example model_type='llama'"
            )
        theta, layer = self._one("to_repeng_gguf"), self._layer(layer)
        exchange.write_control_vector(path, theta, layer, model_type)

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
        theta = self._one("to_steering_vectors")
        return exchange.as_steering_vector(theta, self._layer(layer))

    @shape_checked
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        completions: "pd.DataFrame | None" = None,
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
        if not len(self):
            raise ValueError("the library holds no vectors; there is nothing to push")
        wanted = {"vector", "scale", "prompt", "completion"}
        if completions is not None and not wanted <= set(completions.columns):
            raise ValueError(
                f"completions: lacks the columns {sorted(wanted - set(completions.columns))}; pass "
                "what tm.generate returns"
            )
        card = exchange.model_card(repo_id, self.story, self.table(), completions)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / exchange.HUB_FILE)
            return exchange.upload(folder, card, repo_id, private, token)

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

    def _one(self, function: str) -> Tensor:
        if len(self) != 1:
            raise ValueError(
                f"{function}: takes exactly one vector, and there are {len(self)}; pick one, as "
                f"found[3].{function}(...)"
            )
        return self.vectors[0]

    def _layer(self, layer: int | None) -> int:
        layer = self.source_layer if layer is None else layer
        if layer is None:
            raise ValueError(
                "layer: not given, and the story does not tell where the vectors belong; pass "
                "layer=, for example layer=8"
            )
        if layer < 0:
            raise ValueError(f"layer={layer}: 0 or more")
        return layer

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


@shape_checked
def concatenate(libraries: Sequence[SteeringVectors]) -> SteeringVectors:
    """Join libraries for the same model and source layer into one, renumbered from 0.

    Numbers that only some of them have are NaN for the others. The stories are kept as `parts`.

    Raises:
        TypeError: something is not a SteeringVectors.
        ValueError: none given, or they differ in model, width or source layer.
    """
    if not libraries:
        raise ValueError("libraries: none given; pass at least one")
    first = libraries[0]
    for fact in ("model", "source_layer"):
        values = {library.story.get(fact) for library in libraries} - {None}
        if len(values) > 1:
            raise ValueError(
                f"libraries differ in {fact}: {sorted(map(str, values))}; only vectors for the "
                "same place in the same model can be one library"
            )
    widths = {library.vectors.shape[1] for library in libraries}
    if len(widths) > 1:
        raise ValueError(f"libraries differ in d_model: {sorted(widths)}")
    names = [name for library in libraries for name in library.columns if name != "index"]
    columns = {
        name: torch.cat(
            [
                lib.columns.get(name, torch.full((len(lib),), torch.nan, dtype=torch.float32))
                for lib in libraries
            ]
        )
        for name in dict.fromkeys(names)
    }
    shared = {
        fact: value
        for fact, value in first.story.items()
        if all(library.story.get(fact) == value for library in libraries)
    }
    # Known in one part only: it still holds for the whole (checked above).
    for fact in ("model", "source_layer"):
        shared[fact] = next(
            (lib.story[fact] for lib in libraries if lib.story.get(fact) is not None), None
        )
    parts = [{**library.story, "n_vectors": len(library)} for library in libraries]
    return SteeringVectors(
        torch.cat([library.vectors for library in libraries]),
        {**shared, "method": "concatenate", "parts": parts, "date": now()},
        columns,
        pad_histories([library.history for library in libraries], [*map(len, libraries)]),
    )


def pad_histories(
    histories: Sequence[Tensor | None], lengths: Sequence[int] | None = None
) -> Float[Tensor, "vector step"] | None:
    """Stack histories of different lengths, with NaN after each one's last step.

    Args:
        histories: each [vector, step]; None where there is none.
        lengths: the number of vectors of each, needed where some are None.
    """
    steps = max((history.shape[1] for history in histories if history is not None), default=0)
    if not steps:
        return None
    counts = lengths or [len(history) for history in histories if history is not None]
    padded = []
    for history, count in zip(histories, counts, strict=True):
        known = torch.empty(count, 0, dtype=torch.float32) if history is None else history
        padded.append(torch.nn.functional.pad(known, (0, steps - known.shape[1]), value=torch.nan))
    return torch.cat(padded)


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


def _json_int(digits: str) -> int:
    if len(digits) > 20:
        raise json.JSONDecodeError("a number of too many digits", digits[:20], 0)
    return int(digits)


def _check_header(path: Path) -> None:
    """Look at what a file says it holds, before memory is taken for it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"{path}: not a safetensors file, or cut short; save it again")
        try:
            header = json.loads(file.read(length), parse_int=_json_int)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a safetensors file, or damaged ({error}); save it again"
            ) from error
    entries = header if isinstance(header, dict) else {}
    if len(entries) > _MOST_TENSORS + 1:
        raise ValueError(f"{path}: {len(entries)} tensors; not a file of ours")
    for name, entry in entries.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if name == "vectors" and (not isinstance(shape, list) or 0 in shape[1:]):
            raise ValueError(f"{path}: holds no float32 matrix of vectors; save it again")


def _check_story(place: str | Path, story: Any, columns: Mapping[str, Tensor], advice: str) -> None:
    """The facts that other parts of the package rely on have the types they should."""
    if not isinstance(story, dict) or not isinstance(story.get("method"), str | None):
        raise ValueError(f"{place}: its story does not say which method made it; {advice}")
    categories = story.get("categories", {})
    if _is_words(categories):
        for name in {*categories} & {*columns}:
            codes = columns[name]
            if len(codes) and not -1 <= codes.min() <= codes.max() < len(categories[name]):
                raise ValueError(f"{place}: the column {name!r} has codes without words; {advice}")
    chosen = story.get("hyperparameters", {})
    sound = {
        "hyperparameters": isinstance(chosen, dict) and _is_slice(chosen.get("positions")),
        "categories": _is_words(story.get("categories", {})),
        "prompts": _is_texts(story.get("prompts", [])),
        "parts": _is_stories(story.get("parts", [])),
        "model": isinstance(story.get("model"), str | None),
        "chat": isinstance(story.get("chat"), bool | None),
        "theta0": isinstance(story.get("theta0"), dict | None),
        "source_layer": _is_layer(story.get("source_layer")),
        "target_layer": _is_layer(story.get("target_layer")),
    }
    wrong = [name for name, is_sound in sound.items() if not is_sound]
    if wrong:
        raise ValueError(f"{place}: {', '.join(wrong)} in its story make no sense; {advice}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_words(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_texts(words) for words in value.values())


def _is_stories(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def _is_layer(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_slice(value: Any) -> bool:
    if value is None:
        return True
    parts = isinstance(value, list) and len(value) == 3
    return parts and all(part is None or type(part) is int for part in value) and value[2] != 0


def _check_finite(vectors: Tensor, name: str) -> None:
    bad = (~torch.isfinite(vectors)).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name}: vectors {bad[:10]} hold values that are not finite")


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: a safetensors file, but not one that tl_melbo saved; read it with "
            "safetensors.torch.load_file and pass the tensor to SteeringVectors.from_tensor"
        )
    if metadata.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {metadata.get('format_version')!r}, but this version of "
            f"tl_melbo reads {_FORMAT_VERSION!r}; upgrade tl_melbo"
        )
    if "story" not in metadata:
        raise ValueError(f"{path}: lacks its story; save it again")
