"""The same from a shell: `tl-melbo discover "Tell me about yourself." --out runs/me`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tl_melbo import terminal

# torch and transformers take seconds to import; each command imports what it needs when it runs,
# so that --help answers at once.
if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo import ActivationMap, Run, SteeringVectors
    from tl_melbo.analysis._family import Family
    from tl_melbo.discovery import OrthoStep, Step
    from tl_melbo.discovery._melbo import Radius
    from tl_melbo.model.bridge import Model

# Options that several commands have.
_Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")
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
    n_vectors: Annotated[int, typer.Option(help="How many vectors to find.")] = 32,
    radius: Annotated[
        str, typer.Option(help="Their norm, or 'auto': too small changes nothing.")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or .gguf file.", show_default="the embedded SmolLM2"),
    ] = None,
    source_layer: Annotated[int, typer.Option(help="Add the vectors after this block.")] = 8,
    target_layer: Annotated[int, typer.Option(help="Measure their effect after this one.")] = 16,
    positions: Annotated[
        str, typer.Option(help="Tokens to measure at, a slice of each prompt: 'start:stop'.")
    ] = "-3:",
    p: Annotated[float, typer.Option(help="Power of the norm in the objective.")] = 2.0,
    q: Annotated[float | None, typer.Option(help="Its root.", show_default="p")] = None,
    norm: Annotated[
        Literal["l2", "lp"], typer.Option(help="Norm over the residual stream.")
    ] = "l2",
    orthogonal: Annotated[
        bool,
        typer.Option("--orthogonal/--independent", help="Each at right angles to those before."),
    ] = True,
    optimiser: Annotated[
        Literal["ascent", "adamw"], typer.Option(help="Fast, or as published.")
    ] = "ascent",
    steps: Annotated[
        int | None, typer.Option(help="Of the optimiser.", show_default="10 ascent, 300 adamw")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random starts.")] = 0,
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
        _check_max_new_tokens(max_new_tokens)
        searched, length = _parse_slice(positions), _parse_radius(radius)
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
        from tl_melbo import runs
        from tl_melbo.discovery._melbo import DEFAULT_STEPS, check_settings
        from tl_melbo.report._tables import measure_shown, not_converged

        check_settings(n_vectors, length, p, q, steps, seed)
        asked = {
            "prompts": list(prompts), "source_layer": source_layer, "target_layer": target_layer,
            "seed": seed, "dtype": dtype, "radius": length, "p": p, "q": p if q is None else q,
            "norm": norm, "positions": [searched.start, searched.stop, searched.step],
            "orthogonal": orthogonal, "optimiser": optimiser,
            "steps": DEFAULT_STEPS[optimiser] if steps is None else steps,
        }  # fmt: skip
        with (
            _run_folder(out, overwrite, asked, model) as (run, known),
            terminal.progress() as progress,
        ):
            folder = run.folder
            if not overwrite:
                runs.check_side_effects(folder, to_be_measured=side_effects)
            progress.start("Loading the model")
            loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
            f = tm.ActivationMap.from_prompts(
                loaded, prompts, source_layer=source_layer, target_layer=target_layer, chat=chat
            )
            progress.start("Finding vectors")
            _say_if_more(n_vectors, known)
            n_vectors = max(n_vectors, known)
            settings = {"command": "discover", "model": _absolute(model)}

            def begin(there: int, _: int | None) -> None:
                """With the first vector, say which model the folder's vectors are of."""
                if there and overwrite:
                    runs.drop_side_effects(folder)  # of the earlier vectors
                if there and runs.load_settings(folder).get("model", _UNKNOWN) != settings["model"]:
                    runs.save_settings(folder, settings)

            found = run.melbo(
                f,
                n_vectors=n_vectors,
                radius=length,
                p=p,
                q=q,
                positions=searched,
                orthogonal=orthogonal,
                seed=seed,
                optimiser=optimiser,
                steps=steps,
                norm=norm,
                overwrite=overwrite,
                on_vector=begin,
                on_step=lambda step: progress.update(*_work_done(step, n_vectors)),
            )
            if length == "auto":
                line = f"Radius {found.story['hyperparameters']['radius']:g}, calibrated."
                terminal.say(line)
            # What was measured once is measured of the vectors that came since, too.
            measured_before = "side_effects_of" in runs.load_settings(folder)
            if (side_effects or measured_before) and runs.load_side_effects(folder, found) is None:
                progress.start("Measuring side effects")
                measured = tm.evaluation.side_effects(
                    loaded, found, list(dict.fromkeys(prompts)), on_text=progress.update
                )
                runs.save_side_effects(folder, found, measured)
            table = _write_page(progress, folder, loaded, f, found, max_new_tokens, anew=overwrite)
        _print_found(table, measure_shown(found))
        if not_converged(found):
            terminal.say(f"{not_converged(found)}.")
        typer.echo(str((folder / runs.REPORT).resolve()))


