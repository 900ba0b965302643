"""A run's folder: what a command left there, written whole and read back."""

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_melbo.analysis._family import Family
from tl_melbo.analysis._side_effects import COLUMNS as SIDE_EFFECT_COLUMNS
from tl_melbo.files import replacing
from tl_melbo.run import REFERENCE, VECTORS, family_folder, same_vector
from tl_melbo.vectors import SteeringVectors

COMPLETIONS, REPORT, SETTINGS = "completions.csv", "report.html", "settings.json"
TABLE, COMPOSITION = "family.csv", "composition.csv"
SIDE_EFFECTS = "side_effects.csv"
_TEXTS = ("prompt", "completion")
# Columns whose empty cells are texts, not missing numbers.
_WORDS = (*_TEXTS, "kind", "members", "subset", "combination", "scaling")
# Spreadsheets take the wide forms for the same.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_MOST_SETTINGS_BYTES = 2**20
_MOST_TABLE_BYTES = 2**30


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep what a command was asked for."""
    with replacing(folder / SETTINGS) as temporary:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def load_settings(folder: Path) -> dict[str, Any]:
    """What a command was asked for; nothing if that is not known.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MOST_SETTINGS_BYTES:
            raise ValueError("too large")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it, and name the model with --model, unless it is "
            "the embedded one"
        ) from error
    return settings


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV file that a spreadsheet can open without running what a model wrote."""
    safe = table.copy()
    for name in _TEXTS:
        if name in safe:
            safe[name] = [_defused(text) if isinstance(text, str) else "" for text in safe[name]]
    if "members" in safe:
        safe["members"] = [" ".join(map(str, members)) for members in safe["members"]]
    with replacing(path) as temporary:
        # All text in quotes: pandas forgets them around a lone carriage return.
        safe.to_csv(
            temporary,
            index=False,
            quoting=csv.QUOTE_NONNUMERIC,
            encoding="utf-8",
            errors="backslashreplace",
        )


def load_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read what `save_table` wrote.

    Raises:
        ValueError: the file is damaged, or lacks a column.
    """
    csv.field_size_limit(2**27)
    try:
        if path.stat().st_size > _MOST_TABLE_BYTES:
            raise ValueError("too large")
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True))
        if len(set(header)) < len(header):
            raise ValueError("two columns of one name")
        table = pd.DataFrame(rows, columns=header)
        missing = [name for name in columns if name not in table]
        if missing:
            raise ValueError(f"lacks the columns {missing}")
        for name in set(table.columns) - {*_WORDS, "stopped"}:
            table[name] = pd.to_numeric(table[name])
        for name in {*_TEXTS} & set(table.columns):
            table[name] = [_original(text) for text in table[name]]
        if "members" in table:
            table["members"] = [tuple(map(int, text.split())) for text in table["members"]]
    except (ValueError, TypeError, csv.Error, MemoryError) as error:
        raise ValueError(
            f"{path}: not a table that tl-melbo wrote, or damaged ({error}); delete it, and run "
            "the command again"
        ) from error
    return table


def digest(vectors: SteeringVectors) -> str:
    """What tells one library's numbers from another's."""
    return hashlib.sha256(vectors.vectors.contiguous().numpy().tobytes()).hexdigest()


def load_completions(
    folder: Path, vectors: SteeringVectors | None = None, max_new_tokens: int | None = None
) -> pd.DataFrame | None:
    """The texts that a folder holds, if they are those of these vectors and of this length.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / COMPLETIONS
    if not path.is_file():
        return None
    table = load_table(path, ("vector", "scale", *_TEXTS))
    numbers = table[["vector", "scale"]].to_numpy(dtype=float)
    whole = np.isfinite(numbers).all() and (numbers[:, 0] == np.round(numbers[:, 0])).all()
    if not whole or not table["prompt"].str.strip().all():
        raise ValueError(
            f"{path}: not a table that tl-melbo wrote, or damaged; delete it, and run the command "
            "again"
        )
    if vectors is None:
        return table
    settings, own = load_settings(folder), digest(vectors)
    same = settings.get("texts_of", own) == own
    same &= settings.get("max_new_tokens") in (None, max_new_tokens)
    same &= sorted(set(table["vector"])) == list(range(-1, len(vectors)))
    return table if same else None


def save_side_effects(folder: Path, vectors: SteeringVectors, table: pd.DataFrame) -> None:
    """Keep what the vectors cost elsewhere, and of which vectors that was measured."""
    save_table(folder / SIDE_EFFECTS, table)
    save_settings(folder, {**load_settings(folder), "side_effects_of": digest(vectors)})


def drop_side_effects(folder: Path) -> None:
    """Forget what vectors cost that are no longer there."""
    settings = load_settings(folder)
    if settings.pop("side_effects_of", None) is not None:
        (folder / SIDE_EFFECTS).unlink(missing_ok=True)
        save_settings(folder, settings)


def check_side_effects(folder: Path, to_be_measured: bool = False) -> None:
    """Make sure, before the work, that a table of side effects can be read, or be replaced.

    Raises:
        ValueError: the file is damaged; or no run left it, and it would be replaced.
    """
    path = folder / SIDE_EFFECTS
    if not path.is_file():
        return
    if "side_effects_of" in load_settings(folder):
        load_table(path, SIDE_EFFECT_COLUMNS)
    elif to_be_measured:
        raise ValueError(
            f"{path}: no run left it; move it elsewhere, or pass --overwrite to replace it and the "
            "run"
        )


def load_side_effects(folder: Path, vectors: SteeringVectors) -> pd.DataFrame | None:
    """What a folder's vectors cost elsewhere, if that was measured of these vectors.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / SIDE_EFFECTS
    if not path.is_file() or load_settings(folder).get("side_effects_of") != digest(vectors):
        return None
    table = load_table(path, SIDE_EFFECT_COLUMNS)
    if [*table["vector"]] != [*range(len(vectors))]:
        raise ValueError(
            f"{path}: not a table that tl-melbo wrote, or damaged; delete it, and run the command "
            "again"
        )
    return table


def load_families(folder: Path, library: SteeringVectors) -> list[Family]:
    """The finished families of a run's vectors, by number of vector.

    Families of vectors that the library no longer holds, of an earlier run in this folder, are
    left out, and so are those whose measurements are not there yet.

    Raises:
        ValueError: a file is damaged.
    """
    families = []
    for position, index in enumerate(library.columns["index"].tolist()):
        place = family_folder(folder, index)
        if not all((place / name).is_file() for name in (VECTORS, REFERENCE, TABLE, COMPOSITION)):
            continue
        reference = SteeringVectors.load(place / REFERENCE)
        if not same_vector(reference, library[position]):
            continue
        vectors = SteeringVectors.load(place / VECTORS)
        table = load_table(place / TABLE, ("kind", "index", "norm", "completion"))
        measured = table.loc[table["kind"] == "family", "norm"].to_numpy()
        if len(measured) != len(vectors) or not np.allclose(measured, vectors.norms, rtol=1e-3):
            continue  # of other vectors, or measured before the last ones came
        composed = load_table(place / COMPOSITION, ("size", "members", "completion"))
        families.append(Family(reference, vectors, table, composed))
    return families


def _defused(text: str) -> str:
    """Keep a spreadsheet from running text as a formula (OWASP, "CSV injection").

    What has apostrophes in front already gets one more, so that `_original` can take one away.
    """
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA_STARTS) else text


def _original(text: str) -> str:
    defused = text.startswith("'") and text.lstrip("'").startswith(_FORMULA_STARTS)
    return text[1:] if defused else text
