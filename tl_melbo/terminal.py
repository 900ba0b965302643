"""What a command shows: progress, tables, warnings and errors, each as plain lines."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from tl_melbo.text import printable

if TYPE_CHECKING:
    import pandas as pd

_INTERRUPTED = 130
_SHOWN_CHARACTERS = 60

# What the package raises on purpose, its own errors among them; RuntimeError is torch's word for
# full memory and bad devices.
_EXPECTED_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    ModuleNotFoundError,
    RuntimeError,
)


class Progress:
    """One line a stage, with the time left where a stage counts what it has done."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: Any = None

    def start(self, stage: str) -> None:
        """End the stage before, and begin this one."""
        self.finish()
        self._task = self._bars.add_task(stage, total=None)

    def update(self, done: int, total: int | None) -> None:
        """Say how much of the stage is done."""
        self._bars.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        """End the stage."""
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1)

    def close(self) -> None:
        """End the last stage; what is printed from now on stands below."""
        self.finish()
        self._bars.stop()


@contextmanager
def progress() -> Iterator[Progress]:
    """Stages shown on stderr until the end of the block."""
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=_stderr()) as bars:
        shown = Progress(bars)
        yield shown
        shown.finish()


@contextmanager
def messages(context: typer.Context) -> Iterator[None]:
    """Errors as one line and exit code 1, warnings as one line, Ctrl-C as exit code 130."""
    with warnings.catch_warnings():
        # Deprecations and the like are between libraries; the user can do nothing about them.
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            yield
        except KeyboardInterrupt:
            say("Interrupted.")
            raise typer.Exit(_INTERRUPTED) from None
        except typer.Exit:  # a RuntimeError, too
            raise
        except _EXPECTED_ERRORS as error:
            message = _in_options(str(error), context) or type(error).__name__
            _line("Error: ", "bold red", message)
            raise typer.Exit(1) from None


@contextmanager
def telling_what_is_kept(folder: Path) -> Iterator[None]:
    """After Ctrl-C, say what the folder holds: every vector is on disk before the next begins."""
    from tl_melbo.run import VECTORS
    from tl_melbo.vectors import SteeringVectors

    path = folder / VECTORS
    try:
        yield
    except KeyboardInterrupt:
        kept = len(SteeringVectors.load(path)) if path.is_file() else 0
        what = f"{counted(kept)} {'is' if kept == 1 else 'are'} kept in {folder}"
        what = f"{what}; the same command continues" if kept else "nothing was finished"
        say(f"Interrupted; {what}.")
        raise typer.Exit(_INTERRUPTED) from None


def counted(n_vectors: int) -> str:
    """A number of vectors in words."""
    return f"{n_vectors} vector{'' if n_vectors == 1 else 's'}"


def say(line: str) -> None:
    """Print a line on stderr, as it is."""
    _stderr().print(Text(line), soft_wrap=True)


def print_rows(
    columns: Sequence[str],
    numbers: Iterable[Sequence[str]],
    texts: Mapping[str, Iterable[str]],
) -> None:
    """Print a table on stdout: numbers to the right, then texts, cut to one line each."""
    shown = Table(header_style="bold")
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for name in texts:
        shown.add_column(name, max_width=24 if name == "prompt" else None)
    for row, *cells in zip(numbers, *texts.values(), strict=True):
        lines = [_cut(printable(text)) for text in cells]
        # Text, not str: rich would take a model's [red] for markup. The cells do not wrap; their
        # columns may, so it is these that give way to a narrow screen.
        shown.add_row(*row, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
    Console(highlight=False).print(shown)


def print_found(table: "pd.DataFrame", measure: Mapping[str, Any] | None) -> None:
    """Print the page's table: what the method measured, KL and completions."""
    measured = [] if measure is None else [measure["column"]]
    many_prompts = len(set(table["prompt"])) > 1
    print_rows(
        ("vector", *measured, "KL (nats)"),
        [
            (str(row["index"]), *(f"{row[name]:#.4g}" for name in measured), f"{row['kl']:.3f}")
            for row in table.to_dict("records")
        ],
        {name: table[name] for name in ("prompt", "completion")[0 if many_prompts else 1 :]},
    )


def print_family(table: "pd.DataFrame") -> None:
    """Print what was measured of a family, as `analysis.family` gives it."""
    shown = ("unsteered", "reference", "family")
    rows = [row for row in table.to_dict("records") if row["kind"] in shown]
    names = {"unsteered": "none", "reference": "theta0"}
    print_rows(
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


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def _in_options(message: str, context: typer.Context) -> str:
    """The message with `name=value` written as the command's option: `--name=value`."""
    options = {option.name: option for option in context.command.params}

    def renamed(found: re.Match[str]) -> str:
        option, value = options.get(found[1]), found[2]
        if option is None or not option.opts[0].startswith("--"):
            return found[0]
        if value == "True":
            return option.opts[0]
        return f"{option.opts[0]}={value}"

    return re.sub(r"(?<![-\w])([a-z]\w*)=(?:torch\.)?([\w.+-]*)", renamed, message)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category is UserWarning:
        _line("Warning: ", "bold yellow", str(message))


def _line(kind: str, style: str, message: str) -> None:
    """One line, with nothing in it that steers the terminal."""
    line = " ".join(message.split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    _stderr().print(Text.assemble((kind, style), line), soft_wrap=True)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)