@app.command()
def ortho(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The folder that `discover` wrote.")],
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
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or .gguf file.", show_default="as for discover"),
    ] = None,
    max_new_tokens: _MaxNewTokens = 50,
    device: _Device = None,
    overwrite: Annotated[bool, typer.Option(help="Begin this vector's family anew.")] = False,
) -> None:
    """Find many vectors that do what one does, all orthogonal, and ask whether they are the same.

    Writes to FOLDER/ortho-VECTOR and extends the page in FOLDER; prints its path last. Every vector
    is kept as soon as it is found, and the same command continues an interrupted run.
    """
    with terminal.messages(context):
        _check_max_new_tokens(max_new_tokens)

        if everything and n_vectors is not None:
            raise ValueError(f"--all, n_vectors={n_vectors}: the one or the other")

        import tl_melbo as tm
        from tl_melbo import runs
        from tl_melbo.discovery._melbo_ortho import DEFAULT_ORTHO_STEPS, check_ortho_settings
        from tl_melbo.run import check_reference

        check_ortho_settings(norm_penalty, steps)
        folder = folder.expanduser()
        library, theta0 = _library_and_vector(folder, vector)
        room = library.vectors.shape[1] - 1
        wanted = room if everything else _FAMILY_SIZE if n_vectors is None else n_vectors
        if not 1 <= wanted <= room:
            raise ValueError(
                f"n_vectors={wanted}: from 1 to {room}, which is all that can be orthogonal to "
                "one vector; --all goes on until nothing is left"
            )
        asked = {
            "optimiser": optimiser,
            "steps": DEFAULT_ORTHO_STEPS[optimiser] if steps is None else steps,
            "norm_penalty": norm_penalty,
        }
        known_model = runs.load_settings(folder).get("model", _UNKNOWN)
        if model is not None and known_model not in (_UNKNOWN, _absolute(model)):
            raise ValueError(
                f"model={model}: the vectors in {folder} are of {_called(known_model)}; leave "
                "--model out"
            )
        run, place = tm.Run(folder), runs.family_folder(folder, vector)
        # What is there is read under the lock, too: another process may have just added to it.
        with run.writing(), terminal.telling_what_is_kept(place), terminal.progress() as progress:
            known = 0
            if (place / runs.VECTORS).is_file() and not overwrite:
                previous = tm.SteeringVectors.load(place / runs.VECTORS)
                check_reference(place, theta0)
                _check_continues(
                    place, previous, {**asked, "method": "melbo_ortho"},
                    advice="continue them, or pass --overwrite to replace them",
                )  # fmt: skip
                known = len(previous)
            # What the page needs, too: a damaged file is to show before the work.
            runs.load_completions(folder)
            runs.load_families(folder, library)
            runs.check_side_effects(folder)
            progress.start("Loading the model")
            loaded, f = _model_of(folder, library, model, device)
            progress.start(f"Following vector {vector}")
            _say_if_more(wanted, known)
            family = run.melbo_ortho(
                f,
                theta0,
                n_vectors=None if everything and known < room else max(wanted, known),
                norm_penalty=norm_penalty,
                optimiser=optimiser,
                steps=steps,
                overwrite=overwrite,
                on_step=lambda step: progress.update(*_family_done(step, wanted)),
            )
            progress.start("Measuring the family")
            part = tm.report.collect_family(
                loaded, f, family, theta0,
                max_new_tokens=max_new_tokens, on_batch=progress.update,
            )  # fmt: skip
            runs.save_table(place / runs.TABLE, part.table)
            runs.save_table(place / runs.COMPOSITION, part.composition)
            _write_page(progress, folder, loaded, f, library, max_new_tokens)
        _print_family(part)
        typer.echo(str((folder / runs.REPORT).resolve()))


def _check_max_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens={max_new_tokens}: at least 1")


