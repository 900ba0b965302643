"""Writing files so that a reader never sees half of one."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.partial")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; move it over `path` if the block succeeds.

    The old file stays whole until the new one is complete and on disk.

    Raises OSErrors: no such folder, `path` is a folder, or the folder cannot be written to.
    """
    # Through links: the file that they lead to is replaced, not the link.
    path = Path(path).expanduser().resolve()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist; create the folder first")
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # some writers make files private
        _to_disk(temporary)
        temporary.replace(path)
        with suppress(OSError):  # not every system can do this for a folder
            _to_disk(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def clear_partial(folder: Path) -> None:
    """Remove what `replacing` left in a folder, in a process that was killed meanwhile."""
    for path in folder.glob(".*.partial"):
        if _PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable_folder(path: str | Path) -> Path:
    """Create a folder if need be, and make sure now that files can be written in it.

    Raises OSErrors: a file is in the way, or the folder cannot be created or written to.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{folder}: a file is in the way; choose another folder"
        ) from error
    except OSError as error:
        advice = "choose another folder, free some space, or change its permissions"
        raise type(error)(
            error.errno, f"{folder}: cannot be written to ({error.strerror}); {advice}"
        ) from error
    return folder
