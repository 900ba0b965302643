"""Adapters and gated factors in the folder of a run: each part is saved before the next."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_melbo import checks
from tl_melbo.adapters import Adapter, divergence_adapter
from tl_melbo.concatenation import one_after_another
from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.gated import GatedFactors, gated_factors
from tl_melbo.gated._factors import UNFINISHED
from tl_melbo.generation import OnBatch, generate, in_parts
from tl_melbo.model.bridge import Model
from tl_melbo.run import _files
from tl_melbo.shapes import shape_checked
from tl_melbo.stored import Library
from tl_melbo.story import differences

if TYPE_CHECKING:
    import pandas as pd


# What holds each kind, and the texts under it.
_FILES = {
    Adapter: ("adapters.safetensors", "adapters.csv"),
    GatedFactors: ("factors.safetensors", "factors.csv"),
}
_COLUMNS = ("vector", "prompt", "completion")

OnAdapter = OnStep = Callable[[int, int], None]


@shape_checked
def keep_adapters(
    self: Any,
    model: Model,
    n_adapters: int = 8,
    prompts: str | Sequence[str] | None = None,
    *,
    progress: bool = False,
    overwrite: bool = False,
    on_adapter: OnAdapter | None = None,
    **settings: Any,
) -> Adapter:
    """Train the adapters of `tm.divergence_adapter`, or those of them that are not there yet.

        run.adapters(model, 8, max_new_tokens=24)

    They are kept in `adapters.safetensors`, each before the next begins. The same call goes on
    where an earlier one ended.

    Args:
        n_adapters: how many in all.
        overwrite: begin anew; adapters that are there go when the first new one is trained.
        on_adapter: called with the adapters saved, and those in all, at first and after each.
        settings: further arguments of `tm.divergence_adapter`.

    Raises:
        DifferentSearch: the folder holds adapters that were trained in another way.
        BlockingIOError: another process is writing.
    """
    checks.at_least(1, n_adapters=n_adapters)
    with self.writing():
        path = self.folder / _FILES[Adapter][0]
        found: Any = None if overwrite else _files.load_kept(path, Adapter)
        known = 0 if found is None else len(found)
        training = divergence_adapter.parts(
            model, prompts, max(1, n_adapters - known), first=known, progress=progress, **settings
        )
        _check_same(path, found, training.story)
        tell = on_adapter or (lambda *_: None)
        tell(known, n_adapters)
        for part in training if known < n_adapters else ():
            found = part if found is None else one_after_another([found, part], found.story)
            _replace(path, found, len(found) == 1)
            tell(len(found), n_adapters)
        return found[:n_adapters]


@shape_checked
def keep_factors(
    self: Any,
    model: Model,
    prompts: str | Sequence[str],
    n_factors: int = 64,
    *,
    progress: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    **settings: Any,
) -> GatedFactors:
    """Find the factors of `tm.gated_factors`, or read them back where the folder holds them.

        run.gated_factors(model, "Tell me about yourself.", 16, radius=0.25, chat=True)

    They are kept in `factors.safetensors`, after each step of the search. The same call goes on
    where an earlier one ended. All are found together, so one for another number of factors is
    another search.

    Args:
        overwrite: find them anew; those that are there go after the first step.
        on_step: called with the steps done, and those in all, at first and after each.
        settings: further arguments of `tm.gated_factors`.

    Raises:
        DifferentSearch: the folder holds factors that were found in another way.
        BlockingIOError: another process is writing.
    """
    tell = on_step or (lambda *_: None)
    with self.writing():
        path = self.folder / _FILES[GatedFactors][0]
        found = None if overwrite else _files.load_kept(path, GatedFactors)
        search = gated_factors.parts(model, prompts, n_factors, progress=progress, **settings)
        _check_same(path, found, search.story)
        search.begun = found
        tell(_n_steps(found), search.n_steps)
        for found in search:
            _replace(path, found)
            tell(_n_steps(found), search.n_steps)
    return found


def _n_steps(found: GatedFactors | None) -> int:
    return 0 if found is None or found.history is None else found.history.shape[1]


def _replace(path: Path, found: Library, is_other: bool = True) -> None:
    """Save what is found; with what it replaces go the texts under that."""
    texts = path.with_suffix(".csv")
    if is_other and path.is_file() and _own_table(texts) is not None:
        texts.unlink()
    found.save(path)


def _own_table(texts: Path) -> "pd.DataFrame | None":
    """The table of texts that a run wrote, if there is one: it has the unsteered model's."""
    try:
        table = _files.load_table(texts, _COLUMNS) if texts.is_file() else None
    except Damaged:
        return None
    return table if table is not None and -1 in {*table["vector"]} else None


def all_kept(folder: Path) -> dict[str, Any]:
    """What a folder holds of adapters and factors that are done, as `report.write` takes them."""
    parts: dict[str, Any] = {}
    for kind, name in ((Adapter, "adapter"), (GatedFactors, "factor")):
        own, texts = (folder / file for file in _FILES[kind])
        found = parts[f"{name}s"] = _files.load_kept(own, kind)
        if found is not None and UNFINISHED in found.columns:
            found = parts[f"{name}s"] = None
        parts[f"{name}_texts"] = None if found is None else _own_table(texts)
    return parts


def _check_same(path: Path, found: Library | None, story: Any) -> None:
    if found is None:
        return
    what = path.stem
    advice = "ask for the same to continue, pass overwrite=True to begin anew, or choose another"
    if differing := differences(found.story, story):
        raise DifferentSearch.of(f"{path}: other {what}", differing, f"{advice} folder")
    # Of what is found together, all are there.
    expected = story["hyperparameters"].get("n_factors", len(found))
    if found.columns["index"].tolist() != list(range(expected)):
        reason = "not all from 0 on, in their order"
        raise DifferentSearch(f"{path}: {reason}; {advice} folder", [], reason)


@shape_checked
def write_texts_under(
    self: Any,
    model: Model,
    steering: Adapter | GatedFactors,
    prompts: str | Sequence[str],
    max_new_tokens: int = 50,
    *,
    on_batch: OnBatch | None = None,
) -> "pd.DataFrame":
    """Sample under each adapter, or each gated factor, after each prompt, and save that.

    It is saved in `adapters.csv` or `factors.csv`, which is a ValueError where no run left that
    file. `on_batch` is as `tm.generate` takes it.

    Returns:
        The frame of `tm.generate`, at temperature 1; vector -1 is the model as it is.
    """
    import pandas as pd

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 1.0}
    options["chat"] = bool(steering.story.get("chat"))
    texts, path = checks.as_texts(prompts), self.folder / _FILES[type(steering)][1]
    if path.is_file() and _own_table(path) is None:
        raise ValueError(f"{path}: no run left it; move it elsewhere")
    tells = in_parts(on_batch, [len(texts), len(texts) * len(steering)])
    frames = [
        generate(model, texts, each, on_batch=tell, **options)
        for each, tell in zip((None, steering), tells, strict=True)
    ]
    table = pd.concat(frames, ignore_index=True)
    with self.writing():
        _files.save_table(path, table)
    return table