def _absolute(model: str | None) -> str | None:
    """The model's name, so that it still means the same from another folder."""
    if model is not None and Path(model).expanduser().exists():
        return str(Path(model).expanduser().resolve())
    return model


def _library_and_vector(folder: Path, vector: int) -> tuple["SteeringVectors", "SteeringVectors"]:
    """The run's vectors, and the one with that number."""
    from tl_melbo import SteeringVectors, runs

    if not (folder / runs.VECTORS).is_file():
        raise FileNotFoundError(
            f"{folder}: holds no {runs.VECTORS}; name a folder that `tl-melbo discover` wrote"
        )
    library = SteeringVectors.load(folder / runs.VECTORS)
    numbers = library.columns["index"].tolist()
    if vector not in numbers:
        raise ValueError(
            f"--vector={vector}: {folder} holds vectors {min(numbers)} to {max(numbers)}"
            if numbers
            else f"{folder}: holds a library without vectors"
        )
    lacking = [
        fact
        for fact in ("model", "prompts", "source_layer", "target_layer")
        if library.story.get(fact) is None
    ]
    if lacking:
        raise ValueError(
            f"{folder / runs.VECTORS}: its story does not tell {', '.join(lacking)}; "
            "in Python, tm.melbo_ortho(f, theta0) takes any vector"
        )
    return library, library[numbers.index(vector)]


def _model_of(
    folder: Path, library: "SteeringVectors", model: str | None, device: str | None
) -> tuple["Model", "ActivationMap"]:
    """The model and the activation map that a library was found with."""
    import torch

    import tl_melbo as tm
    from tl_melbo import runs
    from tl_melbo.model.bridge import model_name

    story = library.story
    name = runs.load_settings(folder).get("model") if model is None else model
    dtype = getattr(torch, str(story.get("dtype", "float32")), None)
    if not isinstance(name, str | None) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{folder}: its settings make no sense; name the model with --model")
    loaded = tm.load_model(name, device=device, dtype=dtype)
    if model_name(loaded) != story["model"]:
        raise ValueError(
            f"--model: {model_name(loaded)}, but the vectors in {folder} are of {story['model']}; "
            "name that model's hub id, folder or file"
        )
    f = tm.ActivationMap.from_prompts(
        loaded,
        story["prompts"],
        source_layer=story["source_layer"],
        target_layer=story["target_layer"],
        chat=bool(story.get("chat")),
    )
    return loaded, f


def _write_page(
    progress: terminal.Progress,
    folder: Path,
    model: "Model",
    f: "ActivationMap",
    library: "SteeringVectors",
    max_new_tokens: int,
    anew: bool = False,
) -> "pd.DataFrame":
    """The page about all that a folder holds; texts that it lacks, or all, are written first."""
    import tl_melbo as tm
    from tl_melbo import runs

    completions = None if anew else runs.load_completions(folder, library, max_new_tokens)
    if completions is None:
        progress.start("Writing under each vector")
        completions = tm.report.collect_completions(
            model, f.prompts, library, max_new_tokens=max_new_tokens, on_batch=progress.update
        )
        runs.save_table(folder / runs.COMPLETIONS, completions)
        settings = {"max_new_tokens": max_new_tokens, "texts_of": runs.digest(library)}
        runs.save_settings(folder, {**runs.load_settings(folder), **settings})
    progress.start("Making the page")
    return tm.report.write(
        folder / runs.REPORT,
        model,
        library,
        completions=completions,
        activation_map=f,
        families=runs.load_families(folder, library),
        side_effects=runs.load_side_effects(folder, library),
    )


def _work_done(step: "Step", n_vectors: int) -> tuple[int, int]:
    """Steps done and steps in all, whether vectors are searched one by one or all at once."""
    done = step.first_vector * step.n_steps + step.n_at_once * step.step
    return done, n_vectors * step.n_steps


def _family_done(step: "OrthoStep", n_vectors: int) -> tuple[int, int]:
    return step.vector * step.n_steps + step.step, n_vectors * step.n_steps


def _say_if_more(wanted: int, known: int) -> None:
    if wanted < known:
        line = f"Asked for {wanted} vectors, {known} are there: all of them are shown."
        terminal.say(line)


