"""`tl-melbo atlas`: all pairs of layers, as vectors, a table and a picture."""

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

TABLE, PAGE = "atlas.csv", "atlas.html"
_LAYERS = "'start:stop:step' or '4,8,16'."
_FIGURES: dict[str, Any] = {
    "Singular value": "singular_value",
    "Share of the sum of squares": "share",
    "KL to unsteered": "kl",
}
_HINT = (
    "Vectors, numbers and completions are in the files beside this page, which shows the first "
    "vector of each pair. Its singular value is its effect, to first order, at norm 1. Its KL is "
    "how far it moves the next token's distribution, for the sign that moves it more; completions "
    "show on hovering."
)


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
    """A page like that of a sweep, with a figure for each number."""
    from tl_melbo.plots import atlas_heatmap  # plotly takes long to import
    from tl_melbo.sweeps._page import page_of

    table, story = found.table, next(iter(found.libraries.values())).story
    n_pairs = len(table[["source_layer", "target_layer"]].drop_duplicates())
    page = page_of(
        {name: atlas_heatmap(table, value, title="") for name, value in _FIGURES.items()},
        kind="Atlas",
        heading=f"{terminal.counted(n_pairs, 'pair')} of layers",
        hint=_HINT,
        prompts=(),
        baseline=[*zip(story["prompts"], story["unsteered"], strict=True)],
        facts={"Model": story["model"]},
        columns=(),
        rows=(),
    )
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
