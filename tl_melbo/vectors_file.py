"""The file of a library: safetensors, with its metadata in the header. Nothing in it is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_melbo.errors import Damaged
from tl_melbo.files import replacing
from tl_melbo.memory import is_out_of_memory

_FORMAT, _FORMAT_VERSION = "tl_melbo.vectors", "1"
_COLUMN = "column."
_COLUMN_TYPES = (torch.float32, torch.float64, torch.int64)
# A story is text: a header of this size is damage or an attack, not a long prompt.
_MAX_HEADER_BYTES = 2 * 2**20
# So is a file of more tensors than anybody has columns.
_MOST_TENSORS = 256
_MOST_DIGITS = 20


class Parts(NamedTuple):
    """What a library is made of."""

    vectors: Tensor
    story: Mapping[str, Any]
    columns: Mapping[str, Tensor]
    history: Tensor | None


def write(path: str | Path, parts: Parts) -> None:
    """Write a file, whole or not at all.

    Raises:
        ValueError: the story holds what `read` would refuse, or too much.
        OSError: as `files.replacing`; the disk is full, say.
    """
    _check_story("story", dict(parts.story), parts.columns, "correct it", ValueError)
    tensors = {"vectors": parts.vectors}
    tensors |= {_COLUMN + name: column for name, column in parts.columns.items()}
    if parts.history is not None:
        tensors["history"] = parts.history
    story = json.dumps(dict(parts.story), allow_nan=False)
    if len(story) > _MAX_HEADER_BYTES // 2 or len(tensors) > _MOST_TENSORS:
        raise ValueError(
            f"story: {len(story):,} characters and {len(tensors)} tensors, more than can be saved "
            f"({_MAX_HEADER_BYTES // 2:,} and {_MOST_TENSORS}); shorten its prompts"
        )
    metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "story": story}
    with replacing(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(
                f"{path}: cannot be written ({error}); what was there before is intact"
            ) from error


def read(path: str | Path) -> Parts:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        Damaged: it is not a safetensors file, is cut or damaged, is not one of ours, or lacks its
            story.
        MemoryError: it does not fit.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the vector file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            story = _story(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(
            f"{path}: not a safetensors file, or damaged ({error}); save it again", path
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = path.stat().st_size // 2**20
        raise MemoryError(f"{path}: its {size:,} MiB do not fit into memory") from error
    columns = {k.removeprefix(_COLUMN): v for k, v in tensors.items() if k.startswith(_COLUMN)}
    history = tensors.get("history")
    _check_story(path, story, columns, "save it again", Damaged)
    _check_tensors(path, tensors.get("vectors"), columns, history)
    return Parts(tensors["vectors"], story, columns, history)


def _check_header(path: Path) -> None:
    """Look at what a file says it holds, before memory is taken for it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise Damaged(f"{path}: not a safetensors file, or cut short; save it again", path)
        header = json.loads(file.read(length), parse_int=_json_int)
    entries = header if isinstance(header, dict) else {}
    if len(entries) > _MOST_TENSORS + 1:
        raise Damaged(f"{path}: {len(entries)} tensors; not a file of ours", path)
    entry = entries.get("vectors")
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if "vectors" in entries and (not isinstance(shape, list) or 0 in shape[1:]):
        raise Damaged(f"{path}: holds no float32 matrix of vectors; save it again", path)


def _story(path: Path, metadata: Mapping[str, str]) -> Any:
    version = metadata.get("format_version")
    if metadata.get("format") != _FORMAT:
        raise Damaged(
            f"{path}: a safetensors file, but not one that tl_melbo saved; read it with "
            "safetensors.torch.load_file and pass the tensor to SteeringVectors.from_tensor",
            path,
        )
    if version != _FORMAT_VERSION:
        raise Damaged(
            f"{path}: format version {version!r}, but this version of tl_melbo reads "
            f"{_FORMAT_VERSION!r}; upgrade tl_melbo",
            path,
        )
    if "story" not in metadata:
        raise Damaged(f"{path}: lacks its story; save it again", path)
    return json.loads(metadata["story"], parse_int=_json_int)


def _json_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise json.JSONDecodeError("a number of too many digits", digits[:_MOST_DIGITS], 0)
    return int(digits)


def _check_tensors(
    path: Path, vectors: Tensor | None, columns: Mapping[str, Tensor], history: Tensor | None
) -> None:
    if vectors is None or vectors.ndim != 2 or vectors.dtype != torch.float32:
        raise Damaged(f"{path}: holds no float32 matrix of vectors; save it again", path)
    for name, column in [("history", history), *columns.items()]:
        if name == "norm" or (column is not None and column.dtype not in _COLUMN_TYPES):
            raise Damaged(f"{path}: the column {name!r} is not one that we write", path)
    index = columns.get("index", torch.empty(0, dtype=torch.int64))
    if index.dtype != torch.int64 or index.ndim != 1 or (index < 0).any():
        raise Damaged(f"{path}: the column 'index' does not hold numbers of vectors", path)


def _of(kind: type | tuple[type, ...]) -> Any:
    return lambda value: value is None or type(value) in (kind if type(kind) is tuple else (kind,))


def _list_of(kind: type) -> Any:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_layer(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_words(value: Any) -> bool:
    return isinstance(value, dict) and all(_list_of(str)(words) for words in value.values())


def _is_slice(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == 3
        and all(_of(int)(part) for part in value)
        and value[2] != 0
    )


# The facts that other parts of the package rely on, and what each may be.
_FACTS: Mapping[str, tuple[Any, Any]] = {
    "hyperparameters": ({}, lambda v: isinstance(v, dict) and _is_slice(v.get("positions"))),
    "categories": ({}, _is_words),
    "prompts": ([], _list_of(str)),
    "parts": ([], _list_of(dict)),
    "lost": ([], _list_of(int)),
    "arithmetic": (None, _of(dict)),
    "model": (None, _of(str)),
    "about": (None, _of(str)),
    "chat": (None, _of(bool)),
    "theta0": (None, _of(dict)),
    "measure": (None, lambda v: v is None or (isinstance(v, dict) and "column" in v)),
    "source_layer": (None, _is_layer),
    "target_layer": (None, _is_layer),
}


def _check_story(
    place: str | Path,
    story: Any,
    columns: Mapping[str, Tensor],
    advice: str,
    kind: type[ValueError],
) -> None:
    if not isinstance(story, dict) or not isinstance(story.get("method"), str | None):
        raise kind(f"{place}: its story does not say which method made it; {advice}")
    wrong = [
        name for name, (default, sound) in _FACTS.items() if not sound(story.get(name, default))
    ]
    if wrong:
        raise kind(f"{place}: {', '.join(wrong)} in its story make no sense; {advice}")
    categories = story.get("categories", {})
    for name in {*categories} & {*columns}:
        codes = columns[name]
        if len(codes) and not -1 <= codes.min() <= codes.max() < len(categories[name]):
            raise kind(f"{place}: the column {name!r} has codes without words; {advice}")
