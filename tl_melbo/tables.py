"""Tables that a notebook shows whole: texts wrapped, numbers short, nothing in them run."""

import html
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import pandas as pd

from tl_melbo.text import printable

# A table longer than this shows its ends; a text longer than this, its beginning.
_MOST_ROWS = 60
_MOST_CHARACTERS = 600
_TEXT_STYLE = "text-align:left; white-space:pre-wrap; overflow-wrap:anywhere; min-width:12em"
_NUMBER_STYLE = "text-align:right; vertical-align:top"


class Table(pd.DataFrame):
    """A pandas frame, like any other but for how a notebook shows it."""

    @property
    def _constructor(self) -> type["Table"]:
        return Table

    def _repr_html_(self) -> str:
        shown = self
        left_out = max(0, len(self) - _MOST_ROWS)
        if left_out:
            shown = pd.concat([self.head(_MOST_ROWS // 2), self.tail(_MOST_ROWS // 2)])
        header = "".join(
            f'<th style="text-align:left">{_text(str(name))}</th>' for name in self.columns
        )
        rows = [
            f"<tr><th>{_text(str(label))}</th>{''.join(map(_cell, row))}</tr>"
            for label, row in zip(shown.index, shown.itertuples(index=False), strict=True)
        ]
        if left_out:
            gap = f'<tr><td colspan="{len(self.columns) + 1}">… {left_out} more rows …</td></tr>'
            rows.insert(_MOST_ROWS // 2, gap)
        head, body = f"<tr><th></th>{header}</tr>", "".join(rows)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def groups(frame: pd.DataFrame, names: Sequence[str]) -> dict[tuple[Any, ...], pd.DataFrame]:
    """The rows that agree in these columns, in the order in which they come; NaN is a value."""
    grouped: Any = frame.groupby(list(names), sort=False, dropna=False)
    return {key: pd.DataFrame(some) for key, some in grouped}


def _cell(value: Any) -> str:
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        shown = str(value) if isinstance(value, Integral) else f"{number:.4g}"
        shown = "–" if math.isnan(number) else shown
        return f'<td style="{_NUMBER_STYLE}">{shown}</td>'
    missing = value is None or value is pd.NA
    return f'<td style="{_TEXT_STYLE}">{_text("–" if missing else str(value))}</td>'


def _text(text: str) -> str:
    cut = f"… [{len(text):,} characters]" if len(text) > _MOST_CHARACTERS else ""
    return html.escape(printable(text[:_MOST_CHARACTERS]) + cut)
