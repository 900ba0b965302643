"""Experiments with judges and counts, and sweeps, as figures."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_melbo import checks
from tl_melbo.analysis._rates import STEERINGS
from tl_melbo.evaluation import Score
from tl_melbo.plots import _style
from tl_melbo.plots._style import COLOURS, DOTTED, GREY, axis, figure, hovering, line
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import groups

SweepValue = Literal["kl_median", "kl_max", "measure_median", "measure_max"]

_RATE = ("rate", "low", "high")
# More bars than this are not told in words.
_MOST_TOLD = 24
_ADVICE = "pass the frame as the experiment returned it"
_PLACE = ("source_layer", "target_layer", "radius", "model", "method", "measure", "completion")
_TITLES = {
    "kl_median": "median KL (nats)",
    "kl_max": "largest KL (nats)",
    "measure_median": "median {}",
    "measure_max": "largest {}",
}
# Where the share of coherent completions is lower, a point is open.
_COHERENT = 0.5


@shape_checked
def dose_response(
    table: pd.DataFrame, unit: str = "mean count", title: str = "Count against scale"
) -> go.Figure:
    """Draw a count against the scale, with its interval: vectors in colour, random ones in grey.

    Open points: fewer than half of the completions are coherent.

    Args:
        table: of a `DoseResponse`.
        unit: what is counted, for the axis.
    """
    columns = ("steering", "vector", "scale", "mean", "low", "high", "coherent", "n", "greedy")
    checks.columns(table, columns, "table", _ADVICE)
    unsteered = pd.DataFrame(table[table["steering"] == "unsteered"])
    steered = pd.DataFrame(table[table["steering"] == "vector"])
    traces = [
        _dose(table, vector, "random", f"random, as long as {vector}", GREY, unsteered)
        for vector in dict.fromkeys(table["vector"][table["steering"] == "random"])
    ]
    traces += [
        _dose(table, vector, "vector", f"vector {vector}", colour, unsteered)
        for vector, colour in zip(dict.fromkeys(steered["vector"]), cycle(COLOURS), strict=False)
    ]
    ends = [
        f"vector {vector}: {some['mean'].iloc[0]:.3g} at {some['scale'].iloc[0]:g}, "
        f"{some['mean'].iloc[-1]:.3g} at {some['scale'].iloc[-1]:g}"
        for vector, some in steered.sort_values("scale").groupby("vector")
    ]
    zero = "".join(f" Unsteered: {mean:.3g}." for mean in unsteered["mean"])
    alt = f"{unit.capitalize()} against the scale of the vector. {'; '.join(ends)}.{zero}"
    drawn = figure(traces, title, alt, axis("scale"), axis(unit), showlegend=len(traces) > 1)
    for mean in unsteered["mean"]:
        drawn.add_hline(mean, line=DOTTED | {"color": GREY})
    return drawn


def _dose(
    table: pd.DataFrame, vector: int, kind: str, name: str, colour: str, unsteered: pd.DataFrame
) -> go.Scatter:
    own = pd.DataFrame(table[(table["steering"] == kind) & (table["vector"] == vector)])
    rows = pd.concat([own, unsteered]).sort_values("scale")
    hover = [
        f"{name if row['scale'] else 'unsteered'}, scale {row['scale']:g}<br>"
        f"{row['mean']:.3g} ({row['low']:.3g} to {row['high']:.3g}), {row['n']} completions<br>"
        f"greedy {row['greedy']:.3g}, coherent {row['coherent']:.0%}"
        for row in rows.to_dict("records")
    ]
    symbols = np.where(rows["coherent"] < _COHERENT, "circle-open", "circle")
    look, dots = {"width": 2, "color": colour}, {"size": 8, "symbol": symbols}
    told = {"name": name, "error_y": _bars(rows, "mean", colour), **hovering(hover)}
    return line(rows["scale"], rows["mean"], look, dots, **told)


def _bars(rows: pd.DataFrame, middle: str, colour: str) -> dict[str, object]:
    """Error bars from low to high, as plotly wants them: as distances."""
    up, down = rows["high"] - rows[middle], rows[middle] - rows["low"]
    return {
        "type": "data", "symmetric": False, "array": up, "arrayminus": down,
        "color": colour, "thickness": 1, "width": 4,
    }  # fmt: skip


@shape_checked
def behaviour_rates(frame: pd.DataFrame, title: str = "Rates with 95% intervals") -> go.Figure:
    """Draw how often completions do something: unsteered, under random vectors, under each vector.

    Args:
        frame: as `analysis.rates` gives it; each of its values has bars of its own colour. Where
            it does not tell vectors apart, one bar has the completions "steered by any vector".
    """
    checks.columns(frame, ("steering", "value", "hits", "n", *_RATE), "frame", _ADVICE)
    places = [
        name for name in frame.columns[: [*frame.columns].index("value")] if name != "steering"
    ]
    rows: list[Any] = frame.to_dict("records")
    # Unsteered and random come first, however the frame is sorted.
    rows.sort(key=lambda row: STEERINGS.index(row["steering"]))
    bars = [_bar_name(row, places) for row in rows]
    traces = []
    for value, colour in zip(dict.fromkeys(frame["value"]), cycle(COLOURS), strict=False):
        own = [(name, row) for name, row in zip(bars, rows, strict=True) if row["value"] == value]
        some = pd.DataFrame([row for _, row in own])
        shown = _style.wrapped(str(value) or "not told")
        hover = [
            f"{name}<br>{shown}: {row['hits']} of {row['n']}<br>"
            f"{row['rate']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
            for name, row in own
        ]
        told = {"name": shown, **hovering(hover)}
        look = {"marker": {"color": colour}, "error_y": _bars(some, "rate", "#24292f")}
        traces.append(go.Bar(x=[name for name, _ in own], y=some["rate"], **told, **look))
    told = "; ".join(
        f"{name}, {row['value'] or 'not told'}: {row['rate']:.0%}"
        for name, row in zip(bars[:_MOST_TOLD], rows[:_MOST_TOLD], strict=True)
    )
    alt = f"Bars of rates with 95% intervals. {told}{'; …' if len(rows) > _MOST_TOLD else '.'}"
    across = axis(
        None, type="category", categoryorder="array", categoryarray=[*dict.fromkeys(bars)]
    )
    up = axis("share of completions", range=[0, 1.03], tickformat=".0%")
    return figure(traces, title, alt, across, up, showlegend=len(traces) > 1)


def _bar_name(row: dict[str, Any], places: list[str]) -> str:
    """Unsteered, random, or the vector with its scale or sign, and what else tells it apart."""
    told = dict(row)
    if row["steering"] == "vector" and "vector" in places:
        scale = float(told.pop("scale", 1.0))
        shown = f"{scale:g} × " if abs(scale) != 1 else "−" if scale < 0 else ""
        name = f"{shown}v{told.pop('vector')}"
    else:
        name = "steered by any vector" if row["steering"] == "vector" else row["steering"]
    rest = [name for name in places if name not in ("vector", "scale")]
    return _style.wrapped(", ".join([name, *(str(told[each]) for each in rest)]), 60)


@shape_checked
def pairwise(
    table: pd.DataFrame, quality: str = "", title: str = "Preferred, in both orders"
) -> go.Figure:
    """Draw the share of pairs that a vector won at each scale, and how many were not decided.

    Args:
        table: of a `Pairwise`.
        quality: that was asked for.
    """
    numbers = ("n", "ours", "theirs", "tie", "inconsistent", "invalid", "share", "low", "high")
    checks.columns(table, ("vector", "scale", *numbers), "table", _ADVICE)
    traces: list[go.Scatter] = []
    by_vector = groups(table.sort_values("vector"), ["vector"]).items()
    for ((vector,), rows), colour in zip(by_vector, cycle(COLOURS), strict=False):
        name = "all pairs" if pd.isna(vector) else f"vector {vector}"
        traces += _shares(rows.sort_values("scale"), name, colour)
    told = [
        f"scale {row['scale']:g}: {row['ours']} won, {row['theirs']} lost, "
        f"{row['n'] - row['ours'] - row['theirs']} undecided"
        for row in table.to_dict("records")
    ]
    asked = f", for {quality}" if quality else ""
    alt = f"Share of pairs won against scale{asked}. {'; '.join(told)}."
    up = axis("share of pairs", range=[-0.03, 1.03], tickformat=".0%")
    title = f"{title}: {quality}" if title and quality else title
    drawn = figure(traces, title, alt, axis("scale"), up, showlegend=True)
    return drawn.add_hline(0.5, line=DOTTED)


def _shares(rows: pd.DataFrame, name: str, colour: str) -> Iterator[go.Scatter]:
    scales = rows["scale"].fillna(0)
    hover = [
        f"{name}<br>of {row['n']} pairs: {row['ours']} won, {row['theirs']} lost, "
        f"{row['tie']} ties, {row['inconsistent']} inconsistent, {row['invalid']} invalid"
        for row in rows.to_dict("records")
    ]
    won = {"name": f"{name}: won, of those decided", "error_y": _bars(rows, "share", colour)}
    look = {"width": 2, "color": colour}
    yield line(scales, rows["share"], look, {"size": 8}, **won, **hovering(hover))
    undecided = 1 - (rows["ours"] + rows["theirs"]) / rows["n"]
    look = {"width": 1.4, "color": colour, "dash": "dash"}
    yield line(scales, undecided, look, {"size": 5}, name=f"{name}: not decided", **hovering(hover))


@shape_checked
def description_heatmap(score: Score, title: str = "Descriptions") -> go.Figure:
    """Draw the cosines of all pairs of descriptions, the matched ones in frames.

    Args:
        score: as `evaluation.linearity` or `evaluation.linearity_score` gives it.
    """
    z = score.matrix.numpy()
    sides = getattr(score, "of_adapter", None), getattr(score, "of_vectors", None)
    hover = [
        [
            f"cosine {z[i, j]:.3f}<br>" + "<br>".join(
                f"{name} {number}: {_style.wrapped(texts[number])}"
                for name, number, texts in (("adapter", i, sides[0]), ("vectors", j, sides[1]))
                if texts is not None
            )
            for j in range(z.shape[1])
        ]
        for i in range(z.shape[0])
    ]  # fmt: skip
    heatmap = _style.heatmap(z, hover, "cosine", -1, 1, _style.DIVERGING)
    whole = _style.whole_numbers(len(z))
    across = axis("description of the vectors' texts", showgrid=False, **whole)
    down = axis("description of the adapter's texts", showgrid=False, autorange="reversed", **whole)
    told = f"score {score.score:.2f} ({score.low:.2f} to {score.high:.2f})"
    alt = f"Cosines of {z.shape[0]} by {z.shape[1]} descriptions; matched ones are framed; {told}."
    named = f"{title}: {told}" if title else title
    drawn = figure(heatmap, named, alt, across, down, width=640, height=620)
    for i, j in enumerate(score.matched):
        corners = {"x0": j - 0.48, "x1": j + 0.48, "y0": i - 0.48, "y1": i + 0.48}
        drawn.add_shape(type="rect", **corners, line={"width": 2, "color": "#24292f"})
    return drawn


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
    if len(groups(rows, by)) > len(_style.LOOKS):  # too many to be told apart
        by = by[:2]
    told, traces = [], []
    curves = zip(groups(rows, by).items(), cycle(_style.LOOKS), strict=False)
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
    checks.columns(
        table, (*_PLACE, *get_args(SweepValue)), "table", "pass the table that tm.sweep returns"
    )
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
        told.append(f"median of {len(rows)} searches, {_style.span(rows[value])}; of the largest:")
    told.append(f"layer {top['source_layer']} to {top['target_layer']}, radius {top['radius']:.4g}")
    if isinstance(top["completion"], str):
        told.append(f"<br>{_style.wrapped(top['completion'])}")
    return "<br>".join(told)
