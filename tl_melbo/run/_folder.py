"""The vectors of a folder: what is there, whether a search continues it, keeping what comes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from tl_melbo.discovery._search import Search, join
from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.files import clear_partial, writable_folder
from tl_melbo.story import Difference, differences
from tl_melbo.vectors import SteeringVectors

VECTORS, REFERENCE, LOCK = "vectors.safetensors", "theta0.safetensors", ".lock"
COMPLETIONS, REPORT = "completions.csv", "report.html"

OnVector = Callable[[int, int | None], None]


@contextmanager
def locked(place: Path, lock: FileLock) -> Iterator[Path]:
    """As `Run.writing`."""
    existed = place.exists()
    folder = writable_folder(place)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder}: another process is writing here; wait for it to end, or choose another "
            "folder"
        ) from None
    try:
        for each in (folder, *folder.glob(family_folder(Path(), "*").name)):
            clear_partial(each)
        yield folder
    finally:
        unused = not existed and {item.name for item in folder.iterdir()} <= {LOCK}
        if unused:
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if unused:
            with suppress(OSError):  # another process has just begun here
                folder.rmdir()


def family_folder(folder: Path, vector: int | str) -> Path:
    """Where the family of one vector of a run is saved."""
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


def kept_before(place: Path, theta0: SteeringVectors | None) -> SteeringVectors | None:
    """The vectors of an earlier call, which grew from `theta0` if they are a family.

    Raises:
        Damaged: they cannot be read.
        FileNotFoundError, ValueError: as `check_reference`.
    """
    path = place / VECTORS
    if not path.is_file():
        return None
    try:
        found = SteeringVectors.load(path)
    except Damaged as error:
        raise Damaged(
            f"{error}; or pass overwrite=True to replace it, or choose another folder", path
        ) from error
    if not len(found):
        return None
    if theta0 is not None:
        check_reference(place, theta0)
    return found


def last_number(found: SteeringVectors | None) -> int:
    """How many vectors a search has been through, lost ones included."""
    return 0 if found is None else int(found.columns["index"].max()) + 1


def another_search(place: Path, reason: str, differing: list[Any]) -> DifferentSearch:
    """What to raise where a folder's vectors are of another search than the one asked for."""
    return DifferentSearch(
        f"{place}: holds vectors of another search, {reason}; ask for the same to continue it, "
        "pass overwrite=True to begin anew, or choose another folder",
        differing,
        reason,
    )


def check_same(
    place: Path, theta0: SteeringVectors | None, story: Mapping[str, Any], known: Any, model: Any
) -> int:
    """As `Run.check_same`; `known` is the name of the model that the settings tell."""
    found = kept_before(place, theta0)
    if found is None:
        return 0
    chosen = dict(story.get("hyperparameters") or {})
    if chosen.get("radius") == "auto" and "calibration" in found.story:
        del chosen["radius"]
    differing = differences(found.story, {**story, "hyperparameters": chosen})
    if known != model:
        names = ("the bundled one" if name is None else name for name in (known, model))
        differing.insert(0, Difference("model", *names))
    if differing:
        reason = f"found with {', '.join(map(str, differing))}"
        raise another_search(place, reason, differing)
    return last_number(found)


@contextmanager
def beginning(place: Path, theta0: SteeringVectors | None) -> Iterator[Callable[[], None]]:
    """What to do before the first vector is kept; if none came, what was made for it goes."""
    path, beside = place / VECTORS, place / REFERENCE
    if theta0 is not None:
        writable_folder(place)

    def begin() -> None:
        if theta0 is not None:
            path.unlink(missing_ok=True)  # of another family
            theta0.save(beside)

    try:
        yield begin
    finally:
        if theta0 is not None and not path.is_file():
            beside.unlink(missing_ok=True)
            with suppress(OSError):  # holds something: leave it
                place.rmdir()


def keep(
    path: Path,
    previous: SteeringVectors | None,
    search: Search,
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
