"""A folder that keeps a search and all that is made of it, whatever happens to the process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from tl_melbo import checks
from tl_melbo.discovery import EffectMap, Method, join, melbo, melbo_ortho
from tl_melbo.errors import DifferentSearch
from tl_melbo.files import writable_folder
from tl_melbo.run import _files
from tl_melbo.run._files import COMPLETIONS, REFERENCE, SIDE_EFFECTS, VECTORS
from tl_melbo.run._folder import UNKNOWN, Folder, another_search, n_tried
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

# The page and the analyses take long to import: each method imports what it needs.
if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.activation_map import ActivationMap
    from tl_melbo.analysis._family import Family
    from tl_melbo.model.bridge import Model

# What `Run.keep` itself passes to a method.
_OWN = ("f", "n_vectors", "previous", "progress", "overwrite", "on_vector")

OnCount = Callable[[int, int], None]
OnVector = Callable[[int, int | None], None]


class Run(Folder):
    """A search, its completions and its page in one folder; each vector is saved before the next.

        run = tm.Run("runs/me")
        found = run.melbo(f, n_vectors=32, radius=12.0)
        family = run.melbo_ortho(f, found[4], n_vectors=100)
        run.family(model, f, 4)  # measured, for the page
        run.page(model, f)

    The same call again, in another process too, goes on where the last one ended, however it ended,
    and finds what it would have found without a break. A call with other settings is refused, and
    told what differs. One process at a time writes in a folder.

    Args:
        folder: made if need be. `vectors.safetensors` is the library,
            `ortho-K/vectors.safetensors` the family of its vector K.
    """

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
            n_vectors: how many in all; None where the method itself knows the end.
            overwrite: begin anew; vectors that are there go when the first new one is found.
            on_vector: called with the vectors saved, and those in all, at first and after each.
            settings: the other arguments of the method. With `theta0`, one vector of a library, the
                vectors are saved in `ortho-` and its number, with theta0 beside them.

        Returns:
            Vectors 0 to n_vectors - 1, or fewer where the method ends before.

        Raises:
            DifferentSearch: the folder holds vectors that were found in another way.
            ValueError: not one vector is found; or as the method does.
            BlockingIOError, OSError: another process is writing in the folder, or the disk is full,
                or forbids it. What was there before is intact.
        """
        checks.argument_names(method.__name__, settings, method, _OWN)
        checks.at_least(1, n_vectors=n_vectors)
        theta0 = settings.get("theta0")
        if not isinstance(theta0, SteeringVectors) or len(theta0) != 1:
            theta0 = None
        tell = on_vector or (lambda *_: None)
        place = self._place(theta0)
        with self.writing():
            found = None if overwrite else self._vectors(theta0)
            known = 0 if found is None else len(found)
            missing = n_vectors and max(0, n_vectors - n_tried(found))
            try:
                search = method.parts(f, n_vectors=missing, previous=found, **settings)
            except DifferentSearch as error:
                if not error.reason:  # of other vectors than those in the folder
                    raise
                raise another_search(place, error.reason, error.differences) from None
            with tqdm(total=n_vectors, initial=known, unit="vector", disable=not progress) as bar:
                tell(known, n_vectors)
                for part in search:
                    if found is None:
                        self._begin(place, theta0)
                    found = part if found is None else join([found, part])
                    found.save(place / VECTORS)
                    bar.update(len(part))
                    tell(len(found), n_vectors)
        if found is None:
            raise ValueError(search.nothing)
        inside = found.columns["index"] < (sys.maxsize if n_vectors is None else n_vectors)
        return found if inside.all() else found[: int(inside.sum())]

    def melbo(self, f: EffectMap, n_vectors: int = 32, **settings: Any) -> SteeringVectors:
        """Find the vectors of `tm.melbo`, or those of them that are not there yet: see `keep`."""
        return self.keep(melbo, f, n_vectors, **settings)

    @shape_checked
    def melbo_ortho(
        self, f: EffectMap, theta0: SteeringVectors, n_vectors: int | None = 100, **settings: Any
    ) -> SteeringVectors:
        """Find the family of `tm.melbo_ortho`, or what of it is not there yet: see `keep`.

        It is saved in `ortho-` and the number of theta0, one vector of a library.
        """
        checks.exactly_one(theta0, "theta0")
        return self.keep(melbo_ortho, f, n_vectors, theta0=theta0, **settings)

    def _begin(self, place: Path, theta0: SteeringVectors | None) -> None:
        """Make room for the first vector of a search: what belongs to others goes."""
        if theta0 is not None:
            writable_folder(place)
            (place / VECTORS).unlink(missing_ok=True)
            theta0.save(place / REFERENCE)
        elif self.settings.get("side_effects_of"):
            (self.folder / SIDE_EFFECTS).unlink(missing_ok=True)
            self.note(side_effects_of=None)

    def load(
        self, model: str | None = None, device: str | None = None
    ) -> "tuple[Model, ActivationMap]":
        """Load the model that the vectors were found in, and the map that they were found with.

        None takes the name that the settings tell. Raises ValueError where the vectors do not tell
        what they were found with, or are of another model.
        """
        import tl_melbo as tm
        from tl_melbo.model.bridge import model_name

        story, known = self.found.story, self.settings.get("model", UNKNOWN)
        facts = ("model", "prompts", "source_layer", "target_layer")
        lacking = [fact for fact in facts if story.get(fact) is None]
        if lacking:
            raise ValueError(
                f"{self.folder / VECTORS}: its story does not tell {', '.join(lacking)}; in "
                "Python, tm.melbo_ortho(f, theta0) takes any vector"
            )
        if model is not None and known not in (UNKNOWN, _files.absolute(model)):
            raise ValueError(
                f"model={model}: the vectors in {self.folder} are of "
                f"{known or 'the bundled one'}; leave --model out"
            )
        name = None if model is None and known is UNKNOWN else model or known
        dtype = getattr(torch, story.get("dtype", "float32"))
        loaded = tm.load_model(name, device=device, dtype=dtype)
        if model_name(loaded) != story["model"]:
            raise ValueError(
                f"--model: {model_name(loaded)}, but the vectors in {self.folder} are of "
                f"{story['model']}; name that model's hub id, folder or file"
            )
        place = {name: story[name] for name in ("source_layer", "target_layer")}
        chat = bool(story.get("chat"))
        return loaded, tm.ActivationMap.from_prompts(loaded, story["prompts"], **place, chat=chat)

    def texts(
        self,
        model: "Model",
        *,
        max_new_tokens: int | None = None,
        overwrite: bool = False,
        on_batch: OnCount | None = None,
    ) -> "pd.DataFrame":
        """What the model writes unsteered and under each vector: read back, or written and saved.

        Without `max_new_tokens` the length that is there counts, or 50; `overwrite` writes them
        anew. The result is that of `report.collect_completions`.
        """
        from tl_melbo import report

        with self.writing():
            found, known = self.found, self.settings.get("max_new_tokens")
            length = max_new_tokens or known or 50
            # Of completions that version 0.1 wrote, the length may be unknown.
            same = not overwrite and known in (None, length)
            texts = self._texts(found) if same else None
            if texts is None:
                texts = report.collect_completions(
                    model, found.story["prompts"], found, max_new_tokens=length, on_batch=on_batch
                )
                _files.save_table(self.folder / COMPLETIONS, texts)
                self.note(max_new_tokens=length, texts_of=_files.digest(found))
        return texts

    def side_effects(
        self, model: "Model", *, overwrite: bool = False, on_text: OnCount | None = None
    ) -> "pd.DataFrame":
        """What the vectors cost elsewhere: read back, or measured and saved.

        `overwrite` measures it anew, and replaces a table that no run left. The result is that of
        `analysis.side_effects`.
        """
        from tl_melbo.analysis._side_effects import side_effects

        with self.writing():
            found = self.found
            if not overwrite:
                self._check_may_measure()
            table = None if overwrite else self._side_effects(found)
            if table is None:
                prompts = list(dict.fromkeys(found.story["prompts"]))
                table = side_effects(model, found, prompts, on_text=on_text)
                _files.save_table(self.folder / SIDE_EFFECTS, table)
                self.note(side_effects_of=_files.digest(found))
        return table

    def family(self, model: "Model", f: "ActivationMap", vector: int, **options: Any) -> "Family":
        """Measure the family of the vector of that number, and save that for the page.

        The options, and what comes back, are those of `report.collect_family`.
        """
        from tl_melbo import report

        with self.writing():
            place = _files.family_folder(self.folder, vector)
            part = report.collect_family(model, f, *self._family(vector), **options)
            _files.save_table(place / _files.TABLE, part.table)
            _files.save_table(place / _files.COMPOSITION, part.composition)
        return part

    def page(self, model: "Model", f: "ActivationMap", **options: Any) -> "pd.DataFrame":
        """Write `report.html` about all that the folder holds, and return the page's table.

        Completions that lack are written first; the options are those of `texts`.
        """
        from tl_melbo import report

        with self.writing():
            texts, found = self.texts(model, **options), self.found
            return report.write(
                self.folder / _files.REPORT,
                model,
                found,
                completions=texts,
                activation_map=f,
                families=self.families(),
                side_effects=self._side_effects(found),
            )
