"""A run's folder: one process at a time writes in it, and what it holds is read back here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.files import clear_partial, replacing, writable_folder
from tl_melbo.run import _files
from tl_melbo.run._files import COMPLETIONS, REFERENCE, SIDE_EFFECTS, VECTORS, family_folder
from tl_melbo.shapes import shape_checked
from tl_melbo.story import differences
from tl_melbo.vectors import SteeringVectors

# The page and the analyses take long to import: each method imports what it needs.
if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.analysis._family import Family

UNKNOWN: Any = object()
_BUNDLED = "the bundled one"


class Folder:
    """What a run's folder holds, and whether it is of the vectors that are there."""

    @shape_checked
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._lock = FileLock(self.folder / _files.LOCK, blocking=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    @property
    def found(self) -> SteeringVectors:
        """The library that the folder holds; FileNotFoundError where it holds none."""
        path = self.folder / VECTORS
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder}: holds no {VECTORS}; name a folder that `tl-melbo discover` wrote"
            )
        return SteeringVectors.load(path)

    @property
    def settings(self) -> dict[str, Any]:
        """What else is known: the model's name, the length of the completions, whose they are."""
        return _files.load_settings(self.folder)

    def note(self, **settings: Any) -> None:
        """Add to the settings. Nothing is written where nothing changes."""
        known = self.settings
        if {**known, **settings} != known:
            text = json.dumps({**known, **settings}, indent=2, ensure_ascii=False)
            with replacing(self.folder / _files.SETTINGS) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the folder for this process alone; the lock goes with the process, however it ends.

        A folder that was made for it, and in which nothing was saved, is gone again at the end.

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
                f"{folder}: another process is writing here; wait for it to end, or choose "
                "another folder"
            ) from None
        try:
            for each in (folder, *folder.glob(family_folder(Path(), "*").name)):
                clear_partial(each)
            yield
        finally:
            unused = not existed and {item.name for item in folder.iterdir()} <= {_files.LOCK}
            if unused:
                (folder / _files.LOCK).unlink(missing_ok=True)
            self._lock.release()
            if unused:
                with suppress(OSError):  # another process has just begun here
                    folder.rmdir()

    def check(self, *, side_effects: bool = False) -> None:
        """Make sure, before the work, that all that the folder holds is a run's, and can be read.

        With `side_effects`, also that they may be measured. Raises Damaged where a file cannot be
        read, ValueError where one is not of a run, and would be replaced.
        """
        names = (COMPLETIONS, _files.REPORT, _files.SETTINGS, SIDE_EFFECTS)
        theirs = [name for name in names if (self.folder / name).exists()]
        if theirs and not (self.folder / VECTORS).is_file():
            raise ValueError(
                f"{self.folder}: holds {', '.join(theirs)}, but no {VECTORS}, so not the rest of a "
                "run; choose another folder, or pass overwrite=True to replace them"
            )
        if side_effects:
            self._check_may_measure()
        found = self._vectors(None)
        if found is not None:
            self._texts(found)
            self._side_effects(found)
            self.families()

    def check_same(
        self,
        story: Mapping[str, Any],
        theta0: SteeringVectors | None = None,
        model: str | None = UNKNOWN,
    ) -> int:
        """How many vectors of this search the folder holds, lost ones included.

        `story` is what its metadata will have, as far as that is known without a model; `theta0`
        the vector whose family is meant; `model` the name that `load_model` takes, if that is to be
        compared. Raises DifferentSearch where the folder holds vectors of another one.
        """
        found = self._vectors(theta0)
        if found is None:
            return 0
        chosen = dict(story["hyperparameters"])
        if chosen.get("radius") == "auto" and "calibration" in found.story:
            del chosen["radius"]
        known = self.settings.get("model", model)
        asked = known if model is UNKNOWN else model
        theirs = {**found.story, "model": known or _BUNDLED}
        ours = {**story, "model": asked or _BUNDLED, "hyperparameters": chosen}
        differing = differences(theirs, ours)
        if differing:
            reason = f"found with {', '.join(map(str, differing))}"
            raise another_search(self._place(theta0), reason, differing)
        return n_tried(found)

    def families(self) -> "list[Family]":
        """The families that are measured, by number of vector; Damaged if one cannot be read.

        Left out are those whose theta0 is no longer in the library, or to which vectors came since.
        """
        from tl_melbo.analysis._family import Family

        families, library = [], self.found
        for position, index in enumerate(library.columns["index"].tolist()):
            place = family_folder(self.folder, index)
            paths = [place / name for name in (_files.TABLE, _files.COMPOSITION)]
            if not all(path.is_file() for path in (*paths, place / VECTORS, place / REFERENCE)):
                continue
            vectors, reference = self._family(index)
            if not torch.equal(reference.vectors, library[position].vectors):
                continue
            columns = (("kind", "index", "norm", "completion"), ("size", "members", "completion"))
            table, composed = map(_files.load_table, paths, columns)
            norms = table.loc[table["kind"] == "family", "norm"].to_numpy()
            if len(norms) == len(vectors) and np.allclose(norms, vectors.norms, rtol=1e-3):
                families.append(Family(reference, vectors, table, composed))
        return families

    def _place(self, theta0: SteeringVectors | None) -> Path:
        """Where the vectors of a search are saved."""
        if theta0 is None:
            return self.folder
        return family_folder(self.folder, int(theta0.columns["index"][0]))

    def _vectors(self, theta0: SteeringVectors | None) -> SteeringVectors | None:
        """The library that an earlier call left, or the family of `theta0`; None if nothing."""
        place = self._place(theta0)
        path, reference = place / VECTORS, place / REFERENCE
        if not path.is_file():
            return None
        try:
            found = SteeringVectors.load(path)
        except Damaged as error:
            raise Damaged(
                f"{error}; or pass overwrite=True to replace it, or choose another folder", path
            ) from error
        if not len(found) or theta0 is None:
            return found if len(found) else None
        if not reference.is_file():
            raise FileNotFoundError(
                f"{place}: holds a family, but not {REFERENCE}, the vector that it grew from; pass "
                "overwrite=True to begin anew"
            )
        if not torch.equal(SteeringVectors.load(reference).vectors, theta0.vectors):
            raise ValueError(
                f"{place}: holds the family of another vector of that number; pass overwrite=True "
                "to begin anew, or choose another folder"
            )
        return found

    def _family(self, vector: int) -> tuple[SteeringVectors, SteeringVectors]:
        """The vectors of a family, and its theta0."""
        place = family_folder(self.folder, vector)
        return SteeringVectors.load(place / VECTORS), SteeringVectors.load(place / REFERENCE)

    def _texts(self, found: SteeringVectors) -> "pd.DataFrame | None":
        from tl_melbo.report import COMPLETION_COLUMNS

        own = self.settings.get("texts_of", _files.digest(found))
        return self._table(COMPLETIONS, COMPLETION_COLUMNS, found, own)

    def _side_effects(self, found: SteeringVectors) -> "pd.DataFrame | None":
        from tl_melbo.analysis._side_effects import COLUMNS

        return self._table(SIDE_EFFECTS, COLUMNS, found, self.settings.get("side_effects_of"))

    def _table(
        self, name: str, columns: Sequence[str], found: SteeringVectors, owner: str | None
    ) -> "pd.DataFrame | None":
        """A table, if it is there and of these vectors; `owner` is the digest of those it is of."""
        if owner is None or not (self.folder / name).is_file():
            return None
        table = _files.load_table(self.folder / name, columns)
        vectors = sorted({*table["vector"]} - {-1})
        same = owner == _files.digest(found) and vectors == [*range(len(found))]
        return table if same else None

    def _check_may_measure(self) -> None:
        path = self.folder / SIDE_EFFECTS
        if path.is_file() and self.settings.get("side_effects_of") is None:
            raise ValueError(
                f"{path}: no run left it; move it elsewhere, or pass overwrite=True to replace it "
                "and the run"
            )


def n_tried(found: SteeringVectors | None) -> int:
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
