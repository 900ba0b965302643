"""Adapters in the folder of a run: each is saved before the next is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_melbo import checks
from tl_melbo.adapters import Adapter, divergence_adapter, join
from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.run import _files
from tl_melbo.shapes import shape_checked
from tl_melbo.story import differences

if TYPE_CHECKING:
    import pandas as pd


ADAPTERS, TEXTS = "adapters.safetensors", "adapters.csv"
# What `Run.adapters` itself passes.
_OWN = ("model", "prompts", "n_adapters", "first", "progress")

OnAdapter = Callable[[int, int], None]


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
    checks.argument_names("adapters", settings, divergence_adapter, _OWN)
    checks.at_least(1, n_adapters=n_adapters)
    path = self.folder / ADAPTERS
    tell = on_adapter or (lambda *_: None)
    with self.writing():
        found = None if overwrite else load_adapters(path)
        known = 0 if found is None else len(found)
        options = {"first": known, "progress": progress, **settings}
        training = divergence_adapter.parts(model, prompts, max(1, n_adapters - known), **options)
        _check_same(path, found, training.story)
        tell(known, n_adapters)
        if found is not None and known >= n_adapters:
            return found[:n_adapters]
        parts = [] if found is None else [found]
        for adapter in training:
            parts.append(adapter)
            join(parts).save(path)
            tell(known + len(parts) - (known > 0), n_adapters)
    return join(parts)


def load_adapters(path: Path) -> Adapter | None:
    """The adapters that an earlier call left; None if there are none."""
    if not path.is_file():
        return None
    try:
        return Adapter.load(path)
    except Damaged as error:
        advice = "or pass overwrite=True to replace it, or choose another folder"
        raise Damaged(f"{error}; {advice}", path) from error


def adapters_kept(folder: Path) -> dict[str, Any]:
    """What a folder holds of adapters, as `report.write` takes it: they, and texts under them."""
    found, path = load_adapters(folder / ADAPTERS), folder / TEXTS
    known = found is not None and path.is_file()
    texts = _files.load_table(path, ("vector", "prompt", "completion")) if known else None
    return {"adapters": found, "adapter_texts": texts}


def _check_same(path: Path, found: Adapter | None, story: Any) -> None:
    if found is None:
        return
    advice = "ask for the same to continue, pass overwrite=True to begin anew, or choose another"
    if differing := differences(found.story, story):
        raise DifferentSearch.of(f"{path}: other adapters", differing, f"{advice} folder")
    if found.columns["index"].tolist() != list(range(len(found))):
        reason = "not all from 0 on, in their order"
        raise DifferentSearch(f"{path}: {reason}; {advice} folder", [], reason)


@shape_checked
def write_adapter_texts(
    self: Any,
    model: Model,
    adapter: Adapter,
    prompts: str | Sequence[str],
    max_new_tokens: int = 50,
) -> "pd.DataFrame":
    """Sample under each adapter after each prompt, and save that in `adapters.csv`.

    Returns:
        The frame of `tm.generate`, at temperature 1; vector -1 is the model without an adapter.
    """
    import pandas as pd

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 1.0}
    options["chat"] = bool(adapter.story.get("chat"))
    frames = [generate(model, prompts, each, **options) for each in (None, adapter)]
    texts = pd.concat(frames, ignore_index=True)
    with self.writing():
        _files.save_table(self.folder / TEXTS, texts)
    return texts
