"""What all figures have in common: colours, axes, and text that hovering shows."""

import html
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType

from tl_melbo.text import printable

# Blue to orange-red through near-white: apart for all common kinds of colour blindness, and the
# two ends are equally dark.
DIVERGING = "RdBu_r"
SEQUENTIAL = "Viridis"
# Okabe and Ito's colours, which are apart for all common kinds of colour blindness.
BLUE, PALE_BLUE = "#0072b2", "#56b4e9"
OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#57606a")
GREY = OTHERS[-1]
COLOURS = (BLUE, *OTHERS[:-1])
# For more things than there are colours.
LOOKS = [
    (colour, symbol)
    for symbol in ("circle", "square", "diamond", "triangle-up", "x")
    for colour in (*COLOURS, PALE_BLUE)
]
DOTTED = {"width": 1, "dash": "dot"}
# A logarithmic axis has no zero: what is smaller than this, in nats, is drawn there.
SMALLEST_KL = 1e-6

_LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, 'Noto Sans', sans-serif", "size": 13, "color": "#24292f"},
    "hoverlabel": {"align": "left", "bgcolor": "#ffffff", "font": {"color": "#24292f"}},
    # Under the axis, where it hides no point however many there are. Placed by the figure, not by
    # the plot: it then keeps its distance at any size.
    "legend": {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0.01},
}
_HOVER_LENGTH, _HOVER_WIDTH = 200, 60
# In pixels, for a title's letters: of a wide font, so that it fits in a narrower one, too.
_LETTER, _LINE = 10, 24


def figure(
    traces: BaseTraceType | Sequence[BaseTraceType],
    title: str,
    alt: str,
    across: dict[str, Any] | None = None,
    up: dict[str, Any] | None = None,
    width: int = 820,
    height: int = 520,
    **more: Any,
) -> go.Figure:
    """A figure of these traces, on these two axes.

    `alt` tells what it shows to who cannot see it, in `layout.meta["alt"]`. It is plain text: a
    page that shows it escapes it. A title that is wider than the figure gets more lines, and the
    figure their height.
    """
    lines = _lines(title, width)
    more_height = _LINE * max(0, len(lines) - 1)
    layout = {
        **_LAYOUT,
        "meta": {"alt": alt},
        "title": {"text": "<br>".join(lines) or None, "x": 0.02, "xanchor": "left"},
        "margin": {"l": 64, "r": 24, "t": 56 + more_height if title else 16, "b": 108},
        "width": width,
        "height": height + more_height,
        **more,
    }
    return go.Figure(traces, {**layout, "xaxis": across or {}, "yaxis": up or {}})


def _lines(title: str, width: int) -> list[str]:
    """A title cut at spaces, since a picture cuts off what is wider; one with tags stays whole."""
    if re.search(r"</?\w", title):
        return [title]
    return textwrap.wrap(title, width // _LETTER, break_long_words=False, break_on_hyphens=False)


def hovering(labels: Any) -> dict[str, Any]:
    """For a trace: what hovering over each of its places shows."""
    return {"customdata": labels, "hovertemplate": "%{customdata}<extra></extra>"}


def points(x: Any, y: Any, marker: dict[str, Any], **more: Any) -> go.Scatter:
    """A dot at each place; `marker` is how it looks."""
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, **more)


def line(
    x: Any, y: Any, look: dict[str, Any], marker: dict[str, Any] | None = None, **more: Any
) -> go.Scatter:
    """A line through all places, with a dot at each if `marker` says how it looks."""
    mode = "lines+markers" if marker else "lines"
    return go.Scatter(x=x, y=y, mode=mode, line=look, marker=marker, **more)


def heatmap(
    z: Any, hover: Any, name: str, low: float, high: float, colours: str = SEQUENTIAL, **more: Any
) -> go.Heatmap:
    """Cells coloured from `low` to `high`, what hovering over each shows, and a bar with a name."""
    look = {"colorscale": colours, "colorbar": colour_bar(name, side="bottom")}
    return go.Heatmap(
        z=z, zmin=low, zmax=high, hoverongaps=False, **look, **hovering(hover), **more
    )


def layers_heatmap(
    cells: pd.DataFrame, value: str, name: str, what: str, title: str, low: float = 0
) -> go.Figure:
    """A number of pairs of layers: the source across, the target up.

    Args:
        cells: a row a pair: source_layer, target_layer, the value, hover.
        what: the number in words, with what it is of, for who cannot see it.
    """
    z, hover = (
        cells.pivot(index="target_layer", columns="source_layer", values=each)
        for each in (value, "hover")
    )
    numbers = z.to_numpy(dtype=float, na_value=np.nan)
    high = float(np.nanmax(cells[value]))
    drawn = heatmap(numbers, hover.to_numpy(), name, low, high, x=[*z.columns], y=[*z.index])
    top: Any = cells.loc[cells[value].idxmax()]
    alt = (
        f"{what} for {len(cells)} pairs of layers: {span(cells[value])}, the largest from layer "
        f"{top['source_layer']} to {top['target_layer']}."
    )
    across = axis("source layer", showgrid=False, type="category")
    up = axis("target layer", showgrid=False, type="category")
    return figure(drawn, title, alt, across, up, 720, 680)


def axis(title: str | None, **more: Any) -> dict[str, Any]:
    """An axis with small ticks and a pale grid."""
    look = {"ticks": "outside", "ticklen": 4, "tickcolor": "#8c959f", "zeroline": False}
    named = {"title": {"text": title, "standoff": 8}} if title else {}
    return {**look, "gridcolor": "#eaeef2", **named, **more}


def log_axis(title: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times the powers of ten; at the powers alone where those are many."""
    wide = high >= 1e4 * low
    return axis(title, type="log", tickformat="~g", dtick=1 if wide else "D2", **more)


def colour_bar(title: str, side: str = "top", **more: Any) -> dict[str, Any]:
    """A bar of colours along the bottom of the figure."""
    name = {"title": {"text": title, "side": side}, "orientation": "h", "thickness": 10}
    return {**name, "len": 0.6, "yref": "container", "y": 0, "yanchor": "bottom", **more}


def span(values: Any, digits: int = 3) -> str:
    """For an alt text: the smallest and the largest of some numbers."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return "nothing finite"
    low, high = f"{min(finite):.{digits}g}", f"{max(finite):.{digits}g}"
    return low if low == high else f"{low} to {high}"


def of_vector(frame: pd.DataFrame, vector: int, called: str = "frame") -> pd.DataFrame:
    """The rows of one vector; a ValueError where there are none."""
    own = pd.DataFrame(frame[frame["vector"] == vector])
    if own.empty:
        raise ValueError(f"vector={vector}: the {called} has {sorted({*frame['vector']})}")
    return own


def whole_numbers(count: int) -> dict[str, Any]:
    """Ticks between whole numbers, which plotly makes where there are few, mean nothing here."""
    return {"tickformat": ",d", "dtick": 1} if count <= 12 else {"tickformat": ",d"}


def wrapped(text: str, length: int = _HOVER_LENGTH) -> str:
    """Text for a hover label: cut, wrapped, and with nothing in it that plotly takes for HTML."""
    short = printable(text[:length] if len(text) <= length else text[: length - 1] + "…")
    return "<br>".join(escaped(line) for line in textwrap.wrap(short, _HOVER_WIDTH))


def escaped(text: str) -> str:
    """Text in a figure: plotly knows tags, and would show the entity of a quotation mark."""
    return html.escape(text, quote=False)
