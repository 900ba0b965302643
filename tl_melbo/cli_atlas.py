"""`tl-melbo atlas`: all pairs of layers, as vectors, a table and a picture."""

import html
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock
from typer import Argument, Option, echo

import tl_melbo as tm
from tl_melbo import checks, terminal
from tl_melbo.files import replacing
from tl_melbo.run._files import LOCK, locked, save_table
from tl_melbo.text import printable

TABLE, PAGE = "atlas.csv", "atlas.html"
_LAYERS = "'start:stop:step' or '4,8,16'."
_FIGURES: dict[Any, tuple[str, str]] = {
    "singular_value": (
        "Singular value",
        "the largest singular value of the Jacobian: the effect, to first order, of a vector of "
        "norm 1",
    ),
    "share": ("Share", "the part of the sum of all squared singular values that is the first's"),
    "kl": (
        "KL",
        "how far the first vector moves the next token's distribution, in nats, for the sign that "
        "moves it more; completions show on hovering",
    ),
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Atlas of layer pairs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
padding: 0 1em; }} figure {{ margin: 0; overflow-x: auto; }} dt {{ font-weight: 600; }}</style>
</head><body><h1>Atlas of layer pairs</h1>
<p>{model}. Vectors, numbers and completions are in the files beside this page.</p>
<h2>Baseline</h2><dl>{baseline}</dl>{figures}</body></html>
"""


def atlas(
    prompts: Annotated[list[str], Argument(help="What the model is asked; one or several.")],
    out: Annotated[Path, Option(help="Folder for the results; made if need be.")],
    sources: Annotated[str, Option(help=f"Add vectors after these blocks: {_LAYERS}")] = ":",
    targets: Annotated[str, Option(help=f"Measure effects after these: {_LAYERS}")] = ":",
    n_vectors: Annotated[int, Option(help="How many vectors of each pair.")] = 1,
    radius: Annotated[str, Option(help="Their norm, as a share of a token's, or 'auto'.")] = "0.35",
    positions: Annotated[str, Option(help="Tokens to measure at: 'start:stop'.")] = "-3:",
    kl_threshold: Annotated[float, Option(help="Completions above this KL, in nats.")] = 0.5,
    max_new_tokens: Annotated[int, Option(help="Length of each completion.")] = 24,
    model: Annotated[
        str | None, Option(help="Hub id, folder or .gguf file.", show_default="bundled")
    ] = None,
    chat: Annotated[bool, Option(help="Put prompts into the model's chat template.")] = True,
    device: Annotated[
        str | None, Option(help="cpu, cuda, ...", show_default="a GPU if there is one")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"], Option(help="Of the weights.")
    ] = "float32",
) -> None:
    """Find the directions to which later layers respond most, for all pairs of layers.

    Writes a file of vectors for each source layer, atlas.csv and atlas.html; prints the path of the
    latter last. Each source is kept as soon as it is done, and the same command continues.
    """
    checks.as_texts(prompts)
    chosen = [_layers(text, name) for name, text in (("sources", sources), ("targets", targets))]
    settings: dict[str, Any] = {
        "n_vectors": n_vectors,
        "radius": _share(radius),
        "positions": _slice(positions, "positions"),
        "kl_threshold": kl_threshold,
        "max_new_tokens": max_new_tokens,
        "chat": chat,
    }
    kept = 0

    def keep(found: tm.evaluation.Atlas) -> None:
        nonlocal kept
        kept = len(found.libraries)
        save_table(out / TABLE, found.table)

    try:
        with locked(out, FileLock(out / LOCK, blocking=False)), terminal.Stages() as stages:
            stages.begin("Loading the model")
            loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
            every = range(int(loaded.cfg.n_layers))
            layers = [every[each] if isinstance(each, slice) else each for each in chosen]
            stages.begin("Going through the layers")
            calls: dict[str, Any] = {"on_source": keep, "on_batch": stages.count, "folder": out}
            found = tm.evaluation.atlas(loaded, prompts, *layers, **settings, **calls)
            keep(found)
            stages.begin("Drawing")
            _draw(found, out / PAGE)
    except KeyboardInterrupt:
        what = f"{kept} source layers are kept in {out}; the same command continues"
        raise KeyboardInterrupt(f"; {what}" if kept else "; nothing was finished") from None
    terminal.print_atlas(found.table)
    echo(str((out / PAGE).resolve()))


def _draw(found: tm.evaluation.Atlas, path: Path) -> None:
    """One page with a figure for each number; it loads nothing from elsewhere."""
    from tl_melbo.plots import atlas_heatmap  # plotly takes long to import

    table = found.table
    figures, script = [], True
    for value, (name, what) in _FIGURES.items():
        figure = atlas_heatmap(table, value, title="")
        drawn = figure.to_html(full_html=False, include_plotlyjs=script)
        label = html.escape(f"Heatmap of source and target layers: {what}", quote=True)
        figures.append(f'<h2>{name}</h2><figure role="img" aria-label="{label}">{drawn}</figure>')
        figures.append(f"<p>{what[0].upper()}{what[1:]}.</p>")
        script = False  # it is there already
    story = next(iter(found.libraries.values())).story
    texts = zip(story["prompts"], story["unsteered"], strict=True)
    baseline = [
        f"<dt>{html.escape(printable(prompt))}</dt><dd>{html.escape(printable(text))}</dd>"
        for prompt, text in texts
    ]
    with replacing(path) as temporary:
        temporary.write_text(
            _PAGE.format(
                model=html.escape(printable(str(story["model"]))),
                baseline="".join(baseline),
                figures="".join(figures),
            ),
            encoding="utf-8",
            errors="backslashreplace",
        )


def _layers(text: str, option: str) -> slice | list[int]:
    """Read 'start:stop:step', of which each part may be missing, or layers with commas between."""
    if ":" in text:
        return _slice(text, option)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{option}={text!r}: expected {_LAYERS}") from error


def _slice(text: str, option: str) -> slice:
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
        if not 2 <= len(parts) <= 3 or numbers[2:] == [0]:
            raise ValueError(f"{len(parts)} parts")
    except ValueError as error:
        raise ValueError(f"--{option}={text!r}: expected 'start:stop:step'") from error
    return slice(*numbers)


def _share(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--radius={text!r}: a share such as 0.35, or 'auto'") from error
