"""What commands share: options, and what they show: progress, tables, warnings and errors."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from tl_melbo.text import printable

if TYPE_CHECKING:
    import pandas as pd

_INTERRUPTED = 130
_MOST_ROWS = 12
# What comes before the digest in a folder's name that a sweep made.
_DIGEST = re.compile(r".*_(?=[0-9a-f]{10}$)")

# What the package raises on purpose, its own errors among them; RuntimeError is torch's word for
# full memory and bad devices.
_EXPECTED_ERRORS = (
    ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError, RuntimeError,
)  # fmt: skip


def option(text: str, default: str | None = None, *names: str) -> Any:
    """An option; `default` is what is shown where the option's own says nothing."""
    return typer.Option(*names, help=text, show_default=default or True)


# Options that several commands have.
BundledModel = Annotated[str | None, option("Hub id, folder or .gguf file.", "bundled")]
Chat = Annotated[bool, option("Put prompts into the model's chat template.")]
Device = Annotated[str | None, option("cpu, cuda, ...", "a GPU if there is one")]
Dtype = Annotated[Literal["float32", "float64", "bfloat16", "float16"], option("Of the weights.")]
MaxNewTokens = Annotated[int, option("Length of each completion.")]
Samples = Annotated[int | None, option("Sampled completions of each, beside the greedy.", "none")]
Temperature = Annotated[float | None, option("Of the samples.", "0.7")]
Scales = Annotated[
    str | None, option("Such as 0.5,1,2, or nine, from -2 to 2: the page gets a slider.", "1, -1")
]
Out = Annotated[Path, option("Folder for the results; made if need be.")]
Prompts = Annotated[list[str], typer.Argument(help="What the model is asked; one or several.")]


class Command(TyperCommand):
    """Errors as one line and exit code 1, warnings as one line, Ctrl-C as exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with warnings.catch_warnings():
            # Deprecations and the like are between libraries; the user can do nothing about them.
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as stop:
                kept = str(stop) or "what was finished is kept; the same command"
                say(f"Interrupted; {kept} continues, without --overwrite.")
                raise typer.Exit(_INTERRUPTED) from None
            except typer.Exit:  # a RuntimeError, too
                raise
            except _EXPECTED_ERRORS as error:
                message = self._in_options(str(error)) or type(error).__name__
                _line("Error: ", "bold red", message)
                raise typer.Exit(1) from None

    def _in_options(self, message: str) -> str:
        """The message with `name=value` written as the command's option: `--name=value`."""
        options = {option.name: option.opts[0] for option in self.params}
        options.setdefault("name", options.get("model", ""))  # of load_model

        def renamed(found: re.Match[str]) -> str:
            option, value = options.get(found[1], ""), found[2]
            if not option.startswith("--"):
                return found[0]
            return option if value == "True" else f"{option}={value}"

        def window(found: re.Match[str]) -> str:
            return ":".join(part.replace("None", "") for part in found.groups())

        message = re.sub(r"slice\((-?\d+|None), (-?\d+|None)(?:, None)?\)", window, message)
        return re.sub(r"(?<![-\w])(?<!--set )([a-z]\w*)=(?:torch\.)?([\w.+-]*)", renamed, message)


class Stages(progress.Progress):
    """One line a stage on stderr, with the time left where a stage counts what it has done."""

    def __init__(self) -> None:
        left, elapsed = progress.TextColumn("left,"), progress.TextColumn("elapsed")
        # The last of the default columns is the time left.
        columns = (*self.get_default_columns(), left, progress.TimeElapsedColumn(), elapsed)
        # Vectors of large models are minutes apart.
        super().__init__(*columns, console=_stderr(), speed_estimate_period=1800)

    def begin(self, stage: str) -> None:
        """End the stage before, and begin this one."""
        self.end()
        self.add_task(stage, total=None)

    def count(self, done: float, total: float | None) -> None:
        """Say how much of the stage is done."""
        self.update(self.task_ids[-1], completed=done, total=total)

    def end(self) -> None:
        """End the stage."""
        if self.task_ids:
            self.count(1, 1)


