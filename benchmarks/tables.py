"""Tables as Markdown, and the numbers of RESULTS.md."""

import re
from pathlib import Path

import pandas as pd


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[str(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(row: str) -> float:
    """The number that stands in a row of RESULTS.md."""
    text = Path(__file__).with_name("RESULTS.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\| {re.escape(row)} \| \**([\d.]+)", text, re.MULTILINE)
    return float(found)
