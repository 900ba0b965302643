"""The same from a shell: `tl-melbo discover "Tell me about yourself." --out runs/me`."""

import csv
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

# torch and transformers take seconds to import; each command imports what it needs when it runs,
# so that --help answers at once.
if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.discovery import Step

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find steering vectors of a language model without supervision, and look at what they do.",
)

_VECTORS, _COMPLETIONS, _REPORT = "vectors.safetensors", "completions.csv", "report.html"
_INTERRUPTED = 130
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_SHOWN_CHARACTERS = 60

# What the package raises on purpose; RuntimeError is torch's word for full memory and bad devices.
_EXPECTED_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    ModuleNotFoundError,
    RuntimeError,
)


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
    # A callback of its own keeps `discover` a subcommand while it is the only one.
    pass


@app.command()
def discover(
    prompts: Annotated[list[str], typer.Argument(help="What the model is asked; one or several.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if need be.")],
    n_vectors: Annotated[int, typer.Option(help="How many vectors to find.")] = 32,
    radius: Annotated[float, typer.Option(help="Their norm: too small changes nothing.")] = 12.0,
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
    max_new_tokens: Annotated[int, typer.Option(help="Length of each completion.")] = 50,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in --out.")] = False,
) -> None:
    """Find vectors that change the model most, let it write under each, and make a page of it.

    Writes vectors.safetensors, completions.csv and report.html; prints the page's path last.
    """
    with _errors_as_one_line(), _warnings_as_lines(), _run_folder(out, overwrite) as folder:
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens={max_new_tokens}: at least 1")
        searched = _parse_slice(positions)

        import torch

        import tl_melbo as tm

        with _progress() as progress:
            progress.start("Loading the model")
            loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
            f = tm.ActivationMap.from_prompts(
                loaded, prompts, source_layer=source_layer, target_layer=target_layer, chat=chat
            )
            progress.start("Finding vectors")
            found = tm.melbo(
                f,
                n_vectors=n_vectors,
                radius=radius,
                p=p,
                q=q,
                positions=searched,
                orthogonal=orthogonal,
                seed=seed,
                optimiser=optimiser,
                steps=steps,
                norm=norm,
                on_step=lambda step: progress.update(*_work_done(step, n_vectors)),
            )
            # An earlier run's texts do not belong to these vectors.
            for name in (_COMPLETIONS, _REPORT):
                (folder / name).unlink(missing_ok=True)
            found.save(folder / _VECTORS)
            progress.start("Writing under each vector")
            completions = tm.report.collect_completions(
                loaded, prompts, found, max_new_tokens=max_new_tokens, on_batch=progress.update
            )
            _save_completions(folder / _COMPLETIONS, completions)
            progress.start("Making the page")
            table = tm.report.write(
                folder / _REPORT, loaded, found, completions=completions, activation_map=f
            )
        _print_table(table)
        typer.echo(str((folder / _REPORT).resolve()))


def _work_done(step: "Step", n_vectors: int) -> tuple[int, int]:
    """Steps done and steps in all, whether vectors are searched one by one or all at once."""
    done = step.first_vector * step.n_steps + step.n_at_once * step.step
    return done, n_vectors * step.n_steps


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


@contextmanager
def _run_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """The folder for the results, checked before the work; if nothing came of it, gone again."""
    from tl_melbo.files import writable_folder

    existed = out.expanduser().exists()
    folder = writable_folder(out)
    if (folder / _VECTORS).exists() and not overwrite:
        raise FileExistsError(
            f"--out={out}: already holds {_VECTORS}; pass --overwrite to replace that run, or "
            "choose another folder"
        )
    try:
        yield folder
    except KeyboardInterrupt:
        kept = [name for name in (_VECTORS, _COMPLETIONS) if (folder / name).exists()]
        what = f"kept {' and '.join(kept)} in {folder}" if kept else "nothing was finished"
        _stderr().print(escape(f"Interrupted; {what}."), soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        if not existed:
            with suppress(OSError):  # holds something: leave it
                folder.rmdir()


def _save_completions(path: Path, completions: "pd.DataFrame") -> None:
    from tl_melbo.files import replacing

    safe = completions.copy()
    for name in ("prompt", "completion"):
        safe[name] = [_defused(text) for text in safe[name]]
    with replacing(path) as temporary:
        # All text in quotes: pandas forgets them around a lone carriage return.
        safe.to_csv(
            temporary,
            index=False,
            quoting=csv.QUOTE_NONNUMERIC,
            encoding="utf-8",
            errors="backslashreplace",
        )


def _defused(text: str) -> str:
    """Keep a spreadsheet from running text as a formula (OWASP, "CSV injection")."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _print_table(table: "pd.DataFrame") -> None:
    from rich.table import Table
    from rich.text import Text

    from tl_melbo.report import printable

    many_prompts = len(set(table["prompt"])) > 1
    shown = Table(header_style="bold")
    for name in ("vector", "objective", "KL (nats)"):
        shown.add_column(name, justify="right", no_wrap=True)
    if many_prompts:
        shown.add_column("prompt", max_width=24)
    shown.add_column("completion")
    for row in table.to_dict("records"):
        # Text, not str: rich would take a model's [red] for markup.
        texts = [row["prompt"], row["completion"]] if many_prompts else [row["completion"]]
        numbers = [str(row["index"]), f"{row['objective']:#.4g}", f"{row['kl']:.3f}"]
        lines = [_one_line(printable(text)) for text in texts]
        # The cells do not wrap; their columns may, so it is these that give way to a narrow screen.
        shown.add_row(*numbers, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
    Console(highlight=False).print(shown)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


class _Progress:
    """One line a stage, with time left where a stage counts what it has done."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def start(self, stage: str) -> None:
        self.finish()
        self._task = self._bars.add_task(stage, total=None)

    def update(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1)


@contextmanager
def _progress() -> Iterator[_Progress]:
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description:<26}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=_stderr()) as bars:
        progress = _Progress(bars)
        yield progress
        progress.finish()


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except typer.Exit:  # a RuntimeError, too
        raise
    except _EXPECTED_ERRORS as error:
        from rich.text import Text

        message = " ".join(str(error).split()) or type(error).__name__
        line = Text.assemble(("Error: ", "bold red"), _without_controls(message))
        _stderr().print(line, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    from rich.text import Text

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category is UserWarning:
            text = _without_controls(" ".join(str(message).split()))
            line = Text.assemble(("Warning: ", "bold yellow"), text)
            _stderr().print(line, soft_wrap=True)

    with warnings.catch_warnings():
        # Deprecations and the like are between libraries; the user can do nothing about them.
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _without_controls(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)
