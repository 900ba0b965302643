"""The same from a shell: `tl-melbo discover "Tell me about yourself." --out runs/me`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from typer import Argument, Option

import tl_melbo as tm
from tl_melbo import checks, cli_adapters, cli_atlas, options, sweeps, terminal
from tl_melbo.model.tokens import check_room, to_tokens
from tl_melbo.run import VECTORS, absolute, family_folder
from tl_melbo.sweeps._grid import cells_of, read_grid
from tl_melbo.sweeps._sweep import PAGE
from tl_melbo.terminal import option

# Options that several commands have.
_Folder = Annotated[Path, Argument(help="The folder that `discover` wrote.")]
_Model = Annotated[str | None, option("Hub id, folder or .gguf file.", "as for discover")]
_SideEffects = Annotated[bool, option("Measure effects on other prompts and prose.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find steering vectors of a language model without supervision, and look at what they do.",
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, Option("--version", help="Show it.")] = False) -> None:
    if version:
        typer.echo(f"tl-melbo {tm.__version__}")
        raise typer.Exit


@app.command(cls=terminal.Command)
def discover(
    prompts: terminal.Prompts,
    out: terminal.Out,
    method: Annotated[str, option("How to search: melbo, or another of tl_melbo's.")] = "melbo",
    settings: Annotated[
        list[str] | None, Option("--set", metavar="NAME=VALUE", help="Any setting of the method.")
    ] = None,
    other: Annotated[
        list[str] | None, option("For contrastive: a prompt without the behaviour; repeatable.")
    ] = None,
    n_vectors: Annotated[int | None, option("How many vectors to find.", "32 for melbo")] = None,
    radius: Annotated[str | None, option("Their norm, or 'auto'.", "the method's own")] = None,
    model: terminal.BundledModel = None,
    source_layer: Annotated[int, option("Add the vectors after this block.")] = 8,
    target_layer: Annotated[int, option("Measure their effect after this one.")] = 16,
    positions: Annotated[
        str | None, option("Tokens to measure at: 'start:stop'.", "the method's own")
    ] = None,
    p: Annotated[float | None, option("Power of the norm in the objective.", "2")] = None,
    q: Annotated[float | None, option("Its root.", "p")] = None,
    norm: Annotated[Literal["l2", "lp"] | None, option("Over the residual stream.", "l2")] = None,
    orthogonal: Annotated[
        bool | None,
        option("Each orthogonal to those before.", "orthogonal", "--orthogonal/--independent"),
    ] = None,
    optimiser: Annotated[
        Literal["ascent", "adamw"] | None, option("Fast, or as published.", "ascent")
    ] = None,
    steps: Annotated[int | None, option("Of the optimiser.", "10 ascent, 300 adamw")] = None,
    seed: Annotated[int | None, option("Of the random starts.", "0")] = None,
    chat: terminal.Chat = True,
    max_new_tokens: terminal.MaxNewTokens = 50,
    samples: terminal.Samples = None,
    temperature: terminal.Temperature = None,
    scales: terminal.Scales = None,
    device: terminal.Device = None,
    dtype: terminal.Dtype = "float32",
    side_effects: _SideEffects = False,
    overwrite: Annotated[bool, option("Replace an earlier run in --out.")] = False,
) -> None:
    """Find vectors that change the model most, let it write under each, and make a page of it.

    Writes vectors.safetensors, completions.csv, those of random vectors, and report.html; prints
    the page's path last. Every vector is kept as soon as it is found, and the same command
    continues an interrupted run.
    """
    # All that can be checked before the model is loaded, which takes a while.
    texts = _texts_asked(max_new_tokens, samples, temperature, scales)
    checks.as_texts(prompts)
    if not 0 <= source_layer < target_layer:
        raise ValueError(
            f"source_layer={source_layer}, target_layer={target_layer}: the source comes "
            "before the target, and the first layer is 0"
        )
    search = options.method_named(method)
    flags = {
        "n_vectors": n_vectors, "radius": radius, "positions": positions, "p": p, "q": q,
        "norm": norm, "orthogonal": orthogonal, "optimiser": optimiser, "steps": steps,
        "seed": seed,
    }  # fmt: skip
    asked = options.asked(search, flags, settings or (), other or ())
    place = {"source_layer": source_layer, "target_layer": target_layer, "chat": chat}
    story = {**asked.story, **place, "prompts": prompts, "dtype": dtype}
    run, name, known = tm.Run(out), absolute(model), 0
    with _session(run, run.folder) as stages:
        if not overwrite:
            run.check(side_effects=side_effects)
            known = run.check_same({**story, "model": name})
        _say_what_is_there(run.folder, known, asked.n_vectors)
        stages.begin("Loading the model")
        loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
        f = tm.ActivationMap.from_prompts(loaded, prompts, **place)
        check_room(loaded, [to_tokens(loaded, each, chat) for each in prompts], max_new_tokens)
        chosen = {**asked.settings, "overwrite": overwrite}
        if asked.other:
            chosen["other"] = tm.ActivationMap.from_prompts(loaded, asked.other, **place)
        stages.begin("Finding vectors")

        def count(there: int, wanted: int | None) -> None:
            if there:  # whose vectors these are
                run.note(command="discover", model=name)
            stages.count(there, wanted)

        watch = {"on_vector": count, "on_share": lambda share: stages.count(share, 1)}
        found = run.keep(search, f, max(asked.n_vectors, known), **watch, **chosen)
        if "calibration" in found.story:
            terminal.say(f"Radius {found.story['hyperparameters']['radius']:g}, calibrated.")
        # What was measured once is measured of the vectors that came since, too.
        if side_effects or run.settings.get("side_effects_of"):
            stages.begin("Measuring side effects")
            run.side_effects(loaded, overwrite=overwrite, on_text=stages.count)
        _show_page(run, loaded, f, stages, **texts, overwrite=overwrite)


@app.command(cls=terminal.Command)
def ortho(
    folder: _Folder,
    vector: Annotated[int, option("Number of the vector that the others shall follow.")],
    n_vectors: Annotated[int | None, option("How many, with those that are there.", "100")] = None,
    everything: Annotated[bool, Option("--all", help="Until the space is used up.")] = False,
    norm_penalty: Annotated[float, option("Weight of the squared norm.")] = 0.0,
    optimiser: Annotated[
        Literal["quasi-newton", "adam"], option("Fast, or as published.")
    ] = "quasi-newton",
    steps: Annotated[int | None, option("Of the optimiser.", "40 quasi-newton, 1000 adam")] = None,
    model: _Model = None,
    max_new_tokens: terminal.MaxNewTokens = 50,
    device: terminal.Device = None,
    overwrite: Annotated[bool, option("Begin this vector's family anew.")] = False,
) -> None:
    """Find many vectors that do what one does, all orthogonal, and ask whether they are the same.

    Writes to FOLDER/ortho-VECTOR and extends the page in FOLDER; prints its path last. Every vector
    is kept as soon as it is found, and the same command continues an interrupted run.
    """
    checks.at_least(1, max_new_tokens=max_new_tokens)
    run, known = tm.Run(folder), 0
    theta0 = _numbered(run, vector)
    room = theta0.vectors.shape[1] - 1
    wanted = _family_size(n_vectors, everything, room)
    flags = {"n_vectors": wanted, "norm_penalty": norm_penalty, "optimiser": optimiser}
    asked = options.asked(tm.melbo_ortho, flags | {"steps": steps}, theta0=theta0)
    place = family_folder(run.folder, vector)
    # What is there is read under the lock, too: another process may have just added to it.
    with _session(run, place) as stages:
        run.check(without=vector if overwrite else None)
        if not overwrite:
            known = run.check_same(asked.story, theta0)
        _say_what_is_there(place, known, wanted)
        stages.begin("Loading the model")
        loaded, f = run.load(model, device)
        stages.begin(f"Following vector {vector}")
        size = None if everything and known < room else max(wanted, known)
        watch = {"overwrite": overwrite, "on_vector": stages.count}
        run.keep(tm.melbo_ortho, f, size, **asked.settings, **watch)
        stages.begin("Measuring the family")
        length: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        part = run.family(loaded, f, vector, on_batch=stages.count, **length)
        _show_page(run, loaded, f, stages, part.table, **length)


app.command(cls=terminal.Command)(cli_atlas.atlas)


@app.command(cls=terminal.Command)
def page(
    folder: _Folder,
    model: _Model = None,
    max_new_tokens: Annotated[int | None, option("Of each completion.", "as it was")] = None,
    samples: Annotated[int | None, option("Sampled completions of each.", "as it was")] = None,
    temperature: Annotated[float | None, option("Of the samples.", "as it was, or 0.7")] = None,
    scales: terminal.Scales = None,
    divergence: Annotated[bool, option("Show where along its text each vector acts.")] = False,
    side_effects: _SideEffects = False,
    device: terminal.Device = None,
    overwrite: Annotated[bool, option("Write and measure anew what is there, too.")] = False,
) -> None:
    """Make the page anew, about all that a folder holds; completions that lack are written."""
    texts = _texts_asked(max_new_tokens, samples, temperature, scales)
    run, again = tm.Run(folder), {"overwrite": overwrite}
    run.found.story  # noqa: B018  # a folder without vectors is told before it is locked
    with _session(run, run.folder) as stages:
        run.check(control=not overwrite, side_effects=side_effects and not overwrite)
        stages.begin("Loading the model")
        loaded, f = run.load(model, device)
        if side_effects:
            stages.begin("Measuring side effects")
            run.side_effects(loaded, **again, on_text=stages.count)
        _show_page(run, loaded, f, stages, **texts, **again, divergence=divergence)


app.command(cls=terminal.Command)(cli_adapters.adapters)
app.command(cls=terminal.Command)(cli_adapters.gated)


@app.command(cls=terminal.Command)
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
    device: terminal.Device = None,
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
    typer.echo(page if "://" in out else str(Path(page).expanduser().resolve()))
    if n_failed := [*table["status"]].count("failed"):
        terminal.say(f"{terminal.counted(n_failed, 'search')} of {len(table)} failed.")
        raise typer.Exit(1)


@contextmanager
def _session(run: tm.Run, place: Path) -> Iterator[terminal.Stages]:
    """The folder for this command alone; after Ctrl-C, say how many vectors `place` holds."""
    try:
        with run.writing(), terminal.Stages() as stages:
            yield stages
    except KeyboardInterrupt:
        path = place / VECTORS
        n_kept = len(tm.SteeringVectors.load(path)) if path.is_file() else 0
        kept = f"{terminal.counted(n_kept)} {'is' if n_kept == 1 else 'are'} kept in {place}"
        raise KeyboardInterrupt(f"{kept}; the same command") from None


def _show_page(
    run: tm.Run, model: Any, f: Any, stages: terminal.Stages, family: Any = None,
    divergence: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Make the page, and show its table, or that of a family; the last line is its path."""
    from tl_melbo.report import measure_shown, not_converged  # plotly takes long to import

    stages.begin("Writing under each vector")
    run.texts(model, on_batch=stages.count, **options)
    stages.begin("Writing under random ones")
    again = bool(options.get("overwrite"))
    run.random_texts(model, f, overwrite=again, on_batch=stages.count)
    stages.begin("Making the page")
    table = run.page(model, f, token_divergence=divergence, on_batch=stages.count)
    stages.end()
    stages.stop()
    if family is not None:
        terminal.print_family(family)
    else:
        terminal.print_found(table, measure_shown(run.found))
        if still := not_converged(run.found):
            terminal.say(f"{still}.")
    typer.echo(str((run.folder / "report.html").resolve()))