def counted(number: int, what: str = "vector") -> str:
    """A number of things in words."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def say(line: str) -> None:
    """Print a line on stderr, as it is."""
    _stderr().print(Text(line), soft_wrap=True)


# What a column is called, and how its numbers are written. Others have four digits.
_SHOWN = {
    "index": ("vector", ""), "vector": ("vector", ""), "source_layer": ("source", ""),
    "target_layer": ("target", ""), "sign": ("sign", "+d"), "kl": ("KL (nats)", ".3f"),
    "kl_to_reference": ("KL to theta0", ".3f"), "share": ("share", ".3f"),
    "specificity": ("specificity", "#.3g"), "loss_increase": ("loss (nats)", "#.3g"),
    "adapter": ("adapter", ""), "loss": ("loss", ".3f"), "nll": ("NLL", ".3f"),
    "repetition": ("repetition", ".3f"), "collapsed": ("", ""), "folder": ("folder", ""),
    "model": ("model", ""), "method": ("method", ""), "layers": ("layers", ""),
    "radius": ("radius", ".4g"), "kl_median": ("KL (median)", ".4g"), "kl_max": ("KL (max)", ".4g"),
    "factor": ("factor", ""),
}  # fmt: skip


def print_found(table: "pd.DataFrame", measure: Mapping[str, Any] | None) -> None:
    """Print the page's table: what the method measured, KL, side effects and completions."""
    costs = [name for name in ("specificity", "loss_increase") if name in table]
    measured = [] if measure is None else [measure["column"]]
    prompts = ["prompt"] if len({*table["prompt"]}) > 1 else []
    _print_frame(table, ["index", *measured, "kl", *costs], [*prompts, "completion"])


def print_family(table: "pd.DataFrame") -> None:
    """Print what was measured of a family, as `analysis.family` gives it."""
    rows: Any = table[table["kind"].isin(["unsteered", "reference", "family"])]
    names = {"unsteered": "none", "reference": "theta0"}
    rows = rows.assign(index=rows["kind"].map(names).fillna(rows["index"].astype(str)))
    _print_frame(rows, ["index", "norm", "distance", "kl_to_reference"])


def print_atlas(table: "pd.DataFrame") -> None:
    """Print the rows of an atlas whose KL is largest."""
    rows = table.nlargest(_MOST_ROWS, "kl").rename(columns={"singular_value": "singular value"})
    names = ["source_layer", "target_layer", "vector", "sign", "singular value", "share", "kl"]
    _print_frame(rows.fillna({"completion": ""}), names)


def print_sweep(table: "pd.DataFrame") -> None:
    """Print the searches of a sweep: those that failed, and those whose KL is largest."""
    failed = table[table["status"] == "failed"].head(_MOST_ROWS)
    done: Any = table[table["status"] == "done"]
    done = done.nlargest(_MOST_ROWS - len(failed), "kl_max")
    rows = table.loc[[*failed.index, *done.index]]
    texts = rows["error"].where(rows["status"] == "failed", rows["completion"]).fillna("")
    varied = [name for name in ("model", "method") if len({*table[name]}) > 1]
    shown = {
        # As a shell takes it: `tl-melbo page runs/sweep/*0123456789`.
        "folder": [_DIGEST.sub("*", name) for name in rows["folder"]],
        "layers": rows["source_layer"].astype(str) + " → " + rows["target_layer"].astype(str),
        "completion, or error": texts,
    }
    names = ["folder", *varied, "layers", "radius", "kl_median", "kl_max"]
    _print_frame(rows.assign(**shown), names, ["completion, or error"])


def print_adapters(table: "pd.DataFrame") -> None:
    """Print what was measured of adapters at the end of their training, and a text of each."""
    collapsed = ["collapsed" if each else "" for each in table["collapsed"]]
    table = table.assign(adapter=table["index"], collapsed=collapsed)
    _print_frame(table, ["adapter", "loss", "kl", "nll", "repetition", "collapsed"])


def print_factors(table: "pd.DataFrame") -> None:
    """Print what was measured of gated factors, and a text of each."""
    _print_frame(table.assign(factor=table["index"]), ["factor", "importance", "effect"])


def _print_frame(
    table: "pd.DataFrame", numbers: Iterable[str], texts: Iterable[str] = ("completion",)
) -> None:
    """Print these columns of a frame: numbers to the right, then texts, cut to one line each."""
    # pyrefly: ignore[bad-argument-type]  # None is no value to its stubs of pandas
    cells = table.astype(object).where(table.notna(), None)
    shown, columns = Table(header_style="bold"), []
    for name in numbers:
        called, form = _SHOWN.get(name, (name, "#.4g"))
        shown.add_column(called, justify="right", no_wrap=True)
        columns.append(["–" if cell is None else format(cell, form) for cell in cells[name]])
    for name in texts:
        shown.add_column(name, max_width=24 if name == "prompt" else 60)
        columns.append(table[name])
    for row in zip(*columns, strict=True):
        # Text, not str: rich would take a model's [red] for markup. The cells do not wrap; their
        # columns may, so it is these that give way to a narrow screen.
        lines = [" ".join(printable(str(cell)).split()) for cell in row]
        shown.add_row(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
    Console(highlight=False).print(shown)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category is UserWarning:
        _line("Warning: ", "bold yellow", str(message))


def _line(kind: str, style: str, message: str) -> None:
    """One line, with nothing in it that steers the terminal."""
    line = " ".join(printable(message).split())
    _stderr().print(Text.assemble((kind, style), line), soft_wrap=True)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)
