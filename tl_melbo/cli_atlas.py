"""`tl-melbo atlas`: all pairs of layers, as vectors, a table and a picture."""

import html
from pathlib import Path
from typing import Annotated, Any

import torch
from filelock import FileLock
from typer import echo

import tl_melbo as tm
from tl_melbo import checks, options, terminal
from tl_melbo.discovery._calibration import Radius
from tl_melbo.files import replacing
from tl_melbo.run._files import LOCK, locked, save_table
from tl_melbo.story import slice_text
from tl_melbo.terminal import BundledModel, Chat, Device, Dtype, MaxNewTokens, Out, Prompts, option
from tl_melbo.text import printable

TABLE, PAGE = "atlas.csv", "atlas.html"
_LAYERS = "'start:stop:step' or '4,8,16'."
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Atlas of layer pairs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
padding: 0 1em; }} figure {{ margin: 0; overflow-x: auto; }} dt {{ font-weight: 600; }}</style>
</head><body><h1>Atlas of layer pairs</h1>
<p>{model}. Vectors, numbers and completions are in the files beside this page.</p>
<h2>Baseline</h2><dl>{baseline}</dl>
<h2>Of each pair, its first vector</h2>
<p>Its singular value is its effect, to first order, at norm 1. Its KL is how far it moves the next
token's distribution, for the sign that moves it more; completions show on hovering.</p>
{figures}</body></html>
"""


def atlas(
    prompts: Prompts,
    out: Out,
    sources: Annotated[str, option(f"Add vectors after these blocks: {_LAYERS}")] = ":",
    targets: Annotated[str, option(f"Measure effects after these: {_LAYERS}")] = ":",
    n_vectors: Annotated[int, option("How many vectors of each pair.")] = 1,
    radius: Annotated[str, option("Their norm, as a share of a token's, or 'auto'.")] = "0.35",
    positions: Annotated[str, option("Tokens to measure at: 'start:stop'.")] = "-3:",
    kl_threshold: Annotated[float, option("Completions above this KL, in nats.")] = 0.5,
    max_new_tokens: MaxNewTokens = 24,
    model: BundledModel = None,
    chat: Chat = True,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Find the directions to which later layers respond most, for all pairs of layers.

    Writes a file of vectors for each source layer, atlas.csv and atlas.html; prints the path of the
    latter last. Each source is kept as soon as it is done, and the same command continues.
    """
    from tl_melbo.evaluation._atlas import check_settings  # which takes long to import

    # All that can be checked before the model is loaded, which takes a while.
    checks.as_texts(prompts)
    layers = {"sources": _layers(sources, "sources"), "targets": _layers(targets, "targets")}
    numbers: dict[str, Any] = {
        "n_vectors": n_vectors,
        "radius": options.read(radius, Radius, "radius"),
        "kl_threshold": kl_threshold,
        "max_new_tokens": max_new_tokens,
    }
    check_settings(**numbers)
    window = options.read(positions, slice, "positions")
    settings: dict[str, Any] = {**numbers, "positions": window, "chat": chat}

    def keep(found: tm.evaluation.Atlas) -> None:
        save_table(out / TABLE, found.table)

    with locked(out, FileLock(out / LOCK, blocking=False)), terminal.Stages() as stages:
        stages.begin("Loading the model")
        loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
        n_layers = int(loaded.cfg.n_layers)
        chosen = {name: _resolved(each, n_layers, name) for name, each in layers.items()}
        stages.begin("Going through the layers")
        settings |= {**chosen, "on_source": keep, "on_batch": stages.count, "folder": out}
        found = tm.evaluation.atlas(loaded, prompts, **settings)
        keep(found)
        stages.begin("Drawing")
        _draw(found, out / PAGE)
    terminal.print_atlas(found.table)
    echo(str((out / PAGE).resolve()))


def _draw(found: tm.evaluation.Atlas, path: Path) -> None:
    """One page with a figure for each number; it loads nothing from elsewhere."""
    from tl_melbo.plots import atlas_heatmap  # plotly takes long to import

    figures = []
    for value in ("singular_value", "share", "kl"):
        figure: Any = atlas_heatmap(found.table, value, title="")
        # The script once, with the first of them.
        drawn = figure.to_html(full_html=False, include_plotlyjs=not figures)
        label = html.escape(figure.layout.meta["alt"])
        figures.append(f'<figure role="img" aria-label="{label}">{drawn}</figure>')
    story = next(iter(found.libraries.values())).story
    texts = zip(story["prompts"], story["unsteered"], strict=True)
    baseline = [
        f"<dt>{html.escape(printable(prompt))}</dt><dd>{html.escape(printable(text))}</dd>"
        for prompt, text in texts
    ]
    told = {"model": html.escape(printable(str(story["model"]))), "baseline": "".join(baseline)}
    page = _PAGE.format(**told, figures="".join(figures))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def _layers(text: str, option: str) -> slice | list[int]:
    """Read a slice, or layers with commas between."""
    try:
        return options.read(text, range, option) if ":" in text else [*map(int, text.split(","))]
    except ValueError:
        raise ValueError(f"--{option}={text!r}: expected {_LAYERS}") from None


def _resolved(layers: slice | list[int], n_layers: int, option: str) -> list[int]:
    if isinstance(layers, list):
        return layers
    found = [*range(n_layers)[layers]]
    if not found:
        raise ValueError(
            f"--{option}={slice_text(layers)}: the model has {n_layers} layers, 0 to "
            f"{n_layers - 1}, and none of them is among these; pass others, or ':' for all"
        )
    return found
