"""The files of a run's folder: vectors, settings, tables that a spreadsheet opens, a lock."""

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.files import clear_partial, replacing, writable_folder
from tl_melbo.stored import Kept
from tl_melbo.text import defused, undefused
from tl_melbo.vectors import SteeringVectors

VECTORS, REFERENCE, LOCK = "vectors.safetensors", "theta0.safetensors", ".lock"
SETTINGS, REPORT, NOTES = "settings.json", "report.html", "notes.json"
COMPLETIONS, SIDE_EFFECTS = "completions.csv", "side_effects.csv"
RANDOM = "random_completions.csv"
TABLE, COMPOSITION = "family.csv", "composition.csv"

# What each table has at least.
_COLUMNS = {
    COMPLETIONS: ("vector", "scale", "prompt", "completion"),
    RANDOM: ("vector", "scale", "prompt", "completion"),
    SIDE_EFFECTS: ("vector", "kl_target", "kl_unrelated", "specificity", "loss_increase"),
    TABLE: ("kind", "index", "norm", "completion"),
    COMPOSITION: ("size", "members", "completion"),
}
_TEXTS = ("prompt", "completion")
# Columns whose empty cells are texts, not missing numbers.
_WORDS = (*_TEXTS, "kind", "members", "subset", "combination", "scaling", "stopped")
# What the settings may be that this package reads.
_SETTINGS: dict[str, Any] = {
    "model": str | None, "max_new_tokens": int | None,
    "n_samples": int | None, "temperature": float | int | None, "scales": list | None,
    "texts_of": str | None, "side_effects_of": str | None, "random_texts_of": list | None,
}  # fmt: skip


@contextmanager
def locked(folder: Path, lock: FileLock, patience: float = 0) -> Iterator[None]:
    """Keep a folder for this process; one made for it in which nothing was saved is removed."""
    existed = folder.exists()
    writable_folder(folder)
    try:
        lock.acquire(patience, blocking=patience > 0)
    except Timeout:
        raise BlockingIOError(
            f"{folder}: another process is writing here; wait for it, or choose another folder"
        ) from None
    try:
        for each in (folder, *folder.glob(family_folder(Path(), "*").name)):
            clear_partial(each)
        yield
    finally:
        with suppress(OSError):  # another process has just begun here, or the folder is gone
            if not existed and {item.name for item in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


def load_kept(path: Path, kind: type[Kept]) -> Kept | None:
    """What an earlier call left; None if there is nothing."""
    if not path.is_file():
        return None
    try:
        return kind.load(path)
    except Damaged as error:
        raise Damaged(
            f"{error}; or pass overwrite=True to replace it, or choose another folder", path
        ) from error


def load_vectors(place: Path, theta0: SteeringVectors | None = None) -> SteeringVectors | None:
    """The library that an earlier call left, or the family of `theta0`; None if nothing."""
    found, reference = load_kept(place / VECTORS, SteeringVectors), place / REFERENCE
    if not found or theta0 is None:
        return found or None
    known = reference.is_file()
    if not known or not torch.equal(SteeringVectors.load(reference).vectors, theta0.vectors):
        raise ValueError(
            f"{place}: holds the family of another vector of that number, or lacks {REFERENCE}; "
            "pass overwrite=True to begin anew, or choose another folder"
        )
    return found


def load_family(place: Path) -> tuple[SteeringVectors, SteeringVectors]:
    """The vectors of a family, and its theta0."""
    return SteeringVectors.load(place / VECTORS), SteeringVectors.load(place / REFERENCE)


def family_folder(folder: Path, vector: int | str) -> Path:
    """Where the family of one vector of a run is saved."""
    return folder / f"ortho-{vector}"


def digest(vectors: SteeringVectors) -> str:
    """What tells one library's numbers from another's."""
    return hashlib.sha256(vectors.vectors.contiguous().numpy().tobytes()).hexdigest()


def absolute(model: str | None) -> str | None:
    """A model's name, so that it still means the same from another folder."""
    if model is not None and Path(model).expanduser().exists():
        return str(Path(model).expanduser().resolve())
    return model


def load_settings(folder: Path, overwrite: bool = False) -> dict[str, Any]:
    """What a folder says of itself. Raises Damaged, or gives nothing where it is to be replaced."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = {**json.loads(path.read_text(encoding="utf-8"))}
        for name, kind in _SETTINGS.items():
            if not isinstance(settings.get(name), kind):
                raise ValueError(f"{name!r} cannot be {settings[name]!r}")
    except (TypeError, ValueError, RecursionError) as error:
        if overwrite:
            return {}
        raise Damaged(
            f"{path}: damaged ({error}); delete it, and pass the model as model=...", path
        ) from error
    return settings


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what `load_settings` reads."""
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    with replacing(folder / SETTINGS) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV file that a spreadsheet can open without running what a model wrote."""
    safe = table.copy()
    for name in {*_TEXTS} & {*safe.columns}:
        safe[name] = [defused(text) if isinstance(text, str) else "" for text in safe[name]]
    if "members" in safe:
        safe["members"] = [" ".join(map(str, members)) for members in safe["members"]]
    # All text in quotes: pandas forgets them around a lone carriage return.
    with replacing(path) as temporary:
        safe.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC, errors="backslashreplace")


def load_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read what `save_table` wrote. Raises Damaged, also where a column is missing."""
    columns = columns or _COLUMNS[path.name]
    limit = csv.field_size_limit(2**27)  # of the whole process
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True))
        if any(len(row) != len(header) for row in rows):
            raise ValueError("a row is cut")
        table = pd.DataFrame(rows, columns=header)
        if missing := [name for name in columns if name not in table]:
            raise ValueError(f"lacks the columns {missing}")
        for name in {*header} - {*_WORDS}:
            table[name] = pd.to_numeric(table[name])
        for name in {*_TEXTS} & {*header}:
            table[name] = [undefused(text) for text in table[name]]
        if "members" in table:
            table["members"] = [tuple(map(int, text.split())) for text in table["members"]]
        if path.name == COMPLETIONS:
            _check_completions(table)
    except (ValueError, TypeError, csv.Error) as error:
        raise Damaged(
            f"{path}: not a table that tl-melbo wrote, or damaged ({error}); delete it", path
        ) from error
    finally:
        csv.field_size_limit(limit)
    return table


def _check_completions(table: pd.DataFrame) -> None:
    if not all(map(math.isfinite, table["scale"])):
        raise ValueError("a scale is not a finite number")
    if not all(map(str.strip, table["prompt"])):
        raise ValueError("a prompt is blank")
    if {*table["prompt"]} != {*table.loc[table["vector"] == -1, "prompt"]}:
        raise ValueError("a prompt has no baseline (vector -1)")


def another_search(place: Path, reason: str, differing: list[Any]) -> DifferentSearch:
    return DifferentSearch(
        f"{place}: holds vectors of another search, {reason}; ask for the same to continue it, "
        "pass overwrite=True to begin anew, or choose another folder",
        differing,
        reason,
    )


def n_tried(found: SteeringVectors | None) -> int:
    """How many vectors a search has been through, lost ones included."""
    return 0 if found is None else int(found.columns["index"].max()) + 1
