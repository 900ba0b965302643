"""The table of a sweep: one row a cell, in the grid's order."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tl_melbo.sweeps._grid import Cell
from tl_melbo.tables import Table

# In every table, whatever was searched.
_MEASURED: Mapping[str, str] = {
    "found": "Int64", "measure": "string", "measure_median": "Float64", "measure_max": "Float64",
    "kl_median": "Float64", "kl_max": "Float64", "unsteered": "string", "completion": "string",
    "vectors_sha256": "string", "seconds": "Float64",
}  # fmt: skip


def table_of(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> Table:
    """What is known of every cell; the status of those that were not searched is "waiting"."""
    rows = []
    for cell in cells:
        record = records.get(cell.folder, {})
        measured = record.get("row", {})
        row = {"folder": cell.folder, "status": record.get("status", "waiting")}
        row |= {name: record.get(name) or None for name in ("error", "warnings")}
        row |= cell.columns() | {name: measured.get(name) for name in _MEASURED}
        if not isinstance(row.get("radius"), int | float):
            row["radius"] = None  # "auto", and what came out is not known
        if measured.get("radius") is not None:
            row["radius"] = float(measured["radius"])
        rows.append(row | {"seconds": record.get("seconds")})
    options = dict.fromkeys(name for row in rows for name in row if name not in _MEASURED)
    table = Table({name: [row.get(name) for row in rows] for name in (*options, *_MEASURED)})
    return table.astype({name: _kind(name, rows) for name in table.columns})


def _kind(name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The narrowest type that all values of a column have; Parquet wants one."""
    if name in _MEASURED or name == "radius":
        return _MEASURED.get(name, "Float64")
    values = [row[name] for row in rows if row.get(name) is not None]
    kind = pd.array(values or [""]).dtype
    return kind if kind.name in ("boolean", "Int64", "Float64") else "string"