def _texts_asked(
    max_new_tokens: int | None, samples: int | None, temperature: float | None, scales: str | None
) -> dict[str, Any]:
    """What `Run.texts` is asked for, checked before the model is loaded."""
    checks.at_least(1, max_new_tokens=max_new_tokens, samples=samples)
    if temperature is not None:
        checks.positive(temperature=temperature)
        if samples is None:
            raise ValueError(f"temperature={temperature}: of samples; pass --samples, too")
    chosen = {"max_new_tokens": max_new_tokens, "n_samples": samples, "temperature": temperature}
    return chosen | {"scales": options.scales_asked(scales)}


def _numbered(run: tm.Run, vector: int) -> tm.SteeringVectors:
    library = run.found
    numbers = library.columns["index"].tolist()
    if vector not in numbers:
        told = f"vectors {min(numbers)} to {max(numbers)}" if numbers else "no vectors"
        raise ValueError(f"--vector={vector}: {run.folder} holds {told}")
    return library[numbers.index(vector)]


def _family_size(n_vectors: int | None, everything: bool, room: int) -> int:
    if everything and n_vectors is not None:
        raise ValueError(f"--all, n_vectors={n_vectors}: the one or the other")
    wanted = room if everything else 100 if n_vectors is None else n_vectors
    checks.between(
        1, room, "vectors orthogonal to one (--all: as many as there are)", n_vectors=wanted
    )
    return wanted


def _say_what_is_there(place: Path, known: int, wanted: int) -> None:
    if known:
        terminal.say(f"{place} holds {terminal.counted(known)} of this search.")
    if wanted < known:
        terminal.say(f"Asked for {wanted} vectors, {known} are there: all of them are shown.")
