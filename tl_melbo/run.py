"""A folder that keeps what a search finds, vector by vector, whatever happens to the search."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from tl_melbo.discovery import iter_melbo, iter_melbo_ortho, join_family, join_library
from tl_melbo.discovery._protocol import EffectMap
from tl_melbo.files import clear_partial, writable_folder
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

VECTORS, REFERENCE, LOCK = "vectors.safetensors", "theta0.safetensors", ".lock"

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
        """Find the vectors of `melbo`, or those of them that are not there yet.

        Args:
            f: the activation map.
            n_vectors: how many in all.
            progress: show a progress bar.
            overwrite: begin anew; vectors that are there go when the first new one is found.
            on_vector: called with how many vectors are there, and how many there shall be: before
                the search, and whenever some more are on disk.
            settings: the other arguments of `melbo`.

        Returns:
            Vectors 0 to n_vectors - 1.

        Raises:
            ValueError: the folder holds vectors that were found in another way; or as `melbo` does.
            BlockingIOError: another process is writing in the folder.
            OSError: the disk is full, or forbids it. What was there before is intact.
        """
        check_names("Run.melbo", settings, iter_melbo)
        with self.writing():
            path = self.folder / VECTORS
            previous = None if overwrite else _kept_before(path)
            known = 0 if previous is None else int(previous.columns["index"].max()) + 1
            missing = max(0, n_vectors - known) if previous is not None else n_vectors
            search = _explained(
                self.folder, lambda: iter_melbo(f, missing, previous=previous, **settings)
            )
            found = _kept(path, previous, search, join_library, n_vectors, progress, on_vector)
        if found is None:
            raise ValueError(f"n_vectors={n_vectors}: at least 1")
        inside = found.columns["index"] < n_vectors
        return found if inside.all() else found[: int(inside.sum())]

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
        """Find the family of `melbo_ortho`, or those of its vectors that are not there yet.

        Args:
            f: the activation map.
            theta0: one vector; its family lies in `ortho-` and its number.
            n_vectors: how many in all; None goes on until the family ends.
            progress: show a progress bar.
            overwrite: as in `melbo`.
            on_vector: as in `melbo`.
            settings: the other arguments of `melbo_ortho`.

        Returns:
            Vectors 0 to n_vectors - 1, or fewer where the family ends before.

        Raises:
            ValueError: the folder holds a family of another vector, or found in another way; not
                one vector qualifies; or as `melbo_ortho` does.
            BlockingIOError, OSError: as `melbo`.
        """
        if len(theta0) != 1:
            raise ValueError(f"theta0: {len(theta0)} vectors, expected exactly one, as found[5]")
        if n_vectors is not None and n_vectors < 1:
            raise ValueError(f"n_vectors={n_vectors}: at least 1, or None for all there are")
        check_names("Run.melbo_ortho", settings, iter_melbo_ortho)
        with self.writing():
            place = family_folder(self.folder, int(theta0.columns["index"][0]))
            path, reference = place / VECTORS, place / REFERENCE
            previous = None if overwrite else _kept_before(path)
            if previous is not None:
                check_reference(place, theta0)
            known = 0 if previous is None else len(previous)
            room = int(f.x.shape[-1]) - 1 - known
            missing = n_vectors - known if n_vectors is not None else None if room else 0
            # Where all are there, the search for the last of them: it is checked, and not run.
            all_there = previous is not None and missing is not None and missing < 1
            search = _explained(
                place,
                lambda: iter_melbo_ortho(
                    f,
                    theta0,
                    1 if all_there else missing,
                    previous=previous[:-1] if previous is not None and all_there else previous,
                    **settings,
                ),
            )
            if previous is None:
                writable_folder(place)
                search = _beginning(search, path, theta0, reference)
            if all_there:
                search = iter(())
            try:
                family = _kept(path, previous, search, join_family, n_vectors, progress, on_vector)
            finally:
                if not path.is_file():
                    reference.unlink(missing_ok=True)
                    with suppress(OSError):  # holds something: leave it
                        place.rmdir()
        if family is None:
            raise ValueError(
                "theta0: nothing orthogonal to it of norm 0.1 or more does what it does, or the "
                "norm penalty or the number of steps forbids it"
            )
        return family if n_vectors is None else family[:n_vectors]

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


def check_names(name: str, settings: dict[str, Any], search: Callable[..., Any]) -> None:
    """Refuse settings that the search does not have, in the name of the function called."""
    allowed = [each for each in inspect.signature(search).parameters if each != "previous"]
    for given in settings:
        if given not in allowed:
            near = difflib.get_close_matches(given, allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
            raise TypeError(f"{name}(): got an unexpected argument {given!r}; {hint}")


def _explained(
    folder: Path, search: Callable[[], Iterator[SteeringVectors]]
) -> Iterator[SteeringVectors]:
    """The search, or an error that says where the vectors lie that it does not continue."""
    try:
        return search()
    except ValueError as error:
        if not str(error).startswith("previous:"):
            raise
        what = str(error).removeprefix("previous: ").rpartition("; ")[0]
        raise ValueError(
            f"{folder}: holds vectors of another search, {what}; ask for the same to continue it, "
            "pass overwrite=True to begin anew, or choose another folder"
        ) from None


def _kept_before(path: Path) -> SteeringVectors | None:
    """The vectors of an earlier call."""
    if not path.is_file():
        return None
    try:
        found = SteeringVectors.load(path)
    except ValueError as error:
        raise ValueError(
            f"{str(error).removesuffix('; save it again')}; pass overwrite=True to replace it, or "
            "choose another folder"
        ) from error
    return found if len(found) else None


def _beginning(
    search: Iterator[SteeringVectors], path: Path, theta0: SteeringVectors, reference: Path
) -> Iterator[SteeringVectors]:
    """The same; with its first vector what another family left goes, and theta0 is kept."""
    for number, part in enumerate(search):
        if number == 0:
            path.unlink(missing_ok=True)
            theta0.save(reference)
        yield part


def _kept(
    path: Path,
    previous: SteeringVectors | None,
    search: Iterator[SteeringVectors],
    join: Callable[[Sequence[SteeringVectors]], SteeringVectors],
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
        for part in search:
            found = part if found is None else join([found, part])
            found.save(path)
            bar.update(len(part))
            if on_vector is not None:
                on_vector(len(found), total)
    return found
