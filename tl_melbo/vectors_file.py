"""The files of what was found: safetensors, with metadata in the header. Nothing in them is run."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from beartype.door import is_bearable
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_melbo.additions import Place
from tl_melbo.errors import Damaged
from tl_melbo.files import replacing

_FORMAT_VERSION = "1"
_COLUMN = "column."
_COLUMN_TYPES = (torch.float32, torch.float64, torch.int64)
# A header larger than this is damage or an attack, not a long prompt; so are more tensors.
_LARGEST_HEADER = 2 * 2**20
_MOST_TENSORS = 256


class Kind(NamedTuple):
    """A kind of file: its format, the class that reads it, and the class's tensors by their axes.

    All other tensors are columns, or the history. Messages say what it and its rows are `called`.
    """

    format: str
    reader: str
    axes: Mapping[str, int]
    called: str = ""
    rows: str = "rows"


VECTORS = Kind("tl_melbo.vectors", "SteeringVectors", {"vectors": 2}, "library", "vectors")
LAYERED = Kind("tl_melbo.layered_vectors", "LayeredVectors", {"vectors": 3})
ADAPTER = Kind("tl_melbo.adapter", "Adapter", {"A": 4, "B": 4})
GATED = Kind("tl_melbo.gated_factors", "GatedFactors", {"A": 3, "B": 3})
_READERS = {kind.format: kind.reader for kind in (VECTORS, LAYERED, ADAPTER, GATED)}


def write(
    path: str | Path,
    story: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: Kind = VECTORS,
) -> None:
    """Write a file, whole or not at all; a ValueError where `read` would refuse it."""
    metadata = {"format": kind.format, "format_version": _FORMAT_VERSION}
    metadata["story"] = json.dumps(story)
    # safetensors sorts them.
    metadata["order"] = json.dumps([*tensors])
    own = {*kind.axes, "history"}
    named = {n if n in own else _COLUMN + n: each.contiguous() for n, each in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(named, temporary, metadata)
        except SafetensorError as error:
            raise OSError(
                f"{path}: cannot be written ({error}); what was there before is intact"
            ) from error
        read(temporary, kind)


def read(path: str | Path, kind: Kind = VECTORS) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The story and the tensors of a file; call it within `damage_told`."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the vector file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > _LARGEST_HEADER:
            raise ValueError("not a safetensors file, or one whose prompts are too long")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        story = _story(metadata, kind)
        names = list(file.keys())
        if len(names) > _MOST_TENSORS:
            raise ValueError(f"{len(names)} tensors, and at most {_MOST_TENSORS} can be kept")
        tensors = {name.removeprefix(_COLUMN): file.get_tensor(name) for name in names}
    # As they were written; version 0.1 did not tell.
    order: list[str] = json.loads(metadata.get("order", "[]"))
    if not _all_are(str)(order):
        raise ValueError("the order of its columns makes no sense")
    tensors = {n: tensors[n] for n in [*filter(tensors.__contains__, order), *tensors]}
    for name, tensor in tensors.items():
        if name == "norm" or tensor.dtype not in _COLUMN_TYPES:
            raise ValueError(f"the column {name!r} is not one that tl_melbo saves")
    for name, axes in kind.axes.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.float32 or tensor.ndim != axes:
            what = "matrix of vectors" if kind is VECTORS else f"{name!r} with {axes} axes"
            raise ValueError(f"holds no float32 {what}")
    index = tensors.get("index", torch.arange(0))
    if index.dtype != torch.int64 or index.ndim != 1 or (index < 0).any():
        raise ValueError("the column 'index' does not hold numbers of vectors")
    _check_story(story, tensors)
    return story, tensors


@contextmanager
def damage_told(path: str | Path) -> Iterator[None]:
    """What is wrong with a file that is read within is Damaged, which names the file."""
    try:
        yield
    except (SafetensorError, RecursionError, json.JSONDecodeError) as error:
        raise Damaged(
            f"{path}: not a safetensors file, or damaged ({error}); save it again", Path(path)
        ) from error
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path}: {error}; save it again", Path(path)) from error


def _story(metadata: Mapping[str, str], kind: Kind) -> Any:
    if metadata.get("format") != kind.format:
        if reader := _READERS.get(metadata.get("format", "")):
            raise ValueError(f"read it with {reader}.load, not with {kind.reader}.load")
        raise ValueError(
            "a safetensors file, but not one that tl_melbo saved; read it with "
            f"safetensors.torch.load_file and pass its tensors to {kind.reader}.from_tensor"
        )
    version = metadata.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"format version {version!r}, but this version of tl_melbo reads {_FORMAT_VERSION!r}; "
            "upgrade tl_melbo"
        )
    if "story" not in metadata:
        raise ValueError("lacks its story")
    return json.loads(metadata["story"])


Test = Callable[[Any], bool]


def _is(kind: Any, also: Test = bool) -> Test:
    """Whether a value is of a kind, and passes another test where it is neither empty nor None."""
    return lambda value: is_bearable(value, kind) and (not value or also(value))


def _all_are(kind: Any, also: Test = bool) -> Test:
    """Whether a value is a list of such values; beartype alone looks at one of them."""
    of_one = _is(kind, also)
    return lambda value: isinstance(value, list) and all(map(of_one, value))


def _has_sound_positions(hyperparameters: dict[str, Any]) -> bool:
    parts = hyperparameters.get("positions")
    return parts is None or (_is_slice(parts) and len(parts) == 3 and parts[2] != 0)


_is_slice, _are_lists, _LAYER = _all_are(int | None), _all_are(list), _is(int | None, (0).__le__)
_MEASURE = {"column", "label", "unit", "counts", "first"}
# The facts that other parts of the package rely on, and what each may be.
_FACTS: Mapping[str, Test] = {
    "method": _is(str | None),
    "hyperparameters": _is(dict, _has_sound_positions),
    "categories": _is(dict, lambda words: _are_lists([*words.values()])),
    "prompts": _all_are(str),
    "parts": _all_are(dict),
    "lost": _all_are(int),
    "arithmetic": _is(dict | None),
    "model": _is(str | None),
    "about": _is(str | None),
    "chat": _is(bool | None),
    "theta0": _is(dict | None),
    "measure": lambda it: it is None or (isinstance(it, dict) and it.keys() >= _MEASURE),
    "place": _is(Place | None),
    "layers": _all_are(int, (0).__le__),
    "source_layer": _LAYER,
    "target_layer": _LAYER,
}


def _check_story(story: Any, columns: Mapping[str, Tensor]) -> None:
    if not isinstance(story, dict):
        raise ValueError("story: not a mapping of facts; correct it")
    wrong = [n for n, is_sound in _FACTS.items() if n in story and not is_sound(story[n])]
    if wrong:
        raise ValueError(f"story: its {', '.join(wrong)} make no sense; correct it")
    for name, words in story.get("categories", {}).items():
        codes = columns.get(name, torch.arange(0))
        if len(codes) and not -1 <= codes.min() <= codes.max() < len(words):
            raise ValueError(f"story: the column {name!r} has codes without words; correct it")
