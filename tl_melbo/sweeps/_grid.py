"""A grid of searches as a list of cells, all of them checked before any work."""

import hashlib
import inspect
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tl_melbo import checks, options
from tl_melbo.model.load import BUNDLED_NAME
from tl_melbo.run import absolute
from tl_melbo.story import model_of, slice_from_json, slice_text
from tl_melbo.text import did_you_mean

Grid = Mapping[str, Any] | Sequence[Mapping[str, Any]]

# What a search is asked for beside a prompt and its method's settings.
_DEFAULTS = {
    "model": None, "dtype": "float32", "chat": True, "source_layer": 8, "target_layer": 16,
    "method": "melbo", "other": [], "max_new_tokens": None, "name": None,
}  # fmt: skip
# What some of it may be; `_cell` checks the others.
_KINDS: Mapping[str, Any] = {
    "dtype": Literal["float32", "float64", "bfloat16", "float16"],
    "chat": bool,
    "source_layer": int,
    "target_layer": int,
    "max_new_tokens": int | None,
}
_MOST_CELLS = 20_000
_LAYERS = ("source_layer", "target_layer")
# Not that of a file of the sweep itself.
_FOLDER = re.compile(r"(?!(?i:sweep)\.)[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Cell:
    """One search: where it is kept, and all that it is asked for.

    `facts` are of JSON, with the method's defaults; `settings` are the method's arguments.
    """

    folder: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    n_vectors: int
    max_new_tokens: int | None

    @property
    def model(self) -> tuple[str | None, str]:
        """What tells the model of one cell from that of another: its name and its dtype."""
        return self.facts["model"], self.facts["dtype"]

    def columns(self) -> dict[str, Any]:
        """What the table tells of the cell before it is searched."""
        told: dict[str, Any] = {**self.facts, "n_vectors": self.n_vectors}
        settings = told.pop("settings")
        told["model"] = model_of({"model": told["model"] or BUNDLED_NAME})
        told |= {name: "\n".join(told[name]) for name in ("prompt", "other")}
        if "positions" in settings:
            settings = {**settings, "positions": slice_text(slice_from_json(settings["positions"]))}
        return told | settings


def read_grid(path: Path) -> Any:
    """What a YAML file holds; a ValueError where it is none."""
    yaml = checks.installed("yaml", f"{path}", "sweep")
    if not path.is_file():
        raise FileNotFoundError(f"grid={str(path)!r}: no such file; pass a YAML file of options")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not YAML ({' '.join(str(error).split())}); a text that begins with - or * or "
            "holds a colon needs quotes, such as positions: '-3:'"
        ) from None


def cells_of(grid: Grid) -> list[Cell]:
    """The cells of a grid, or of a list of grids, in their order.

    Raises:
        ValueError: an option that neither a sweep nor the method has, or a value that it cannot
            have; no search at all; two with one folder.
    """
    grids = [grid] if isinstance(grid, Mapping) else grid
    if not isinstance(grids, Sequence) or isinstance(grids, str) or not grids:
        raise ValueError(
            "grid: expected options with their values, or a list of such; see docs/sweeps.md"
        )
    cells: dict[str, tuple[Cell, str]] = {}
    for number, each in enumerate(grids):
        where = "grid" if isinstance(grid, Mapping) else f"grid[{number}]"
        if not isinstance(each, Mapping) or not all(isinstance(name, str) for name in each):
            raise ValueError(
                f"{where}: expected options with their values, such as radius: [8, 12]"
            )
        for told, chosen in _product(each, where):
            cell = _cell(chosen, told)
            if cell.folder in cells:
                same = "the same search, but for n_vectors or max_new_tokens"
                raise ValueError(
                    f"{cells[cell.folder][1]} and {told}: both are kept in {cell.folder!r}, "
                    f"{'their name' if chosen['name'] else same}; leave one out, or give each a "
                    "name of its own, as name=..."
                )
            cells[cell.folder] = cell, told
    return [cell for cell, _ in cells.values()]


