"""What stands in a folder beside its vectors: the settings, and tables that a spreadsheet opens."""

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_melbo.errors import Damaged
from tl_melbo.files import replacing
from tl_melbo.vectors import SteeringVectors

VECTORS, REFERENCE, LOCK = "vectors.safetensors", "theta0.safetensors", ".lock"
SETTINGS, REPORT = "settings.json", "report.html"
COMPLETIONS, SIDE_EFFECTS = "completions.csv", "side_effects.csv"
TABLE, COMPOSITION = "family.csv", "composition.csv"

_TEXTS = ("prompt", "completion")
# Columns whose empty cells are texts, not missing numbers.
_WORDS = (*_TEXTS, "kind", "members", "subset", "combination", "scaling", "stopped")
# Spreadsheets take the wide forms for the same.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


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


def load_settings(folder: Path) -> dict[str, Any]:
    """The model's name, and what else a folder says of itself. Raises Damaged."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"{path}: damaged ({error}); delete it, and name the model with --model, unless it is "
            "the bundled one",
            path,
        ) from error
    return settings


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV file that a spreadsheet can open without running what a model wrote."""
    safe = table.copy()
    for name in {*_TEXTS} & {*safe.columns}:
        safe[name] = [_defused(text) if isinstance(text, str) else "" for text in safe[name]]
    if "members" in safe:
        safe["members"] = [" ".join(map(str, members)) for members in safe["members"]]
    with replacing(path) as temporary:
        safe.to_csv(
            temporary,
            index=False,
            # All text in quotes: pandas forgets them around a lone carriage return.
            quoting=csv.QUOTE_NONNUMERIC,
            encoding="utf-8",
            errors="backslashreplace",
        )


def load_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read what `save_table` wrote. Raises Damaged, also where a column is missing."""
    csv.field_size_limit(2**27)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True))
        table = pd.DataFrame(rows, columns=header)
        missing = [name for name in columns if name not in table]
        if missing:
            raise ValueError(f"lacks the columns {missing}")
        for name in {*header} - {*_WORDS}:
            table[name] = pd.to_numeric(table[name])
        for name in {*_TEXTS} & {*header}:
            table[name] = [_original(text) for text in table[name]]
        if "members" in table:
            table["members"] = [tuple(map(int, text.split())) for text in table["members"]]
    except (ValueError, TypeError, csv.Error) as error:
        raise Damaged(
            f"{path}: not a table that tl-melbo wrote, or damaged ({error}); delete it, and run "
            "the command again",
            path,
        ) from error
    return table


def _defused(text: str) -> str:
    """Keep a spreadsheet from running text as a formula (OWASP, "CSV injection").

    What has apostrophes in front already gets one more, so that `_original` can take one away.
    """
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA_STARTS) else text


def _original(text: str) -> str:
    defused = text.startswith("'") and text.lstrip("'").startswith(_FORMULA_STARTS)
    return text[1:] if defused else text
