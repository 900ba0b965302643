"""`tm.sweep`: a grid of searches -> run folders -> one table -> one page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from tl_melbo import checks
from tl_melbo.errors import told, warn_user
from tl_melbo.run._files import VECTORS
from tl_melbo.shapes import shape_checked
from tl_melbo.sweeps._cell import Worker, is_done, is_lost, run_local
from tl_melbo.sweeps._grid import Cell, cells_of, read_grid
from tl_melbo.sweeps._store import ASIDE, Store
from tl_melbo.tables import Table

TABLE, PAGE = "sweep.parquet", "sweep.html"
OnProgress = Callable[[float, float], None]
Records = dict[str, dict[str, Any]]
# In every table, whatever was searched.
_MEASURED: Mapping[str, str] = {
    "found": "Int64", "measure": "string", "measure_median": "Float64", "measure_max": "Float64",
    "kl_median": "Float64", "kl_max": "Float64", "unsteered": "string", "completion": "string",
    "vectors_sha256": "string", "seconds": "Float64",
}  # fmt: skip


@shape_checked
def sweep(
    grid: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    out: str | Path = "runs/sweep",
    *,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    gpus: float | None = None,
    device: str | None = None,
    progress: bool = False,
    on_progress: OnProgress | None = None,
) -> Table:
    """Search with every combination of a grid's options; each search has a run folder of its own.

        grid = {"prompt": "Tell me about yourself.", "source_layer": [4, 8], "radius": [8, 12, 16]}
        table = tm.sweep(grid, "runs/sweep")

    The same call goes on where it was: searches that have ended are not done again, others lose at
    most the vector that was being searched. A search that fails has a row that says why, and is
    tried again. So is one whose vectors are missing, damaged or changed, with a warning.
    `docs/sweeps.md` tells of clusters.

    Args:
        grid: options with a value, or a list of them; or a list of such grids; or the path of a
            YAML file. The options are those of `tl-melbo discover` and of the method; `name` is
            the folder's. Of layers in lists, pairs whose target does not come after the source
            are left out.
        out: a folder, or an fsspec URL such as "s3://bucket/sweep".
        engine: "local", in this process; "ray", on a cluster.
        address: the cluster's, "host:port" or "auto"; None takes RAY_ADDRESS, or starts Ray here.
        workers: how many search at once with Ray; None takes as many as there is room for.
        threads: of each worker; None leaves torch's ("local") or takes one ("ray").
        gpus: of each worker with Ray, such as 0.25; None takes one, where there are any.
        device: None takes a CUDA device if there is one (and, with Ray, if `gpus` is not 0);
            "auto", which Ray takes for more than one GPU, spreads a model over all that are there.
        progress: show a bar over all searches, with the time left.
        on_progress: called with the vectors found, and those in all, of all searches.

    Returns:
        A row for each search, in the grid's order: folder; status, "done" or "failed"; error;
        warnings; its options; radius, the one used; found, how many vectors; measure, what the
        method measures, measure_median and measure_max; kl_median and kl_max of the next token from
        the unsteered model, in nats, the mean over prompts; unsteered and completion, of the vector
        with the largest KL; vectors_sha256; seconds, of the last process that worked on it. The
        same is in `sweep.parquet` and, drawn, in `sweep.html`.

    Raises:
        ValueError: options that are not known, two searches with one folder, a cluster without
            room, or whose nodes do not share `out`.
        BlockingIOError: another process is sweeping into this folder.
        ConnectionError: no cluster at the address.
        OSError: the table or the page cannot be written; what was found is kept.
    """
    given = read_grid(Path(grid).expanduser()) if isinstance(grid, str | Path) else grid
    cells = cells_of(given)
    _check_engine(engine, address, workers, threads, gpus)
    checks.installed("pyarrow", "a sweep's table", "sweep")
    store = Store(out)
    with store.writing():
        records = _known(store, cells)
        todo = [cell for cell in cells if not is_done(cell, records.get(cell.folder))]
        with _progress(cells, todo, progress, on_progress) as tell:
            if engine == "ray" and todo:
                from tl_melbo.sweeps._ray import run_ray

                place: dict[str, Any] = {"address": address, "workers": workers, "gpus": gpus}
                ended = run_ray(todo, store.out, tell, device=device, threads=threads, **place)
            else:
                ended = run_local(todo, Worker(store.out, device, threads), tell)
            with closing(ended):
                for cell, record in ended:
                    records[cell.folder] = store.keep(cell.folder, record)
                    tell(cell, cell.n_vectors)
                    _write_table(store, cells, records)
        table = _write_table(store, cells, records)
        _write_page(store, table, records)
    return table


def _known(store: Store, cells: Sequence[Cell]) -> Records:
    """What is known of each search; of one whose vectors are lost, that they are."""
    records, lost = {}, []
    for cell in cells:
        record = store.record(cell.folder)
        if record is not None and record.get("cell") != cell.facts:
            continue
        # A search that never ended has no record, and may have vectors.
        if is_lost(store, cell.folder, record or {"status": "failed"}):
            lost.append(cell.folder)
            store.set_aside(f"{cell.folder}/{VECTORS}")
            why = {"status": "failed", "error": "its vectors were lost"}
            record = store.keep(cell.folder, {"cell": cell.facts, **why})
        if record is not None:
            records[cell.folder] = record
    if lost:
        warn_user(
            f"{store.out}: the vectors of {told(lost)} are missing, damaged or changed; they are "
            f"searched again, and what was there is kept with {ASIDE!r} after its name"
        )
    return records


def _check_engine(
    engine: str, address: str | None, workers: int | None, threads: int | None, gpus: float | None
) -> None:
    of_ray = {"address": address, "workers": workers, "gpus": gpus}
    if engine == "local":
        for name, value in of_ray.items():
            if value is not None:
                raise ValueError(f"{name}={value}: of engine='ray'; pass that, or leave it out")
    checks.at_least(1, workers=workers, threads=threads)
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus == int(gpus))):
        raise ValueError(f"gpus={gpus}: a share of one GPU, from 0 to 1, or a whole number of them")
    if address is not None and "://" in address:
        raise ValueError(
            f"address={address!r}: expected host:port, or 'auto' on a node of the cluster; from "
            "elsewhere use ray job submit"
        )


@contextmanager
def _progress(
    cells: Sequence[Cell], todo: Sequence[Cell], shown: bool, on_progress: OnProgress | None
) -> Iterator[Callable[[Cell, float], None]]:
    """What is told of each cell, as one count of all vectors; at first, of those that are done."""
    done: dict[str, float] = {cell.folder: cell.n_vectors for cell in cells}
    total = sum(done.values())
    done |= dict.fromkeys((cell.folder for cell in todo), 0.0)
    tell_all = on_progress or (lambda *_: None)
    # Methods may tell of parts of a vector.
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} vectors [{elapsed} elapsed, {remaining} left]"
    options = {"total": total, "initial": sum(done.values()), "disable": not shown}
    with tqdm(desc="sweep", bar_format=form, **options) as bar:

        def tell(cell: Cell, there: float) -> None:
            done[cell.folder] = min(there, cell.n_vectors)
            bar.update(sum(done.values()) - bar.n)
            tell_all(sum(done.values()), total)

        tell_all(sum(done.values()), total)
        yield tell


def _write_table(store: Store, cells: Sequence[Cell], records: Records) -> Table:
    """What is known of every cell; the status of those that were not searched is "waiting"."""
    rows = []
    for cell in cells:
        record = records.get(cell.folder, {})
        measured = record.get("row", {})
        row = {"folder": cell.folder, "status": record.get("status", "waiting")}
        row |= {name: record.get(name) or None for name in ("error", "warnings")}
        row |= cell.columns() | {name: measured.get(name) for name in _MEASURED}
        radius = measured.get("radius") or row.get("radius")
        # "auto" is none: what came out is not known.
        row["radius"] = float(radius) if isinstance(radius, int | float) else None
        rows.append(row | {"seconds": record.get("seconds")})
    options = dict.fromkeys(name for row in rows for name in row if name not in _MEASURED)
    table = Table({name: [row.get(name) for row in rows] for name in (*options, *_MEASURED)})
    table = table.astype({name: _kind(name, rows) for name in table.columns})
    store.write(TABLE, table.to_parquet(index=False))
    return table


def _kind(name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The narrowest type that all values of a column have; Parquet wants one."""
    if name in _MEASURED or name == "radius":
        return _MEASURED.get(name, "Float64")
    values = [row[name] for row in rows if row.get(name) is not None]
    kind = pd.array(values or [""]).dtype
    return kind if kind.name in ("boolean", "Int64", "Float64") else "string"


def _write_page(store: Store, table: Table, records: Records) -> None:
    from tl_melbo.sweeps._page import render  # plotly takes long to import

    store.write(PAGE, render(table, records).encode(errors="backslashreplace"))
