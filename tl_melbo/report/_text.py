"""Texts and numbers as the page holds them: printable, cut, and each text only once."""

import json
import math
from numbers import Integral, Real
from typing import Any

from markupsafe import Markup

from tl_melbo.text import printable

# More of one text makes browsers slow, and nobody reads on.
_LONGEST_SHOWN = 20_000


# The number of each text: many vectors, negated, write what the unsteered model writes.
TextPool = dict[str, int]


def pooled(text: Any, pool: TextPool) -> int | None:
    """The number of a text, which may be new; None where there is none."""
    return pool.setdefault(shown(text), len(pool)) if isinstance(text, str) else None


def shown(value: Any) -> str:
    """Text for the page: printable, and cut where a browser would choke on it."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:#.4g}"
    text = str(value)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}… [cut: {len(text):,} characters in all]"
    return printable(text)


def number(value: Any) -> float | int | str | None:
    """A number as JSON has it: five digits, None for NaN, a sign for infinity."""
    if not isinstance(value, Real) or math.isnan(real := float(value)):
        return None
    if isinstance(value, Integral):
        return int(value)
    if math.isinf(real):
        return "∞" if real > 0 else "-∞"
    return float(f"{real:.5g}")


def as_json(value: Any) -> Markup:
    """JSON that cannot end the script element which holds it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
