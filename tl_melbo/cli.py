"""The same from a shell: `tl-melbo discover "Tell me about yourself." --out runs/me`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tl_melbo import asked, checks, terminal

# transformers and plotly take seconds to import; each command imports what it needs when it runs,
# so that --help answers at once.
if TYPE_CHECKING:
    from tl_melbo import Run, SteeringVectors

# Options that several commands have.
_Folder = Annotated[Path, typer.Argument(help="The folder that `discover` wrote.")]
_Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")
]
_Model = Annotated[
    str | None, typer.Option(help="Hub id, folder or .gguf file.", show_default="as for discover")
]
_MaxNewTokens = Annotated[int, typer.Option(help="Length of each completion.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find steering vectors of a language model without supervision, and look at what they do.",
)

# How many vectors a family has, if nothing else is said.
_FAMILY_SIZE = 100


def _show_version(asked: bool) -> None:
    if asked:
        from tl_melbo import __version__

        typer.echo(f"tl-melbo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def discover(
    context: typer.Context,
    prompts: Annotated[list[str], typer.Argument(help="What the model is asked; one or several.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if need be.")],
    method: Annotated[str, typer.Option(help="How to search: melbo, or another of tl_melbo's.")] = (
        "melbo"
    ),
    n_vectors: Annotated[int, typer.Option(help="How many vectors to find.")] = 32,
    radius: Annotated[
        str | None,
        typer.Option(help="Their norm, or 'auto': too small changes nothing.", show_default="auto"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or .gguf file.", show_default="the bundled SmolLM2"),
    ] = None,
    source_layer: Annotated[int, typer.Option(help="Add the vectors after this block.")] = 8,
    target_layer: Annotated[int, typer.Option(help="Measure their effect after this one.")] = 16,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Tokens to measure at, a slice of each prompt: 'start:stop'.", show_default="-3:"
        ),
    ] = None,
    p: Annotated[
        float | None, typer.Option(help="Power of the norm in the objective.", show_default="2")
    ] = None,
    q: Annotated[float | None, typer.Option(help="Its root.", show_default="p")] = None,
    norm: Annotated[
        Literal["l2", "lp"] | None,
        typer.Option(help="Norm over the residual stream.", show_default="l2"),
    ] = None,
    orthogonal: Annotated[
        bool | None,
        typer.Option(
            "--orthogonal/--independent",
            help="Each at right angles to those before.",
            show_default="orthogonal",
        ),
    ] = None,
    optimiser: Annotated[
        Literal["ascent", "adamw"] | None,
        typer.Option(help="Fast, or as published.", show_default="ascent"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of the optimiser.", show_default="10 ascent, 300 adamw")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the random starts.", show_default="0")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put prompts into the model's chat template.")] = True,
    max_new_tokens: _MaxNewTokens = 50,
    device: _Device = None,
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "float32",
    side_effects: Annotated[
        bool, typer.Option("--side-effects", help="Measure them on other prompts and prose, too.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in --out.")] = False,
) -> None:
    """Find vectors that change the model most, let it write under each, and make a page of it.

    Writes vectors.safetensors, completions.csv and report.html; prints the page's path last. Every
    vector is kept as soon as it is found, and the same command continues an interrupted run.
    """
    with terminal.messages(context):
        # All that can be checked before the model is loaded, which takes a while.
        checks.at_least(1, max_new_tokens=max_new_tokens)
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("prompts: one is empty; leave it out, or give it a word")
        if not 0 <= source_layer < target_layer:
            raise ValueError(
                f"source_layer={source_layer}, target_layer={target_layer}: the source comes "
                "before the target, and the first layer is 0"
            )
        import torch

        import tl_melbo as tm
        from tl_melbo.run import absolute

        search = asked.method(method)
        settings = asked.given(
            search, n_vectors,
            radius=asked.parse_radius(radius), positions=asked.parse_slice(positions),
            p=p, q=q, norm=norm, orthogonal=orthogonal, optimiser=optimiser, steps=steps, seed=seed,
        )  # fmt: skip
        place = {"source_layer": source_layer, "target_layer": target_layer, "chat": chat}
        run, name = tm.Run(out), absolute(model)
        with _session(run) as progress:
            known = 0
            if not overwrite:
                run.check(side_effects=side_effects)
                story = {"prompts": list(prompts), "dtype": dtype, **place}
                known = run.check_same({**story, **asked.story(search, settings)}, model=name)
            _say_what_is_there(run.folder, known, n_vectors)
            progress.start("Loading the model")
            loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
            f = tm.ActivationMap.from_prompts(loaded, prompts, **place)
            progress.start("Finding vectors")

            def kept(there: int, wanted: int | None) -> None:
                if there:  # whose vectors these are
                    run.note(command="discover", model=name)
                progress.update(there, wanted)

            options = {"overwrite": overwrite, "on_vector": kept}
            found = run.keep(search, f, max(n_vectors, known), **options, **settings)
            _say_radius(found)
            # What was measured once is measured of the vectors that came since, too.
            if side_effects or "side_effects_of" in run.settings:
                progress.start("Measuring side effects")
                run.side_effects(loaded, overwrite=overwrite, on_text=progress.update)
            _show_page(run, loaded, f, progress, max_new_tokens, overwrite)


@app.command()
def ortho(
    context: typer.Context,
    folder: _Folder,
    vector: Annotated[int, typer.Option(help="Number of the vector that the others shall follow.")],
    n_vectors: Annotated[
        int | None,
        typer.Option(
            help="How many in all; those that are there already count.", show_default="100"
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Until the space is used up, instead of --n-vectors.")
    ] = False,
    norm_penalty: Annotated[
        float, typer.Option(help="Weight of the squared norm: more asks for shorter vectors.")
    ] = 0.0,
    optimiser: Annotated[
        Literal["quasi-newton", "adam"], typer.Option(help="Fast, or as published.")
    ] = "quasi-newton",
    steps: Annotated[
        int | None,
        typer.Option(help="Gradients for each.", show_default="40 quasi-newton, 1000 adam"),
    ] = None,
    model: _Model = None,
    max_new_tokens: _MaxNewTokens = 50,
    device: _Device = None,
    overwrite: Annotated[bool, typer.Option(help="Begin this vector's family anew.")] = False,
) -> None:
    """Find many vectors that do what one does, all orthogonal, and ask whether they are the same.

    Writes to FOLDER/ortho-VECTOR and extends the page in FOLDER; prints its path last. Every vector
    is kept as soon as it is found, and the same command continues an interrupted run.
    """
    with terminal.messages(context):
        checks.at_least(1, max_new_tokens=max_new_tokens)
        import tl_melbo as tm
        from tl_melbo.run import family_folder

        run = tm.Run(folder)
        theta0 = _numbered(run, vector)
        room = theta0.vectors.shape[1] - 1
        wanted = _family_size(n_vectors, everything, room)
        options = {"norm_penalty": norm_penalty, "optimiser": optimiser, "steps": steps}
        settings = asked.given(tm.melbo_ortho, wanted, theta0=theta0, **options)
        place = family_folder(run.folder, vector)
        # What is there is read under the lock, too: another process may have just added to it.
        with _session(run, place) as progress:
            run.check()
            known = 0
            if not overwrite:
                known = run.check_same(asked.story(tm.melbo_ortho, settings), theta0)
            _say_what_is_there(place, known, wanted)
            progress.start("Loading the model")
            loaded, f = run.load(model, device)
            progress.start(f"Following vector {vector}")
            run.keep(
                tm.melbo_ortho, f, None if everything and known < room else max(wanted, known),
                overwrite=overwrite, on_vector=progress.update, **settings,
            )  # fmt: skip
            progress.start("Measuring the family")
            part = run.family(
                loaded, f, vector, max_new_tokens=max_new_tokens, on_batch=progress.update
            )
            _show_page(run, loaded, f, progress, max_new_tokens, family=part.table)


@app.command()
def measure(
    context: typer.Context,
    folder: _Folder,
    model: _Model = None,
    device: _Device = None,
    overwrite: Annotated[bool, typer.Option(help="Measure anew what is there.")] = False,
) -> None:
    """Measure what each vector does on other prompts and to prose, and show it on the page."""
    with terminal.messages(context):
        import tl_melbo as tm

        run = tm.Run(folder)
        run.found.story  # noqa: B018  # a folder without vectors is told before it is locked
        with _session(run) as progress:
            run.check(side_effects=not overwrite)
            progress.start("Loading the model")
            loaded, f = run.load(model, device)
            progress.start("Measuring side effects")
            run.side_effects(loaded, overwrite=overwrite, on_text=progress.update)
            _show_page(run, loaded, f, progress)


@app.command()
def page(
    context: typer.Context,
    folder: _Folder,
    model: _Model = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length of each completion.", show_default="as it was")
    ] = None,
    device: _Device = None,
    overwrite: Annotated[bool, typer.Option(help="Write the completions anew, too.")] = False,
) -> None:
    """Make the page anew, about all that a folder holds; completions that lack are written."""
    with terminal.messages(context):
        checks.at_least(1, max_new_tokens=max_new_tokens)
        import tl_melbo as tm

        run = tm.Run(folder)
        run.found.story  # noqa: B018
        with _session(run) as progress:
            run.check()
            progress.start("Loading the model")
            loaded, f = run.load(model, device)
            _show_page(run, loaded, f, progress, max_new_tokens, overwrite)


@contextmanager
def _session(run: "Run", place: Path | None = None) -> Iterator[terminal.Progress]:
    """The folder for this command alone, and the stages of its work on the screen."""
    with (
        run.writing(),
        terminal.telling_what_is_kept(run.folder if place is None else place),
        terminal.progress() as progress,
    ):
        yield progress


def _show_page(
    run: "Run",
    model: Any,
    f: Any,
    progress: terminal.Progress,
    max_new_tokens: int | None = None,
    overwrite: bool = False,
    family: Any = None,
) -> None:
    """Make the page, and show its table, or that of a family; the last line is its path."""
    from tl_melbo.report import measure_shown, not_converged

    progress.start("Writing under each vector")
    run.texts(model, max_new_tokens=max_new_tokens, overwrite=overwrite, on_batch=progress.update)
    progress.start("Making the page")
    table = run.page(model, f, max_new_tokens=max_new_tokens)
    progress.close()
    if family is None:
        terminal.print_found(table, measure_shown(run.found))
    else:
        terminal.print_family(family)
    still = not_converged(run.found)
    if still and family is None:
        terminal.say(f"{still}.")
    typer.echo(str((run.folder / "report.html").resolve()))


def _numbered(run: "Run", vector: int) -> "SteeringVectors":
    """The vector of the run's library with that number."""
    library = run.found
    numbers = library.columns["index"].tolist()
    if vector not in numbers:
        raise ValueError(
            f"--vector={vector}: {run.folder} holds vectors {min(numbers)} to {max(numbers)}"
            if numbers
            else f"{run.folder}: holds a library without vectors"
        )
    return library[numbers.index(vector)]


def _family_size(n_vectors: int | None, everything: bool, room: int) -> int:
    if everything and n_vectors is not None:
        raise ValueError(f"--all, n_vectors={n_vectors}: the one or the other")
    wanted = room if everything else _FAMILY_SIZE if n_vectors is None else n_vectors
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


def _say_radius(found: "SteeringVectors") -> None:
    if "calibration" in found.story:
        terminal.say(f"Radius {found.story['hyperparameters']['radius']:g}, calibrated.")
