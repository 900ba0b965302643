"""`tl-melbo sweep`: a file of searches to run folders, a table and a page."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Exit, echo

from tl_melbo import sweeps, terminal
from tl_melbo.sweeps._grid import cells_of, read_grid
from tl_melbo.sweeps._sweep import PAGE
from tl_melbo.terminal import Device, option


def sweep(
    grid: Annotated[Path, Argument(help="YAML: options with their values, or a list of such.")],
    out: Annotated[str, option("Folder for the results, or an fsspec URL.")],
    engine: Annotated[Literal["local", "ray"], option("Here, or on a Ray cluster.")] = "local",
    address: Annotated[
        str | None,
        option("Of the cluster: host:port, or auto.", "RAY_ADDRESS, or none"),
    ] = None,
    workers: Annotated[int | None, option("How many, with Ray.", "as many as fit")] = None,
    threads: Annotated[int | None, option("Of each worker.", "torch's own; 1 with Ray")] = None,
    gpus: Annotated[float | None, option("Of each worker, with Ray: 0.25.", "1 if any")] = None,
    device: Device = None,
) -> None:
    """Search with every combination of a grid's options, in a run folder each.

    Writes the folders, sweep.parquet and sweep.html; prints the path of the latter last. Every
    vector is kept as soon as it is found, and the same command goes on. If a search failed, the
    exit code is 1: its row says why, and the same command tries it again.
    """
    searches = read_grid(grid.expanduser())
    cells_of(searches)  # a mistake in the file is told without a bar over it
    with terminal.Stages() as stages:
        stages.begin("Searching")
        table = sweeps.sweep(
            searches, out, engine=engine, address=address, workers=workers, threads=threads,
            gpus=gpus, device=device, on_progress=stages.count,
        )  # fmt: skip
        stages.end()
    terminal.print_sweep(table)
    page = f"{out.rstrip('/')}/{PAGE}"
    echo(page if "://" in out else str(Path(page).expanduser().resolve()))
    if n_failed := [*table["status"]].count("failed"):
        terminal.say(f"{terminal.counted(n_failed, 'search')} of {len(table)} failed.")
        raise Exit(1)
