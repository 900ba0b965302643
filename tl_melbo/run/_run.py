"""A folder that keeps a search and all that is made of it, whatever happens to the process."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from tl_melbo import checks
from tl_melbo.discovery import EffectMap, Method, join, melbo, melbo_ortho
from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.files import writable_folder
from tl_melbo.run import _files
from tl_melbo.run._adapters import all_kept, keep_adapters, keep_factors, write_texts_under
from tl_melbo.run._files import COMPLETIONS, RANDOM, REFERENCE, SIDE_EFFECTS, VECTORS, family_folder
from tl_melbo.run._texts import OnCount, load_control, write_random_texts, write_texts
from tl_melbo.shapes import shape_checked
from tl_melbo.story import differences
from tl_melbo.vectors import SteeringVectors

# The page and the analyses take long to import: each method imports what it needs.
if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.activation_map import ActivationMap
    from tl_melbo.analysis._family import Family
    from tl_melbo.judges._asking import Judge
    from tl_melbo.model.bridge import Model

_BUNDLED = "the bundled one"
# The setting that tells whose table it is.
_OWNER = {COMPLETIONS: "texts_of", SIDE_EFFECTS: "side_effects_of", RANDOM: "random_texts_of"}

OnVector = Callable[[int, int | None], None]
OnShare = Callable[[float], None]


class Run:
    """A search, its completions and its page in one folder; each vector is saved before the next.

        run = tm.Run("runs/me")
        found = run.melbo(f, n_vectors=32, radius=12.0)
        family = run.melbo_ortho(f, found[4], n_vectors=100)
        run.family(model, f, 4)  # measured, for the page
        run.page(model, f)

    The same call again, in another process too, continues the search and finds what it would have
    found without a break. A call with other settings is refused. One process at a time writes.
    `vectors.safetensors` is the library, `ortho-K/vectors.safetensors` the family of its vector K.
    """

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
            _files.save_settings(self.folder, {**known, **settings})

    def writing(self, patience: float = 0) -> AbstractContextManager[None]:
        """Lock the folder, in a `with`; BlockingIOError where another has it all these seconds."""
        return _files.locked(self.folder, self._lock, patience)

    def check(
        self, *, side_effects: bool = False, control: bool = True, without: int | None = None
    ) -> None:
        """Make sure, before the work, that all files are a run's and not Damaged, else ValueError.

        With `side_effects` and `control`, also that measuring them, or writing `random_texts`,
        replaces no table of the user's own. The family of vector `without` is left out.
        """
        names = (COMPLETIONS, _files.REPORT, _files.SETTINGS, SIDE_EFFECTS, RANDOM)
        theirs = [name for name in names if (self.folder / name).exists()]
        if theirs and not (self.folder / VECTORS).is_file():
            raise ValueError(
                f"{self.folder}: holds {', '.join(theirs)}, but no {VECTORS}, so not the rest of a "
                "run; choose another folder, or pass overwrite=True to replace them"
            )
        for name, is_due in ((RANDOM, control), (SIDE_EFFECTS, side_effects)):
            if is_due:
                self._check_own(name)
        found = _files.load_vectors(self.folder)
        if found is not None:
            self._table(COMPLETIONS, found)
            self._table(SIDE_EFFECTS, found)
            if control:
                load_control(self, found)
            self.families(without)

    def check_same(self, story: Mapping[str, Any], theta0: SteeringVectors | None = None) -> int:
        """How many vectors of this search the folder holds, lost ones included.

        `story` is its metadata, as far as known without a model; its `model` is the name that
        `load_model` takes. Raises DifferentSearch where the folder holds another search.
        """
        place = self._place(theta0)
        found = _files.load_vectors(place, theta0)
        if found is None:
            return 0
        chosen = dict(story["hyperparameters"])
        if chosen.get("radius") == "auto" and "calibration" in found.story:
            del chosen["radius"]
        known = self.settings.get("model", story.get("model"))
        theirs = {**found.story, "model": known or _BUNDLED}
        asked = story.get("model", known) or _BUNDLED
        ours = {**story, "model": asked, "hyperparameters": chosen}
        if differing := differences(theirs, ours):
            reason = f"found with {', '.join(map(str, differing))}"
            raise _files.another_search(place, reason, differing)
        return _files.n_tried(found)

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
        on_share: OnShare | None = None,
        **settings: Any,
    ) -> SteeringVectors:
        """Find the vectors of any method, or those of them that are not there yet.

            run.keep(tm.jacobian, f, 32, radius=12.0)

        Args:
            n_vectors: how many in all; None where the method itself knows the end.
            overwrite: begin anew; vectors that are there go when the first new one is found.
            on_vector: called with the vectors saved, and those in all, at first and after each.
            on_share: called with the share of the work, by methods that find all in one go.
            settings: the method's own arguments; with `theta0`, one vector of a library, the
                vectors are saved in `ortho-` and its number.

        Raises:
            DifferentSearch: the folder holds vectors that were found in another way.
            BlockingIOError: another process is writing.
        """
        checks.at_least(1, n_vectors=n_vectors)
        theta0 = settings.get("theta0")
        if theta0 is not None and not (isinstance(theta0, SteeringVectors) and len(theta0) == 1):
            raise ValueError("theta0: names a folder; pass one vector of a library, as found[5]")
        tell = on_vector or (lambda *_: None)
        place = self._place(theta0)
        with self.writing():
            found = None if overwrite else _files.load_vectors(place, theta0)
            known = {} if theta0 else _files.load_settings(self.folder, overwrite)
            missing = n_vectors and max(0, n_vectors - _files.n_tried(found))
            try:
                search = method.parts(f, n_vectors=missing, previous=found, **settings)
                search.check_total(n_vectors)
            except DifferentSearch as error:
                if not error.reason:  # of other vectors than those in the folder
                    raise
                raise _files.another_search(place, error.reason, error.differences) from None
            search.progress, search.on_share = progress, on_share or search.on_share
            tell(0 if found is None else len(found), n_vectors)
            for part in search:
                if found is None:
                    self._begin(place, theta0, known)
                found = part if found is None else join([found, part])
                found.save(place / VECTORS)
                tell(len(found), n_vectors)
        if found is None:
            raise ValueError(search.nothing)
        inside = found.columns["index"] < (sys.maxsize if n_vectors is None else n_vectors)
        return found if inside.all() else found[: int(inside.sum())]

    def melbo(self, f: EffectMap, n_vectors: int = 32, **settings: Any) -> SteeringVectors:
        """Find the vectors of `tm.melbo`: see `keep`."""
        return self.keep(melbo, f, n_vectors, **settings)

    def melbo_ortho(
        self, f: EffectMap, theta0: SteeringVectors, n_vectors: int | None = 100, **settings: Any
    ) -> SteeringVectors:
        """Find the family of `tm.melbo_ortho`: see `keep`."""
        return self.keep(melbo_ortho, f, n_vectors, theta0=theta0, **settings)

    adapters, gated_factors = keep_adapters, keep_factors
    adapter_texts = factor_texts = write_texts_under
    texts, random_texts = write_texts, write_random_texts

    def load(
        self, model: str | None = None, device: str | None = None
    ) -> "tuple[Model, ActivationMap]":
        """Load the model and the map that the vectors were found with.

        None takes the name that the settings tell, or the bundled model. Raises ValueError where
        it is another model, or the story or the settings make no sense.
        """
        import tl_melbo as tm
        from tl_melbo.model.bridge import model_name
        from tl_melbo.model.load import BUNDLED_NAME

        story = self.found.story
        facts = ("model", "prompts", "source_layer", "target_layer")
        lacking = [fact for fact in facts if story.get(fact) is None]
        dtype: Any = getattr(torch, str(story.get("dtype", "float32")), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            lacking.append("a floating-point dtype")
        if lacking:
            raise ValueError(
                f"{self.folder / VECTORS}: its story does not tell {', '.join(lacking)}; in "
                "Python, tm.melbo_ortho(f, theta0) takes any vector"
            )
        asked = _files.absolute(model)
        known = self.settings.get("model") or asked
        if model is not None and known != asked:
            raise ValueError(
                f"model={model}: the vectors in {self.folder} are of {known}; leave it out"
            )
        advice = "pass that model's hub id, folder or file as model=..."
        theirs = f"the vectors in {self.folder} are of {story['model']}"
        if known is None and story["model"] != BUNDLED_NAME:
            raise ValueError(f"{theirs}, and nothing tells where that is; {advice}")
        loaded = tm.load_model(known, device=device, dtype=dtype)
        if model_name(loaded) != story["model"]:
            raise ValueError(f"{theirs}, but {known or _BUNDLED} is {model_name(loaded)}; {advice}")
        place = {name: story[name] for name in facts[1:]}
        return loaded, tm.ActivationMap.from_prompts(loaded, **place, chat=bool(story.get("chat")))

    def side_effects(
        self, model: "Model", *, overwrite: bool = False, on_text: OnCount | None = None
    ) -> "pd.DataFrame":
        """What `analysis.side_effects` measures: read back, or measured and saved.

        `overwrite` measures it anew, and replaces a table that no run left.
        """
        from tl_melbo.analysis._side_effects import side_effects

        with self.writing():
            found = self.found
            if not overwrite:
                self._check_own(SIDE_EFFECTS)
            table = None if overwrite else self._table(SIDE_EFFECTS, found)
            if table is None:
                prompts = list(dict.fromkeys(found.story["prompts"]))
                table = side_effects(model, found, prompts, on_text=on_text)
                self._save(SIDE_EFFECTS, table, found)
        return table

    def family(self, model: "Model", f: "ActivationMap", vector: int, **options: Any) -> "Family":
        """Measure a vector's family as `report.collect_family` does, and save that for the page."""
        from tl_melbo import report

        with self.writing():
            place = family_folder(self.folder, vector)
            part = report.collect_family(model, f, *_files.load_family(place), **options)
            _files.save_table(place / _files.TABLE, part.table)
            _files.save_table(place / _files.COMPOSITION, part.composition)
        return part

    def families(self, without: int | None = None) -> "list[Family]":
        """The families that are measured, by number of vector; Damaged if one cannot be read.

        Left out are those whose theta0 left the library, or to which vectors came since, and that
        of vector `without`.
        """
        from tl_melbo.analysis._family import Family

        families, library = [], self.found
        for position, index in enumerate(library.columns["index"].tolist()):
            place = family_folder(self.folder, index)
            paths = [place / name for name in (_files.TABLE, _files.COMPOSITION)]
            files = (*paths, place / VECTORS, place / REFERENCE)
            if index == without or not all(path.is_file() for path in files):
                continue
            try:
                vectors, reference = _files.load_family(place)
                if not torch.equal(reference.vectors, library[position].vectors):
                    continue
                table, composed = map(_files.load_table, paths)
            except Damaged as error:
                told = f"{error}; or delete the folder {place.name}, or find that family anew with "
                raise Damaged(f"{told}overwrite=True", error.path) from error
            norms = table.loc[table["kind"] == "family", "norm"].to_numpy()
            if len(norms) == len(vectors) and np.allclose(norms, vectors.norms, rtol=1e-3):
                families.append(Family(reference, vectors, table, composed))
        return families

    def page(
        self,
        model: "Model",
        f: "ActivationMap",
        *,
        notes: "str | Path | Mapping[str, Any] | None" = None,
        token_divergence: bool = False,
        judge: "Judge | None" = None,
        on_batch: OnCount | None = None,
        **options: Any,
    ) -> "pd.DataFrame":
        """Write `report.html` about all that the folder holds, and return the page's table.

        Completions that lack are written first, then those of `random_texts`; the options are those
        of `texts`. `notes` are as `report.write` takes them; None takes `notes.json` of the folder,
        if it is there. With `token_divergence` the page shows where along its text each vector
        parts from the model. `judge` and `on_batch` are as `report.write` takes them; completions
        that are written first are counted by themselves.
        """
        from tl_melbo import analysis, report
        from tl_melbo.judges._asking import check_optional_judge

        check_optional_judge(judge)
        with self.writing():
            if notes is None and (self.folder / _files.NOTES).is_file():
                notes = report.read_notes(self.folder / _files.NOTES)
            texts, found = self.texts(model, on_batch=on_batch, **options), self.found
            control = {"overwrite": options.get("overwrite", False), "on_batch": on_batch}
            parts: dict[str, Any] = {
                "families": self.families(),
                "side_effects": self._table(SIDE_EFFECTS, found),
                "random_texts": self.random_texts(model, f, **control),
                **all_kept(self.folder),
                "notes": notes,
                "judge": judge,
                "on_batch": on_batch,
                # A page may be passed on: it tells no absolute path.
                "run_folder": self.folder.name if self.folder.is_absolute() else str(self.folder),
            }
            if token_divergence:
                greedy = texts["scale"].isin([-1, 1])
                if "sample" in texts:
                    greedy &= texts["sample"] == 0
                some: Any = texts[greedy]
                told = analysis.token_divergence(model, some, found, on_batch=on_batch)
                parts["token_divergence"] = told
            path = self.folder / _files.REPORT
            return report.write(path, model, found, completions=texts, activation_map=f, **parts)

    def _begin(self, place: Path, theta0: SteeringVectors | None, known: Mapping[str, Any]) -> None:
        """Remove what belongs to an earlier search, and forget what is known of it."""
        if theta0 is not None:
            writable_folder(place)
            for name in (VECTORS, _files.TABLE, _files.COMPOSITION):
                (place / name).unlink(missing_ok=True)
            theta0.save(place / REFERENCE)
            return
        for name in (SIDE_EFFECTS, RANDOM):
            if known.get(_OWNER[name]):
                (self.folder / name).unlink(missing_ok=True)
        if any((self.folder / name).exists() for name in (_files.SETTINGS, COMPLETIONS)):
            # None, unlike nothing, is nobody's.
            _files.save_settings(self.folder, {"texts_of": None})

    def _place(self, theta0: SteeringVectors | None) -> Path:
        if theta0 is None:
            return self.folder
        return family_folder(self.folder, int(theta0.columns["index"][0]))

    def _table(self, name: str, found: SteeringVectors) -> "pd.DataFrame | None":
        """A table, if it is there and of these vectors."""
        digest = _files.digest(found)
        # Version 0.1 did not tell whose completions it wrote.
        owner = self.settings.get(_OWNER[name], digest if name == COMPLETIONS else None)
        if owner is None or not (self.folder / name).is_file():
            return None
        table = _files.load_table(self.folder / name)
        same = owner == digest and {*table["vector"]} - {-1} == {*range(len(found))}
        return table if same else None

    def _check_own(self, name: str) -> None:
        path = self.folder / name
        if path.is_file() and self.settings.get(_OWNER[name]) is None:
            raise ValueError(
                f"{path}: no run left it; move it elsewhere, or pass overwrite=True to replace it"
            )

    def _save(
        self, name: str, table: "pd.DataFrame", found: SteeringVectors, **settings: Any
    ) -> None:
        _files.save_table(self.folder / name, table)
        self.note(**settings, **{_OWNER[name]: _files.digest(found)})
