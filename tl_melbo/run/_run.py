"""A folder that keeps a search and all that is made of it, whatever happens to the process."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tl_melbo import checks
from tl_melbo.discovery import melbo, melbo_ortho
from tl_melbo.discovery._map import EffectMap
from tl_melbo.discovery._search import Method
from tl_melbo.errors import DifferentSearch
from tl_melbo.run import _folder, _settings
from tl_melbo.run._folder import COMPLETIONS, LOCK, REPORT, VECTORS, OnVector, family_folder
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.activation_map import ActivationMap
    from tl_melbo.analysis._family import Family
    from tl_melbo.model.bridge import Model

# What `Run.keep` itself passes to a method.
_OWN = ("f", "n_vectors", "previous", "progress", "overwrite", "on_vector")

OnCount = Callable[[int, int], None]
_UNKNOWN: Any = object()


class Run:
    """A search, its texts and its page in one folder; every vector is on disk before the next.

        run = tm.Run("runs/me")
        found = run.melbo(f, n_vectors=32, radius=12.0)
        family = run.melbo_ortho(f, found[4], n_vectors=100)
        run.family(model, f, 4)  # measured, for the page
        run.page(model, f)

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
        self._settings: dict[str, Any] | None = None

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
        checks.argument_names("Run.keep", settings, method, _OWN)
        theta0 = settings.get("theta0")
        if not isinstance(theta0, SteeringVectors) or len(theta0) != 1:
            theta0 = None
        with self.writing():
            place = self._place(theta0)
            previous = None if overwrite else _folder.kept_before(place, theta0)
            missing = n_vectors
            if n_vectors is not None and previous is not None:
                missing = max(0, n_vectors - _folder.last_number(previous))
            try:
                search = method.parts(f, n_vectors=missing, previous=previous, **settings)
            except DifferentSearch as error:
                if not error.reason:  # of other vectors than those in the folder
                    raise
                raise _folder.another_search(place, error.reason, error.differences) from None
            with _folder.beginning(place, theta0 if previous is None else None) as begin:

                def begin_anew() -> None:
                    begin()
                    if theta0 is None and overwrite:
                        self._drop_side_effects()

                found = _folder.keep(
                    place / VECTORS, previous, search, begin_anew, n_vectors, progress, on_vector
                )
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
        checks.argument_names("Run.melbo", settings, melbo, _OWN)
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
        checks.argument_names("Run.melbo_ortho", settings, melbo_ortho, _OWN)
        options = {"progress": progress, "overwrite": overwrite, "on_vector": on_vector}
        return self.keep(melbo_ortho, f, n_vectors, theta0=theta0, **options, **settings)

    @property
    def found(self) -> SteeringVectors:
        """The library that the folder holds.

        Raises:
            FileNotFoundError: it holds none.
        """
        path = self.folder / VECTORS
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder}: holds no {VECTORS}; name a folder that `tl-melbo discover` wrote"
            )
        return SteeringVectors.load(path)

    @property
    def settings(self) -> dict[str, Any]:
        """What the folder says beside its vectors: `model`, `max_new_tokens`, whose its texts are.

        Read once, and again when `writing` begins.
        """
        if self._settings is None:
            self._settings = _settings.load_settings(self.folder)
        return self._settings

    def note(self, **settings: Any) -> None:
        """Add to the settings. Nothing is written where nothing changes."""
        known = {**self.settings, **settings}
        known = {name: value for name, value in known.items() if value is not _UNKNOWN}
        if known != self.settings:
            _settings.save_settings(self.folder, known)
            self._settings = known

    def check(self, *, side_effects: bool = False) -> None:
        """Make sure, before the work, that what the folder holds is a run's, and can be read.

        Args:
            side_effects: whether they are to be measured, and the table replaced.

        Raises:
            Damaged: a file cannot be read.
            ValueError: a file is none of a run's, and would be replaced.
        """
        from tl_melbo.run import _contents

        _contents.check(self.folder, self.settings, side_effects)

    def check_same(
        self,
        story: Mapping[str, Any],
        theta0: SteeringVectors | None = None,
        model: str | None = _UNKNOWN,
    ) -> int:
        """Make sure, before a model is loaded, that a search would continue what is there.

        Args:
            story: what is known of the search already, as its metadata will have it.
            theta0: the vector whose family is meant; None means the library.
            model: the name of its model, as `load_model` takes it, if that is to be compared.

        Returns:
            How many vectors the search has been through.

        Raises:
            DifferentSearch: the folder holds vectors of another one.
        """
        place = self._place(theta0)
        known = model if model is _UNKNOWN else self.settings.get("model", model)
        return _folder.check_same(place, theta0, story, known, model)

    def load(
        self, model: str | None = None, device: str | None = None
    ) -> "tuple[Model, ActivationMap]":
        """Load the model that the vectors were found in, and the map that they were found with.

        Args:
            model: hub id, folder or file; None takes what the settings tell.
            device: as for `load_model`.

        Raises:
            ValueError: the vectors do not tell it, or are of another model.
        """
        from tl_melbo.run import _contents

        return _contents.load_model(self.folder, self.found, self.settings, model, device)

    def texts(
        self,
        model: "Model",
        *,
        max_new_tokens: int | None = None,
        overwrite: bool = False,
        on_batch: OnCount | None = None,
    ) -> "pd.DataFrame":
        """What the model writes without a vector and under each: read back, or written and kept.

        Args:
            model: the model that the vectors were found in.
            max_new_tokens: the most tokens of each; None takes the length that is there, or 50.
            overwrite: write them anew.
            on_batch: as for `report.collect_completions`, whose result this is.
        """
        from tl_melbo.run import _contents

        with self.writing() as folder:
            found = self.found
            if not overwrite:
                texts = _contents.load_texts(folder, found, self.settings, max_new_tokens)
                if texts is not None:
                    return texts
            length = max_new_tokens or self.settings.get("max_new_tokens") or 50
            texts = _contents.report.collect_completions(
                model, found.story["prompts"], found, max_new_tokens=length, on_batch=on_batch
            )
            _contents.save_table(folder / COMPLETIONS, texts)
            self.note(max_new_tokens=length, texts_of=_settings.digest(found))
        return texts

    def side_effects(
        self, model: "Model", *, overwrite: bool = False, on_text: OnCount | None = None
    ) -> "pd.DataFrame":
        """What the vectors cost elsewhere: read back, or measured and kept.

        Args:
            model: the model that the vectors were found in.
            overwrite: measure it anew, and replace a table that no run left.
            on_text: called with the texts done, and the texts in all.

        Returns:
            As `analysis.side_effects`.
        """
        from tl_melbo.run import _contents

        with self.writing() as folder:
            found = self.found
            if not overwrite:
                _contents.check_may_measure(folder, self.settings)
                table = _contents.load_side_effects(folder, found, self.settings)
                if table is not None:
                    return table
            prompts = list(dict.fromkeys(found.story["prompts"]))
            table = _contents.side_effects(model, found, prompts, on_text=on_text)
            _contents.save_table(folder / _contents.SIDE_EFFECTS, table)
            self.note(side_effects_of=_settings.digest(found))
        return table

    def families(self) -> "list[Family]":
        """The families of the vectors that are there, once they are measured: see `family`."""
        from tl_melbo.run import _contents

        return _contents.load_families(self.folder, self.found)

    def family(
        self,
        model: "Model",
        f: "ActivationMap",
        vector: int,
        **options: Any,
    ) -> "Family":
        """Measure the family of one vector, and keep that for the page.

        Args:
            model: the model that the vectors were found in.
            f: the map that they were found with.
            vector: the number of theta0 in the library.
            **options: those of `report.collect_family`, whose result this is.
        """
        from tl_melbo.run import _contents

        with self.writing() as folder:
            place = family_folder(folder, vector)
            vectors, theta0 = (
                SteeringVectors.load(place / name) for name in (VECTORS, _folder.REFERENCE)
            )
            part = _contents.report.collect_family(model, f, vectors, theta0, **options)
            _contents.save_family(place, part)
        return part

    def page(
        self,
        model: "Model",
        f: "ActivationMap",
        **options: Any,
    ) -> "pd.DataFrame":
        """Write `report.html` about all that the folder holds; texts that lack are written first.

        Args:
            model: as `load` gives it.
            f: as `load` gives it.
            **options: those of `texts`.

        Returns:
            The page's table, as `report.write`.
        """
        from tl_melbo.run import _contents

        with self.writing() as folder:
            texts, found = self.texts(model, **options), self.found
            return _contents.report.write(
                folder / REPORT,
                model,
                found,
                completions=texts,
                activation_map=f,
                families=_contents.load_families(folder, found),
                side_effects=_contents.load_side_effects(folder, found, self.settings),
            )

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Keep the folder for this process alone; the lock goes with the process, however it ends.

        A folder that was made for it, and in which nothing came to lie, is gone again at the end.

        Raises:
            BlockingIOError: another process has it.
            NotADirectoryError, PermissionError: it cannot be made, or written to.
        """
        with _folder.locked(self.folder, self._lock) as folder:
            if self._lock.lock_counter == 1:  # another process may have written since
                self._settings = None
            yield folder

    def _place(self, theta0: SteeringVectors | None) -> Path:
        if theta0 is None:
            return self.folder
        return family_folder(self.folder, int(theta0.columns["index"][0]))

    def _drop_side_effects(self) -> None:
        """Forget what vectors cost that are no longer there."""
        if "side_effects_of" in self.settings:
            (self.folder / "side_effects.csv").unlink(missing_ok=True)
            self.note(side_effects_of=_UNKNOWN)
