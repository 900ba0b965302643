"""The table of a sweep as figures: over layers, and over radius."""

from itertools import cycle
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_melbo import checks
from tl_melbo.plots import _style
from tl_melbo.plots._style import LOOKS, axis, figure, hovering, line, span
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import groups

SweepValue = Literal["kl_median", "kl_max", "measure_median", "measure_max"]

_ADVICE = "pass the table that tm.sweep returns"
_PLACE = ("source_layer", "target_layer", "radius", "model", "method", "measure", "completion")
_TITLES = {
    "kl_median": "median KL (nats)",
    "kl_max": "largest KL (nats)",
    "measure_median": "median {}",
    "measure_max": "largest {}",
}


@shape_checked
def sweep_layers(
    table: pd.DataFrame, value: SweepValue = "kl_median", title: str = "Over layers"
) -> go.Figure:
    """Draw a number of every pair of layers: its source across, its target up.

    Where several searches of the table have the same layers, the median of them.

    Args:
        table: of `tm.sweep`, or the rows of it that are to be compared.
    """
    rows = _searched(table, value)
    place = ["source_layer", "target_layer"]
    pairs = [
        (*pair, some[value].median(), _told(some, value))
        for pair, some in groups(rows, place).items()
    ]
    cells = pd.DataFrame(pairs, columns=[*place, value, "hover"]).sort_values(place)
    name, low = _title(rows, value), min(0.0, float(np.nanmin(cells[value])))
    return _style.layers_heatmap(cells, value, name, name, title, low)


@shape_checked
def sweep_radius(
    table: pd.DataFrame, value: SweepValue = "kl_median", title: str = "Over radius"
) -> go.Figure:
    """Draw a number against the vectors' norm: a curve for each model, method and pair of layers.

    Where several searches of a curve have the same radius, the median of them. Where there are
    more curves than can be told apart, there is one for each model and method.

    Args:
        table: of `tm.sweep`.
    """
    rows = _searched(table, value)
    rows = pd.DataFrame(rows[rows["radius"].notna()])
    checks.columns(rows, ("radius",), "table", "its searches have no radius that is known")
    by = ["model", "method", "source_layer", "target_layer"]
    if len(groups(rows, by)) > len(LOOKS):  # too many to be told apart
        by = by[:2]
    told, traces = [], []
    curves = zip(groups(rows, by).items(), cycle(LOOKS), strict=False)
    for (key, some), (colour, symbol) in curves:
        name = _curve_name(dict(zip(by, key, strict=True)), rows)
        by_radius = groups(some.sort_values("radius"), ["radius"])
        x = [float(radius) for (radius,) in by_radius]
        y = [float(np.median(each[value])) for each in by_radius.values()]
        hover = [f"{_style.wrapped(name)}<br>{_told(each, value)}" for each in by_radius.values()]
        shown = {"name": _style.wrapped(name, 60), **hovering(hover)}
        look, dots = {"width": 1.8, "color": colour}, {"size": 8, "symbol": symbol}
        traces.append(line(x, y, look, dots, **shown))
        told.append(f"{name}: {y[0]:.3g} at {x[0]:g} to {y[-1]:.3g} at {x[-1]:g}")
    named = _title(rows, value)
    alt = f"{named} against radius. {'; '.join(told)}."
    across, up = axis("radius (residual-stream units)"), axis(named, rangemode="tozero")
    return figure(traces, title, alt, across, up, showlegend=len(traces) > 1)


def _searched(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The rows that have the number; a ValueError where none has."""
    checks.columns(table, (*_PLACE, *get_args(SweepValue)), "table", _ADVICE)
    rows = pd.DataFrame(table[table[value].notna()])
    checks.columns(rows, (value,), "table", f"no search of it has {value}; look at its errors")
    return rows.astype({value: float})


def _title(rows: pd.DataFrame, value: str) -> str:
    measures = dict.fromkeys(rows["measure"].dropna())
    return _TITLES[value].format(_style.wrapped(" / ".join(measures)) or "measure")


def _curve_name(place: dict[str, Any], rows: pd.DataFrame) -> str:
    """What tells one curve from the others; the layers, where nothing does."""
    names = [str(place[name]) for name in ("model", "method") if len({*rows[name]}) > 1]
    if "source_layer" in place:
        names.append(f"{place['source_layer']} → {place['target_layer']}")
    return ", ".join(names) or "median of all pairs of layers"


def _told(rows: pd.DataFrame, value: str) -> str:
    """What hovering tells: the number, of how many searches, and the strongest one's text."""
    top: Any = rows.loc[rows[value].idxmax()]
    told = [f"{value.replace('_', ' ')} {np.median(rows[value]):.4g}"]
    if len(rows) > 1:
        told.append(f"median of {len(rows)} searches, {span(rows[value])}; of the largest:")
    told.append(f"layer {top['source_layer']} to {top['target_layer']}, radius {top['radius']:.4g}")
    if isinstance(top["completion"], str):
        told.append(f"<br>{_style.wrapped(top['completion'])}")
    return "<br>".join(told)
