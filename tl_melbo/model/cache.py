"""Models that were GGUF files, kept as safetensors in the user's cache folder: a faster start.

An entry is a folder. Its manifest is written last, and names its files with their digests.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock
from platformdirs import user_cache_dir

from tl_melbo.files import replacing

# Part of an entry's name: raise it when what is in an entry changes.
_FORMAT = 1
_MANIFEST = "manifest.json"
# What reading a JSON file of another shape may raise.
_STRANGE = (OSError, ValueError, TypeError, KeyError, AttributeError)


def cache_folder() -> Path:
    """Where converted models are kept: `TL_MELBO_CACHE`, or a folder of the user's cache."""
    chosen = os.environ.get("TL_MELBO_CACHE") or user_cache_dir("tl_melbo", appauthor=False)
    return Path(chosen).expanduser().absolute()


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights are kept: the dequantiser gives no more than float32."""
    return torch.float32 if dtype == torch.float64 else dtype


def source_digest(path: Path) -> str:
    """The sha256 of a file; remembered, so that a file that has not changed is read once."""
    path = path.resolve()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    note, stamp = cache_folder() / "sources" / f"{name}.json", _stamp(path)
    with suppress(*_STRANGE):
        known = json.loads(note.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    digest = _sha256(path)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as temporary:
            temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}))
    return digest


def converted(source: Path, dtype: torch.dtype, convert: Callable[[Path], None]) -> Path:
    """The folder of the converted source; made by `convert(folder)` if it is not there yet.

    Two processes that ask at once wait for each other. An OSError or a NotImplementedError means
    no space, no permission or, on some network disks, no locks.
    """
    kind = str(stored_dtype(dtype)).removeprefix("torch.")
    key = f"{source_digest(source)}-{kind}-v{_FORMAT}-transformers-{version('transformers')}"
    root = cache_folder()
    entry = root / key
    if is_whole(entry):
        return entry
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        # What is there belongs to processes that were killed: nobody else holds the lock.
        for left in root.glob(f".{key}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        if not is_whole(entry):
            _make(entry, convert)
    return entry


def is_whole(entry: Path) -> bool:
    """Whether an entry holds exactly the files of its manifest, unchanged since it was written."""
    with suppress(*_STRANGE):
        files = json.loads((entry / _MANIFEST).read_text())["files"]
        there = {path.name for path in entry.iterdir()} - {_MANIFEST}
        return there == set(files) and all(_is_same(entry / name, *files[name]) for name in files)
    return False


def discard(entry: Path) -> None:
    """Remove an entry, at once for everybody else."""
    aside = _aside(entry)
    with suppress(OSError):
        entry.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _make(entry: Path, convert: Callable[[Path], None]) -> None:
    folder = _aside(entry)
    folder.mkdir()
    try:
        convert(folder)
        files = {}
        for path in sorted(folder.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.name] = [_stamp(path), _sha256(path)]
        with replacing(folder / _MANIFEST) as temporary:
            temporary.write_text(json.dumps({"files": files}, indent=1))
        discard(entry)
        folder.rename(entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _aside(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.{uuid4().hex}.partial")


def _is_same(path: Path, stamp: list[int], digest: str) -> bool:
    """By size and times, as in the manifest; by digest where only the times differ."""
    now = _stamp(path)
    same = now == stamp or (now[0] == stamp[0] and _sha256(path) == digest)
    return same and not path.is_symlink()


def _stamp(path: Path) -> list[int]:
    """Size and times; the inode's time cannot be set at will."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