def _product(grid: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of the values, and what to call it in a message."""
    axes = {
        name: list(value) if isinstance(value, (list, tuple, range)) else [value]
        for name, value in grid.items()
    }
    _check_names(axes, where)
    if empty := [name for name, values in axes.items() if not values]:
        raise ValueError(f"{where}: {empty[0]} is an empty list; leave it out, or give it values")
    if (count := math.prod(map(len, axes.values()))) > _MOST_CELLS:
        raise ValueError(
            f"{where}: {count:,} searches; at most {_MOST_CELLS:,}; make several grids"
        )
    if "prompt" not in axes:
        raise ValueError(f"{where}: needs a prompt; add prompt: Tell me about yourself.")
    several = any(len(axes.get(name, [])) > 1 for name in _LAYERS)
    n_found = 0
    for values in itertools.product(*axes.values()):
        chosen = {**_DEFAULTS, **dict(zip(axes, values, strict=True))}
        varied = [f"{name}={chosen[name]!r}" for name in axes if len(axes[name]) > 1]
        told = f"{where} with {', '.join(varied)}" if varied else where
        source, target = (_read(told, name, chosen[name]) for name in _LAYERS)
        if 0 <= source < target:
            n_found += 1
            yield told, chosen
        elif not several or min(source, target) < 0:  # a product of layers has the others
            raise ValueError(
                f"{told}: source_layer={source}, target_layer={target}: the source comes before "
                "the target, and the first layer is 0"
            )
    if not n_found:
        raise ValueError(f"{where}: no source_layer comes before any target_layer; choose others")


def _check_names(axes: Mapping[str, list[Any]], where: str) -> None:
    """Every option is one of a sweep, or one of some method."""
    methods = options.methods().values()
    of_methods = {name for each in methods for name in inspect.signature(each).parameters}
    known = {"prompt", *_DEFAULTS, *of_methods} - {*options.OWN}
    for name in axes:
        if name not in known:
            hint = did_you_mean(name, known) or "docs/sweeps.md lists them"
            raise ValueError(f"{where}: no option {name!r} of a sweep or of a method; {hint}")


def _cell(chosen: Mapping[str, Any], where: str) -> Cell:
    place = {name: _read(where, name, chosen[name]) for name in _KINDS}
    model, name = chosen["model"], chosen["name"]
    if not isinstance(model, str | None) or model == "":
        raise ValueError(f"{where}: model={model!r}: a hub id, a folder, a file, or null")
    if name is not None and not (isinstance(name, str) and _FOLDER.fullmatch(name)):
        raise ValueError(
            f"{where}: name={name!r}: names a folder; letters, digits, '-', '_', '.' and '+', "
            "with no 'sweep.' at the start"
        )
    texts = {each: _texts(chosen[each], each, where) for each in ("prompt", "other")}
    given = {
        key: slice_text(value) if isinstance(value, slice) else value
        for key, value in chosen.items()
        if key not in {"prompt", *_DEFAULTS}
    }
    try:
        checks.as_texts(texts["prompt"], "prompt")
        checks.at_least(1, max_new_tokens=place["max_new_tokens"])
        method = options.method_named(str(chosen["method"]))
        asked = options.asked(method, given, (), texts["other"])
    except (ValueError, TypeError) as error:
        # The message is one of a shell's.
        raise ValueError(f"{where}: {re.sub(r'--(set )?', '', str(error))}") from None
    settings = {**asked.story["hyperparameters"]}
    n_vectors = settings.pop("n_vectors")
    if asked.story["seed"] is not None:
        settings["seed"] = asked.story["seed"]
    length = place.pop("max_new_tokens")
    facts = {
        "model": absolute(model), **texts, **place, "method": method.__name__, "settings": settings
    }  # fmt: skip
    folder = name or _folder(facts)
    return Cell(folder, facts, asked.settings, n_vectors, length)


def _read(where: str, name: str, value: Any) -> Any:
    """The value of an option that is neither a text nor the method's."""
    try:
        return options.read(str(value), _KINDS[name], name)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('--')}") from None


def _texts(value: Any, name: str, where: str) -> list[str]:
    """One text or, in a list within the list, several of one search."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where}: {name}={value!r}: expected a text, or a list of texts for one search, which "
            f"in a grid is a list in a list: {name}: [[Hello., Good bye.]]"
        )
    return [*texts]


def _folder(facts: Mapping[str, Any]) -> str:
    """A name that the same search has in every grid: what is readable of it, and a digest."""
    model = model_of({"model": facts["model"] or BUNDLED_NAME}) or "model"
    words = re.sub(r"[^\w.-]+", "-", model.split("/")[-1]).strip("-._")[:40] or "model"
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    layers = f"{facts['source_layer']}-{facts['target_layer']}"
    return f"{words}_{facts['method']}_{layers}_{digest}"
