"""Tables as CSV files that a spreadsheet may open, and back without a loss."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tl_melbo.errors import Damaged
from tl_melbo.files import replacing

_TEXTS = ("prompt", "completion")
# Columns whose empty cells are texts, not missing numbers.
_WORDS = (*_TEXTS, "kind", "members", "subset", "combination", "scaling")
# Spreadsheets take the wide forms for the same.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_MOST_BYTES = 2**30


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
        Damaged: the file cannot be read, or lacks a column.
    """
    csv.field_size_limit(2**27)
    try:
        if path.stat().st_size > _MOST_BYTES:
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
        raise damaged(path, error) from error
    return table


def damaged(path: Path, why: object = "") -> Damaged:
    """What to raise of a table that this package did not write like that."""
    because = f" ({why})" if why else ""
    return Damaged(
        f"{path}: not a table that tl-melbo wrote, or damaged{because}; delete it, and run the "
        "command again",
        path,
    )


def _defused(text: str) -> str:
    """Keep a spreadsheet from running text as a formula (OWASP, "CSV injection").

    What has apostrophes in front already gets one more, so that `_original` can take one away.
    """
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA_STARTS) else text


def _original(text: str) -> str:
    defused = text.startswith("'") and text.lstrip("'").startswith(_FORMULA_STARTS)
    return text[1:] if defused else text
