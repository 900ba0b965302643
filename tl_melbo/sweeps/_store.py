"""Where a sweep is kept: a folder, or a place that fsspec knows, such as s3://bucket/sweep."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from tl_melbo import checks
from tl_melbo.files import replacing
from tl_melbo.run._files import LOCK, locked

RECORD = "cell.json"
_PARTIAL, ASIDE = ".partial", ".damaged"


class Store:
    """Files by name, each replaced whole or not at all.

    Of a remote place, a cell is worked on in a temporary folder here: what is there is fetched
    first, and what is new is sent whenever `send` is called.
    """

    def __init__(self, out: str | Path) -> None:
        self.out, self._fs, self._root = str(out), None, ""
        if "://" in self.out:
            fsspec = checks.installed("fsspec", f"out={self.out}", "sweep")
            try:
                self._fs, self._root = fsspec.core.url_to_fs(self.out)
            except (ValueError, ImportError) as error:
                raise ValueError(
                    f"out={self.out!r}: {error}; pass a folder, or an fsspec URL whose file system "
                    "is installed, such as s3fs for s3://"
                ) from None
            if {*"*?["} & {*self._root}:  # fsspec moves what fits the pattern, which is nothing
                raise ValueError(f"out={self.out!r}: holds *, ? or [; choose a name without them")
        else:
            self.out = str(Path(self.out).expanduser().resolve())

    def writing(self) -> Any:
        """Keep a folder for this process; a remote place cannot be locked."""
        if self._fs is not None:
            return nullcontext()
        folder = Path(self.out)
        return locked(folder, FileLock(folder / LOCK, blocking=False))

    def write(self, name: str, data: bytes) -> None:
        """Keep this under a name."""
        if self._fs is None:
            path = Path(self.out) / name
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            return
        target = f"{self._root}/{name}"
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(target + _PARTIAL, data)
        self._fs.mv(target + _PARTIAL, target)

    def read(self, name: str) -> bytes | None:
        """What is kept under a name; None where nothing is."""
        try:
            if self._fs is None:
                return (Path(self.out) / name).read_bytes()
            return self._fs.cat_file(f"{self._root}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def set_aside(self, name: str) -> None:
        """Move what is kept under a name, if anything, to a free one that says so."""
        aside = name + ASIDE
        while self.read(aside) is not None:
            aside += ASIDE
        with suppress(FileNotFoundError):
            if self._fs is None:
                (Path(self.out) / name).rename(Path(self.out) / aside)
            else:
                self._fs.mv(f"{self._root}/{name}", f"{self._root}/{aside}")

    def keep(self, folder: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep what is known of a cell's search, which has failed if that cannot be kept.

        That it failed is not kept over what is known of another search of that name.
        """
        try:
            known = self.record(folder) or record
            if record["status"] == "failed" and known.get("cell") != record.get("cell"):
                return record
            text = json.dumps({**record, "sha256": _digest(record)}, indent=1, allow_nan=False)
            self.write(f"{folder}/{RECORD}", text.encode())
        except Exception as error:  # the place itself, or a disk that is full
            return {**record, **failed(error)} if record["status"] == "done" else record
        return record

    def record(self, folder: str) -> dict[str, Any] | None:
        """What is known of a cell's search; None where nothing is, or not what was kept.

        A file that somebody changed may hold anything, and must not end a sweep.
        """
        data = self.read(f"{folder}/{RECORD}") or b""
        try:
            record = json.loads(data)
            return record if record.pop("sha256") == _digest(record) else None
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return None

    @contextmanager
    def folder(
        self, name: str, only: str | None = None
    ) -> Iterator[tuple[Path, Callable[[], None]]]:
        """A folder to work in, and what sends its new files to where they are kept.

        Of a remote place, it has all files that are there, or one `only`.
        """
        if self._fs is None:
            yield Path(self.out) / name, lambda: None
            return
        with tempfile.TemporaryDirectory(prefix="tl-melbo-") as temporary:
            place, there = Path(temporary), f"{self._root}/{name}"
            if self._fs.isdir(there):
                for path in self._fs.ls(there, detail=False):
                    file = str(path).rpartition("/")[2]
                    if only in (None, file) and not file.endswith(_PARTIAL):
                        self._fs.get_file(path, str(place / file))
            known = _times(place)

            def send() -> None:
                for path, time in _times(place).items():
                    if known.get(path) != time:
                        self.write(f"{name}/{path.name}", path.read_bytes())
                        known[path] = time

            yield place, send


def failed(error: BaseException) -> dict[str, Any]:
    """What a record says of a search that failed."""
    told = " ".join(str(error).split()) or "no message"
    return {"status": "failed", "error": f"{type(error).__name__}: {told}"}


def _digest(record: dict[str, Any]) -> str:
    """Of a record as JSON, in the order of its names, which a file keeps."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _times(folder: Path) -> dict[Path, int]:
    """When each file was written last."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return {path: path.stat().st_mtime_ns for path in files}
