"""The same from a shell: `tl-melbo discover "Tell me about yourself." --out runs/me`."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from typer import Argument, Option

import tl_melbo as tm
from tl_melbo import checks, cli_adapters, terminal
from tl_melbo.discovery import Method
from tl_melbo.run import VECTORS, absolute, family_folder
from tl_melbo.story import slice_to_json


def _option(text: str, default: str | None = None, *names: str) -> Any:
    """An option; `default` is what is shown where the method decides."""
    return Option(*names, help=text, show_default=default or True)


# Options that several commands have.
_Folder = Annotated[Path, Argument(help="The folder that `discover` wrote.")]
_Device = Annotated[str | None, _option("cpu, cuda, ...", "a GPU if there is one")]
_Model = Annotated[str | None, _option("Hub id, folder or .gguf file.", "as for discover")]
_MaxNewTokens = Annotated[int, _option("Length of each completion.")]

# Arguments of a method that are no options of a command.
_OWN = ("f", "n_vectors", "previous", "progress", "on_step")

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
    prompts: Annotated[list[str], Argument(help="What the model is asked; one or several.")],
    out: Annotated[Path, _option("Folder for the results; made if need be.")],
    method: Annotated[str, _option("How to search: melbo, or another of tl_melbo's.")] = "melbo",
    n_vectors: Annotated[int, _option("How many vectors to find.")] = 32,
    radius: Annotated[str | None, _option("Their norm, or 'auto'.", "auto")] = None,
    model: Annotated[str | None, _option("Hub id, folder or .gguf file.", "bundled")] = None,
    source_layer: Annotated[int, _option("Add the vectors after this block.")] = 8,
    target_layer: Annotated[int, _option("Measure their effect after this one.")] = 16,
    positions: Annotated[str | None, _option("Tokens to measure at: 'start:stop'.", "-3:")] = None,
    p: Annotated[float | None, _option("Power of the norm in the objective.", "2")] = None,
    q: Annotated[float | None, _option("Its root.", "p")] = None,
    norm: Annotated[Literal["l2", "lp"] | None, _option("Over the residual stream.", "l2")] = None,
    orthogonal: Annotated[
        bool | None,
        _option("Each orthogonal to those before.", "orthogonal", "--orthogonal/--independent"),
    ] = None,
    optimiser: Annotated[
        Literal["ascent", "adamw"] | None, _option("Fast, or as published.", "ascent")
    ] = None,
    steps: Annotated[int | None, _option("Of the optimiser.", "10 ascent, 300 adamw")] = None,
    seed: Annotated[int | None, _option("Of the random starts.", "0")] = None,
    chat: Annotated[bool, _option("Put prompts into the model's chat template.")] = True,
    max_new_tokens: _MaxNewTokens = 50,
    device: _Device = None,
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"], _option("Of the weights.")
    ] = "float32",
    side_effects: Annotated[bool, _option("Measure effects on other prompts and prose.")] = False,
    overwrite: Annotated[bool, _option("Replace an earlier run in --out.")] = False,
) -> None:
    """Find vectors that change the model most, let it write under each, and make a page of it.

    Writes vectors.safetensors, completions.csv and report.html; prints the page's path last. Every
    vector is kept as soon as it is found, and the same command continues an interrupted run.
    """
    # All that can be checked before the model is loaded, which takes a while.
    checks.at_least(1, max_new_tokens=max_new_tokens)
    checks.as_texts(prompts)
    if not 0 <= source_layer < target_layer:
        raise ValueError(
            f"source_layer={source_layer}, target_layer={target_layer}: the source comes "
            "before the target, and the first layer is 0"
        )
    search = _method(method)
    settings, story = _asked(
        search, n_vectors, radius=_radius(radius), positions=_slice(positions), p=p, q=q,
        norm=norm, orthogonal=orthogonal, optimiser=optimiser, steps=steps, seed=seed,
    )  # fmt: skip
    place = {"source_layer": source_layer, "target_layer": target_layer, "chat": chat}
    story |= {"prompts": prompts, "dtype": dtype}
    run, name, known = tm.Run(out), absolute(model), 0
    with _session(run, run.folder) as stages:
        if not overwrite:
            run.check(side_effects=side_effects)
            known = run.check_same({**story, **place, "model": name})
        _say_what_is_there(run.folder, known, n_vectors)
        stages.begin("Loading the model")
        loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
        f = tm.ActivationMap.from_prompts(loaded, prompts, **place)
        stages.begin("Finding vectors")

        def count(there: int, wanted: int | None) -> None:
            if there:  # whose vectors these are
                run.note(command="discover", model=name)
            stages.count(there, wanted)

        settings |= {"overwrite": overwrite, "on_vector": count}
        found = run.keep(search, f, max(n_vectors, known), **settings)
        if "calibration" in found.story:
            radius = f"{found.story['hyperparameters']['radius']:g}"
            terminal.say(f"Radius {radius}, calibrated.")
        # What was measured once is measured of the vectors that came since, too.
        if side_effects or run.settings.get("side_effects_of"):
            stages.begin("Measuring side effects")
            run.side_effects(loaded, overwrite=overwrite, on_text=stages.count)
        _show_page(run, loaded, f, stages, max_new_tokens=max_new_tokens, overwrite=overwrite)


@app.command(cls=terminal.Command)
def ortho(
    folder: _Folder,
    vector: Annotated[int, _option("Number of the vector that the others shall follow.")],
    n_vectors: Annotated[int | None, _option("How many, with those that are there.", "100")] = None,
    everything: Annotated[bool, Option("--all", help="Until the space is used up.")] = False,
    norm_penalty: Annotated[float, _option("Weight of the squared norm.")] = 0.0,
    optimiser: Annotated[
        Literal["quasi-newton", "adam"], _option("Fast, or as published.")
    ] = "quasi-newton",
    steps: Annotated[int | None, _option("Of the optimiser.", "40 quasi-newton, 1000 adam")] = None,
    model: _Model = None,
    max_new_tokens: _MaxNewTokens = 50,
    device: _Device = None,
    overwrite: Annotated[bool, _option("Begin this vector's family anew.")] = False,
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
    settings, story = _asked(
        tm.melbo_ortho, wanted,
        theta0=theta0, norm_penalty=norm_penalty, optimiser=optimiser, steps=steps,
    )  # fmt: skip
    place = family_folder(run.folder, vector)
    # What is there is read under the lock, too: another process may have just added to it.
    with _session(run, place) as stages:
        run.check(without=vector if overwrite else None)
        if not overwrite:
            known = run.check_same(story, theta0)
        _say_what_is_there(place, known, wanted)
        stages.begin("Loading the model")
        loaded, f = run.load(model, device)
        stages.begin(f"Following vector {vector}")
        size = None if everything and known < room else max(wanted, known)
        settings |= {"overwrite": overwrite, "on_vector": stages.count}
        run.keep(tm.melbo_ortho, f, size, **settings)
        stages.begin("Measuring the family")
        length: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        part = run.family(loaded, f, vector, on_batch=stages.count, **length)
        _show_page(run, loaded, f, stages, part.table, **length)


@app.command(cls=terminal.Command)
def measure(
    folder: _Folder,
    model: _Model = None,
    device: _Device = None,
    overwrite: Annotated[bool, _option("Measure anew what is there.")] = False,
) -> None:
    """Measure what each vector does on other prompts and to prose, and show it on the page."""
    with _opened(folder, model, device, not overwrite) as (run, loaded, f, stages):
        stages.begin("Measuring side effects")
        run.side_effects(loaded, overwrite=overwrite, on_text=stages.count)
        _show_page(run, loaded, f, stages)


@app.command(cls=terminal.Command)
def page(
    folder: _Folder,
    model: _Model = None,
    max_new_tokens: Annotated[int | None, _option("Of each completion.", "as it was")] = None,
    device: _Device = None,
    overwrite: Annotated[bool, _option("Write the completions anew, too.")] = False,
) -> None:
    """Make the page anew, about all that a folder holds; completions that lack are written."""
    checks.at_least(1, max_new_tokens=max_new_tokens)
    with _opened(folder, model, device) as (run, loaded, f, stages):
        _show_page(run, loaded, f, stages, max_new_tokens=max_new_tokens, overwrite=overwrite)


app.command(cls=terminal.Command)(cli_adapters.adapters)


@contextmanager
def _opened(
    folder: Path, model: str | None, device: str | None, side_effects: bool = False
) -> Iterator[tuple[Any, ...]]:
    """A folder that holds vectors already, their model and map, and the stages of the work."""
    run = tm.Run(folder)
    run.found.story  # noqa: B018  # a folder without vectors is told before it is locked
    with _session(run, run.folder) as stages:
        run.check(side_effects=side_effects)
        stages.begin("Loading the model")
        yield run, *run.load(model, device), stages


@contextmanager
def _session(run: tm.Run, place: Path) -> Iterator[terminal.Stages]:
    """The folder for this command alone; after Ctrl-C, say which vectors are saved in `place`."""
    try:
        with run.writing(), terminal.Stages() as stages:
            yield stages
    except KeyboardInterrupt:
        path = place / VECTORS
        n_kept = len(tm.SteeringVectors.load(path)) if path.is_file() else 0
        kept = f"{terminal.counted(n_kept)} {'is' if n_kept == 1 else 'are'} kept in {place}"
        what = f"{kept}; the same command continues" if n_kept else "nothing was finished"
        raise KeyboardInterrupt(f"; {what}") from None


def _show_page(
    run: tm.Run, model: Any, f: Any, stages: terminal.Stages, family: Any = None, **options: Any
) -> None:
    """Make the page, and show its table, or that of a family; the last line is its path."""
    from tl_melbo.report import measure_shown, not_converged  # plotly takes long to import

    stages.begin("Writing under each vector")
    run.texts(model, on_batch=stages.count, **options)
    stages.begin("Making the page")
    table = run.page(model, f)
    stages.end()
    stages.stop()
    if family is not None:
        terminal.print_family(family)
    else:
        terminal.print_found(table, measure_shown(run.found))
        if still := not_converged(run.found):
            terminal.say(f"{still}.")
    typer.echo(str((run.folder / "report.html").resolve()))


def _method(name: str) -> Method:
    known = {n: value for n, value in vars(tm).items() if isinstance(value, Method)}
    if name not in known:
        raise ValueError(f"--method={name!r}: known are {', '.join(sorted(known))}")
    return known[name]


def _asked(method: Method, n_vectors: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that were given, checked, and what the metadata will say, as far as is known."""
    given = {name: value for name, value in options.items() if value is not None}
    called = f"--method {method.__name__}"
    checks.argument_names(called, given, method, _OWN)
    signature = inspect.signature(method)
    bound = signature.bind_partial(**given)
    bound.apply_defaults()
    values = {**bound.arguments, "n_vectors": n_vectors}
    for name in signature.parameters:
        if name not in (*values, *_OWN):
            command = "use tl-melbo ortho" if name == "theta0" else "use it in Python"
            raise ValueError(f"{called}: needs {name}; {command}")
    if check := getattr(method, "check", None):
        names = inspect.signature(check).parameters
        check(**{name: values[name] for name in names if name in values})
    chosen = {
        name: slice_to_json(value) if isinstance(value, slice) else value
        for name, value in values.items()
        if value is not None and name not in (*_OWN, "theta0")
    }
    seed = chosen.pop("seed", None)
    return given, {"method": method.__name__, "seed": seed, "hyperparameters": chosen}


def _slice(text: str | None) -> slice | None:
    """Read 'start:stop'; either may be missing."""
    if text is None:
        return None
    try:
        start, stop = (int(part) if part.strip() else None for part in text.split(":"))
    except ValueError as error:
        raise ValueError(
            f"--positions={text!r}: expected start:stop, such as '-3:' for the last three tokens, "
            "or ':' for all"
        ) from error
    return slice(start, stop)


def _radius(text: str | None) -> float | str | None:
    """Read a number or 'auto'."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--radius={text!r}: expected a number, such as 12, or 'auto'") from error


def _numbered(run: tm.Run, vector: int) -> tm.SteeringVectors:
    """The vector of the run's library with that number."""
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
    if not 1 <= wanted <= room:
        raise ValueError(
            f"n_vectors={wanted}: from 1 to {room}, which is all that can be orthogonal to one "
            "vector; --all goes on until nothing is left"
        )
    return wanted


def _say_what_is_there(place: Path, known: int, wanted: int) -> None:
    if known:
        terminal.say(f"{place} holds {terminal.counted(known)} of this search.")
    if wanted < known:
        terminal.say(f"Asked for {wanted} vectors, {known} are there: all of them are shown.")
