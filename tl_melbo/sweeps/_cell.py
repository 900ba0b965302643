"""One search of a sweep, in its own run folder: the same code in every engine."""

import gc
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_melbo as tm
from tl_melbo import options, story
from tl_melbo.run._files import VECTORS, digest
from tl_melbo.sweeps._grid import Cell
from tl_melbo.sweeps._store import Store, failed

# How many vectors of a cell are there; a share of one where all come in one go.
Tell = Callable[[Cell, float], None]
# Seconds: a worker that was killed, or whose driver was, keeps its folder a moment longer.
_PATIENCE = 60.0


def is_done(cell: Cell, record: Mapping[str, Any] | None) -> bool:
    """Whether a record tells all that the cell asks for."""
    if record is None or record["status"] != "done":
        return False
    same = record.get("n_vectors") == cell.n_vectors and record.get("cell") == cell.facts
    return same and cell.max_new_tokens in (None, record.get("max_new_tokens"))


def is_lost(store: Store, folder: str, record: Mapping[str, Any]) -> bool:
    """Whether a folder's vectors are damaged, or not those that its record tells of."""
    done, row = record["status"] == "done", record.get("row", {})
    with store.folder(folder, VECTORS) as (place, _):
        try:
            found = tm.SteeringVectors.load(place / VECTORS)
        except FileNotFoundError:
            return done
        except ValueError:  # Damaged
            return True
    return done and digest(found[: row.get("found")]) != row.get("vectors_sha256")


class Worker:
    """Searches cells one after another, and keeps the model of the last one."""

    def __init__(self, out: str, device: str | None = None, threads: int | None = None) -> None:
        self.store, self.device, self.threads = Store(out), device, threads
        self._loaded: tuple[Any, Any] = None, None

    def search(self, cell: Cell, tell: Tell) -> dict[str, Any]:
        """Search, or go on, and give the record of it; that of a failure says why."""
        begun, record = time.perf_counter(), {"cell": dict(cell.facts), "n_vectors": cell.n_vectors}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            try:
                with self.store.folder(cell.folder) as (place, send):
                    found = self._searched(cell, place, send, tell)
                    send()
                record |= {"status": "done", "max_new_tokens": cell.max_new_tokens, **found}
            except Exception as error:
                record |= failed(error)
        told = "\n".join(dict.fromkeys(str(each.message) for each in caught))
        return {**record, "warnings": told, "seconds": time.perf_counter() - begun}

    def _searched(
        self, cell: Cell, place: Path, send: Callable[[], None], tell: Tell
    ) -> dict[str, Any]:
        run, facts = tm.Run(place), cell.facts
        with run.writing(_PATIENCE), _threads(self.threads):
            model = self._model(cell)
            at = {name: facts[name] for name in ("source_layer", "target_layer", "chat")}
            f = tm.ActivationMap.from_prompts(model, facts["prompt"], **at)
            settings = dict(cell.settings)
            if facts["other"]:
                settings["other"] = tm.ActivationMap.from_prompts(model, facts["other"], **at)

            def count(there: int, _: int | None) -> None:
                if there:  # whose vectors these are
                    run.note(command="discover", model=facts["model"])
                    send()
                tell(cell, there)

            found = run.keep(
                options.method_named(facts["method"]), f, cell.n_vectors, on_vector=count,
                on_share=lambda share: tell(cell, share * cell.n_vectors), **settings,
            )  # fmt: skip
            tell(cell, cell.n_vectors)
            return _measured(model, run, found, cell)

    def _model(self, cell: Cell) -> Any:
        name, model = self._loaded
        if model is None or name != cell.model:
            if model is not None:  # gone before the next one comes
                self._loaded = model = None, None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            kind = getattr(torch, cell.facts["dtype"])
            where = {"device": self.device} if self.device != "auto" else {"device_map": "auto"}
            model = tm.load_model(cell.facts["model"], dtype=kind, **where)
            self._loaded = cell.model, model
        return model


def _measured(model: Any, run: tm.Run, found: tm.SteeringVectors, cell: Cell) -> dict[str, Any]:
    """The numbers of the table, and what kind of text each completion is."""
    from tl_melbo import analysis  # which takes long to import

    kl = torch.stack([analysis.kl_divergence(model, text, found) for text in cell.facts["prompt"]])
    kl = kl.double().mean(0)
    measure = story.measure_of(found.story)
    column = found.columns.get(measure["column"]) if measure else None
    radius = found.story["hyperparameters"].get("radius")
    row = {
        "radius": radius if isinstance(radius, int | float) else float(found.norms.max()),
        "found": len(found),
        "measure": measure["label"] if measure and column is not None else None,
        "measure_median": None if column is None else _number(column.double().nanmedian()),
        "measure_max": None if column is None else _number(column.double().max()),
        "kl_median": _number(kl.nanmedian()),
        "kl_max": _number(kl.max()),
        "vectors_sha256": digest(found),
        "unsteered": None, "completion": None,
    }  # fmt: skip
    if cell.max_new_tokens is None:
        return {"row": row, "tags": []}
    texts = run.texts(model, max_new_tokens=cell.max_new_tokens)
    texts = texts[texts["vector"] < len(found)]
    first = pd.DataFrame(texts[texts["prompt"] == cell.facts["prompt"][0]])
    strongest = int(kl.nan_to_num(-1.0).argmax())
    written = first.set_index(["vector", "scale"])["completion"].to_dict()
    row |= {"unsteered": written[-1, 0.0], "completion": written[strongest, 1.0]}
    tags = []
    for prompt, some in texts.groupby("prompt", sort=False):
        unsteered = some["completion"][some["vector"] < 0].tolist()
        told = analysis.tags(str(prompt), some["completion"].tolist(), unsteered=unsteered)
        tags += zip(some["vector"].tolist(), *(told[each].tolist() for each in told), strict=True)
    return {"row": row, "tags": tags}


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_local(
    cells: Sequence[Cell], worker: Worker, tell: Tell
) -> Generator[tuple[Cell, dict[str, Any]]]:
    """The record of each cell as it ends, model by model."""
    queue, loaded = list(cells), None
    while queue:
        cell = take(queue, loaded, [])
        loaded = cell.model
        yield cell, worker.search(cell, tell)


def take(queue: list[Cell], loaded: Any, others: Sequence[Any]) -> Cell:
    """Take the next cell for a worker: of the model that it has, if there are any.

    Otherwise of the model with the most cells for each worker that has it, this one included.
    """
    left = Counter(cell.model for cell in queue)
    wanted = loaded
    if loaded not in left:
        wanted = max(left, key=lambda model: left[model] / (1 + others.count(model)))
    place = next(i for i, cell in enumerate(queue) if cell.model == wanted)
    return queue.pop(place)