def _parse_slice(text: str) -> slice:
    """Read 'start:stop'; either may be missing.

    Raises:
        ValueError: it is something else.
    """
    parts = text.split(":")
    try:
        start, stop = (int(part) if part.strip() else None for part in parts)
    except ValueError as error:
        raise ValueError(
            f"--positions={text!r}: expected start:stop, such as '-3:' for the last three tokens, "
            "or ':' for all"
        ) from error
    return slice(start, stop)


def _parse_radius(text: str) -> "Radius":
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--radius={text!r}: expected a number, such as 12, or 'auto'") from error


@contextmanager
def _run_folder(
    out: Path, overwrite: bool, asked: dict[str, Any], model: str | None
) -> Iterator[tuple["Run", int]]:
    """The folder for the results, for this process alone, and how many vectors it holds.

    Checked before the work; if nothing came of it, gone again.
    """
    from tl_melbo import Run, SteeringVectors, runs

    run = Run(out)
    path = run.folder / runs.VECTORS
    with run.writing(), terminal.telling_what_is_kept(run.folder):
        known = 0
        if not overwrite:
            _check_is_ours(run.folder)
            runs.load_completions(run.folder)  # a damaged file is to show before the work
        if path.is_file() and not overwrite:
            try:
                library = SteeringVectors.load(path)
            except ValueError as error:
                raise ValueError(f"{error}; or pass --overwrite to replace that run") from error
            _check_continues(
                run.folder, library, {**asked, "method": "melbo"}, _absolute(model),
                advice="continue them, pass --overwrite to replace them, or choose another folder",
            )  # fmt: skip
            known = int(library.columns["index"].max()) + 1 if len(library) else 0
            line = f"{run.folder} holds {terminal.counted(len(library))} of this search."
            terminal.say(line)
        yield run, known


_UNKNOWN: Any = object()


def _check_is_ours(folder: Path) -> None:
    """Refuse to write over files that no run left."""
    from tl_melbo import runs

    names = (runs.COMPLETIONS, runs.REPORT, runs.SETTINGS, runs.SIDE_EFFECTS)
    theirs = [name for name in names if (folder / name).exists()]
    if theirs and not (folder / runs.VECTORS).is_file():
        raise ValueError(
            f"{folder}: holds {', '.join(theirs)}, but no {runs.VECTORS}, so not the rest of a "
            "run; choose another folder, or pass --overwrite to replace them"
        )


def _check_continues(
    folder: Path,
    vectors: "SteeringVectors",
    asked: dict[str, Any],
    model: str | None = _UNKNOWN,
    *,
    advice: str,
) -> None:
    """Make sure, before the model is loaded, that a folder's vectors are of the same search."""
    from tl_melbo import runs

    story = vectors.story
    facts = {**story, **story.get("hyperparameters", {})}
    if asked.get("radius") == "auto" and "calibration" in story:
        facts["radius"] = "auto"
    if model is not _UNKNOWN:
        facts["model"] = _called(runs.load_settings(folder).get("model", model))
        asked = {**asked, "model": _called(model)}
    differing = [
        f"{name}={facts.get(name)!r} (asked for now: {value!r})"
        for name, value in asked.items()
        if facts.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder}: holds vectors found with {', '.join(differing)}; ask for the same to "
            f"{advice}"
        )


def _called(model: Any) -> Any:
    return "the embedded one" if model is None else model


def _print_found(table: "pd.DataFrame", measure: dict[str, Any] | None) -> None:
    """The page's table: what the method measured, KL and completions."""
    measured = [] if measure is None else [measure["column"]]
    many_prompts = len(set(table["prompt"])) > 1
    terminal.print_rows(
        ("vector", *measured, "KL (nats)"),
        [
            (str(row["index"]), *(f"{row[name]:#.4g}" for name in measured), f"{row['kl']:.3f}")
            for row in table.to_dict("records")
        ],
        {name: table[name] for name in ("prompt", "completion")[0 if many_prompts else 1 :]},
    )


def _print_family(part: "Family") -> None:
    rows = [
        row
        for row in part.table.to_dict("records")
        if row["kind"] in ("unsteered", "reference", "family")
    ]
    names = {"unsteered": "none", "reference": "theta0"}
    terminal.print_rows(
        ("vector", "norm", "distance", "KL to theta0"),
        [
            (
                names.get(row["kind"], str(row["index"])),
                f"{row['norm']:#.4g}",
                f"{row['distance']:#.4g}",
                f"{row['kl_to_reference']:.3f}",
            )
            for row in rows
        ],
        {"completion": [row["completion"] for row in rows]},
    )
