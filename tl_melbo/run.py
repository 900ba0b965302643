"""A folder that keeps what a search finds, vector by vector, whatever happens to the search."""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from tl_melbo.discovery import melbo, melbo_ortho
from tl_melbo.discovery._protocol import EffectMap
from tl_melbo.discovery._search import Method, join
from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.files import clear_partial, writable_folder
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

VECTORS, REFERENCE, LOCK = "vectors.safetensors", "theta0.safetensors", ".lock"

# What `Run.keep` itself passes to a method.
_OWN = ("f", "n_vectors", "previous", "progress", "overwrite", "on_vector")

OnVector = Callable[[int, int | None], None]


class Run:
    """Searches whose every vector is on disk before the next one begins.

        run = tm.Run("runs/me")
        found = run.melbo(f, n_vectors=32, radius=12.0)
        family = run.melbo_ortho(f, found[4], n_vectors=100)

    The same call again, in another process too, goes on where the last one ended, however it ended,
    and finds what it would have found without a break. A call with other settings is refused, and
    told what differs. One process at a time writes in a folder.

    Args:
        folder: where the files go; made if need be. `vectors.safetensors` is the library,
            `ortho-K/vectors.safetensors` the family of its vector K.
    """

    @shape_checked
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._lock = FileLock(self.folder / LOCK, blocking=False)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @shape_checked
    def keep(
        self,
        method: Method,
        f: EffectMap,
        n_vectors: int | None = 32,
        *,
        progress: bool = False,
        overwrite: bool = False,
        on_vector: OnVector | None = None,
        **settings: Any,
    ) -> SteeringVectors:
        """Find the vectors of any method, or those of them that are not there yet.

            run.keep(tm.jacobian, f, 32, radius=12.0)

        Args:
            method: `tm.melbo`, `tm.melbo_ortho`, or another that takes `previous`.
            f: the activation map.
            n_vectors: how many in all; None where the method itself knows the end.
            progress: show a progress bar.
            overwrite: begin anew; vectors that are there go when the first new one is found.
            on_vector: called with how many vectors are there, and how many there shall be: before
                the search, and whenever some more are on disk.
            settings: the other arguments of the method. With `theta0`, one vector of a library, the
                vectors lie in `ortho-` and its number, with theta0 beside them.

        Returns:
            Vectors 0 to n_vectors - 1, or fewer where the method ends before.

        Raises:
            DifferentSearch: the folder holds vectors that were found in another way.
            ValueError: not one vector is found; or as the method does.
            BlockingIOError: another process is writing in the folder.
            OSError: the disk is full, or forbids it. What was there before is intact.
        """
        check_names("Run.keep", settings, method, _OWN)
        theta0 = settings.get("theta0")
        reference = theta0 if isinstance(theta0, SteeringVectors) and len(theta0) == 1 else None
        with self.writing():
            number = None if reference is None else int(reference.columns["index"][0])
            place = self.folder if number is None else family_folder(self.folder, number)
            path = place / VECTORS
            previous = None if overwrite else _kept_before(path)
            if previous is not None and reference is not None:
                check_reference(place, reference)
            known = 0 if previous is None else int(previous.columns["index"].max()) + 1
            missing = n_vectors
            if n_vectors is not None and previous is not None:
                missing = max(0, n_vectors - known)
            try:
                search = method.parts(f, n_vectors=missing, previous=previous, **settings)
            except DifferentSearch as error:
                if not error.reason:  # of other vectors than those in the folder
                    raise
                raise DifferentSearch(
                    f"{place}: holds vectors of another search, {error.reason}; ask for the same "
                    "to continue it, pass overwrite=True to begin anew, or choose another folder",
                    error.differences,
                    error.reason,
                ) from None
            with _beginning(place, reference if previous is None else None) as begin:
                found = _kept(path, previous, search, begin, n_vectors, progress, on_vector)
        if found is None:
            raise ValueError(search.nothing)
        inside = found.columns["index"] < (sys.maxsize if n_vectors is None else n_vectors)
        return found if inside.all() else found[: int(inside.sum())]

    @shape_checked
    def melbo(
        self,
        f: EffectMap,
        n_vectors: int = 32,
        *,
        progress: bool = False,
        overwrite: bool = False,
        on_vector: OnVector | None = None,
        **settings: Any,
    ) -> SteeringVectors:
        """Find the vectors of `tm.melbo`, or those of them that are not there yet: see `keep`."""
        check_names("Run.melbo", settings, melbo, _OWN)
        options = {"progress": progress, "overwrite": overwrite, "on_vector": on_vector}
        return self.keep(melbo, f, n_vectors, **options, **settings)

    @shape_checked
    def melbo_ortho(
        self,
        f: EffectMap,
        theta0: SteeringVectors,
        n_vectors: int | None = 100,
        *,
        progress: bool = False,
        overwrite: bool = False,
        on_vector: OnVector | None = None,
        **settings: Any,
    ) -> SteeringVectors:
        """Find the family of `tm.melbo_ortho`, or what of it is not there yet: see `keep`.

        It lies in `ortho-` and the number of theta0, one vector of a library.
        """
        if len(theta0) != 1:
            raise ValueError(f"theta0: {len(theta0)} vectors, expected exactly one, as found[5]")
        if n_vectors is not None and n_vectors < 1:
            raise ValueError(f"n_vectors={n_vectors}: at least 1, or None for all there are")
        check_names("Run.melbo_ortho", settings, melbo_ortho, _OWN)
        options = {"progress": progress, "overwrite": overwrite, "on_vector": on_vector}
        return self.keep(melbo_ortho, f, n_vectors, theta0=theta0, **options, **settings)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Keep the folder for this process alone; the lock goes with the process, however it ends.

        A folder that was made for it, and in which nothing came to lie, is gone again at the end.

        Raises:
            BlockingIOError: another process has it.
            NotADirectoryError, PermissionError: it cannot be made, or written to.
        """
        existed = self.folder.exists()
        folder = writable_folder(self.folder)
        try:
            self._lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"{folder}: another process is writing here; wait for it to end, or choose another "
                "folder"
            ) from None
        try:
            for place in (folder, *folder.glob(family_folder(Path(), "*").name)):
                clear_partial(place)
            yield folder
        finally:
            unused = not existed and {item.name for item in folder.iterdir()} <= {LOCK}
            if unused:
                (folder / LOCK).unlink(missing_ok=True)
            self._lock.release()
            if unused:
                with suppress(OSError):  # another process has just begun here
                    folder.rmdir()


def family_folder(folder: Path, vector: int | str) -> Path:
    """Where the family of one vector of a run lies."""
    return folder / f"ortho-{vector}"


def same_vector(one: SteeringVectors, other: SteeringVectors) -> bool:
    """Whether two libraries hold the same numbers."""
    return torch.equal(one.vectors, other.vectors)


def check_reference(place: Path, theta0: SteeringVectors) -> None:
    """Make sure that a family's folder is that of this vector.

    Raises:
        FileNotFoundError: it does not say which vector its family grew from.
        ValueError: it is another one.
    """
    path = place / REFERENCE
    if not path.is_file():
        raise FileNotFoundError(
            f"{place}: holds a family, but not {REFERENCE}, the vector that it grew from; pass "
            "overwrite=True to begin anew"
        )
    if not same_vector(SteeringVectors.load(path), theta0):
        raise ValueError(
            f"{place}: holds the family of another vector of that number; pass overwrite=True to "
            "begin anew, or choose another folder"
        )


def check_names(
    name: str, settings: Mapping[str, Any], search: Callable[..., Any], given: Sequence[str] = ()
) -> None:
    """Refuse settings that the search does not have, in the name of the function called."""
    allowed = [each for each in inspect.signature(search).parameters if each not in given]
    for setting in settings:
        if setting not in allowed:
            near = difflib.get_close_matches(setting, allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
            raise TypeError(f"{name}(): got an unexpected argument {setting!r}; {hint}")


def _kept_before(path: Path) -> SteeringVectors | None:
    """The vectors of an earlier call."""
    if not path.is_file():
        return None
    try:
        found = SteeringVectors.load(path)
    except Damaged as error:
        raise Damaged(
            f"{error}; or pass overwrite=True to replace it, or choose another folder", path
        ) from error
    return found if len(found) else None


@contextmanager
def _beginning(place: Path, reference: SteeringVectors | None) -> Iterator[Callable[[], None]]:
    """What to do before the first vector is kept; if none came, what was made for it goes."""
    path, beside = place / VECTORS, place / REFERENCE
    if reference is not None:
        writable_folder(place)

    def begin() -> None:
        if reference is not None:
            path.unlink(missing_ok=True)  # of another family
            reference.save(beside)

    try:
        yield begin
    finally:
        if reference is not None and not path.is_file():
            beside.unlink(missing_ok=True)
            with suppress(OSError):  # holds something: leave it
                place.rmdir()


def _kept(
    path: Path,
    previous: SteeringVectors | None,
    search: Iterator[SteeringVectors],
    begin: Callable[[], None],
    total: int | None,
    progress: bool,
    on_vector: OnVector | None,
) -> SteeringVectors | None:
    """Run a search, each part on disk before the next one begins."""
    found = previous
    known = 0 if found is None else len(found)
    with tqdm(
        total=total, initial=known, desc=path.parent.name, unit="vector", disable=not progress
    ) as bar:
        if on_vector is not None:
            on_vector(known, total)
        for number, part in enumerate(search):
            if number == 0:
                begin()
            found = part if found is None else join([found, part])
            found.save(path)
            bar.update(len(part))
            if on_vector is not None:
                on_vector(len(found), total)
    return found
