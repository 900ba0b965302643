"""What adding vectors up, or scaling them, does."""

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_melbo.plots._style import (
    BLUE,
    DOTTED,
    HOVER,
    OTHERS,
    PALE_BLUE,
    axis,
    check_frame,
    layout,
    wrapped,
)
from tl_melbo.shapes import shape_checked

Measure = Literal["kl_to_reference", "kl_to_unsteered", "distance"]

_AXIS_TITLES = {
    "kl_to_reference": "KL to the reference (nats)",
    "kl_to_unsteered": "KL to the unsteered model (nats)",
    "distance": "distance (residual-stream units)",
}
# Combination, scaling, and what to call them. Rescaled, the sum is the mean: drawn once.
_KINDS = (
    ("mean", "raw", "mean"),
    ("sum", "raw", "sum"),
    ("mean", "reference norm", "at the reference's norm"),
    ("mean", "mean norm", "at the members' mean norm"),
)


@shape_checked
def composition_curves(
    composed: pd.DataFrame, measure: Measure | None = None, title: str = "Vectors added up"
) -> go.Figure:
    """Draw what adding up does against how many are added: lines for the first k, rings for random.

    Args:
        composed: as `analysis.composition` gives it.
        measure: the column on the vertical axis; None takes "kl_to_reference", or without a
            reference "kl_to_unsteered".
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, there are no rows, or the measure is not known.
    """
    columns = ("size", "members", "subset", "combination", "scaling", "norm", "completion")
    check_frame(composed, "composed", (*columns, *get_args(Measure)))
    if measure is None:
        known = np.isfinite(composed["kl_to_reference"].to_numpy()).any()
        measure = "kl_to_reference" if known else "kl_to_unsteered"
    if np.isnan(composed[measure].to_numpy()).all():
        raise ValueError(
            f"measure={measure!r}: not known without a reference; compose with reference=, or "
            "choose 'kl_to_unsteered'"
        )
    groups = dict(iter(composed.groupby(["combination", "scaling", "subset"])))
    traces = [
        _composition_trace(groups[combination, scaling, subset], measure, name, subset, colour)
        for (combination, scaling, name), colour in zip(_KINDS, (BLUE, *OTHERS), strict=False)
        for subset in ("first", "random")
        if (combination, scaling, subset) in groups
    ]
    across = axis("vectors added up", tickvals=sorted(set(composed["size"])), tickformat=",d")
    up = axis(_AXIS_TITLES[measure], rangemode="tozero")
    return go.Figure(traces, layout(title, xaxis=across, yaxis=up))


def _composition_trace(
    rows: pd.DataFrame, measure: str, name: str, subset: str, colour: str
) -> go.Scatter:
    first = subset == "first"
    hover = [
        f"{subset} {row['size']}, {name}<br>members {wrapped(str(list(row['members'])), 100)}"
        f"<br>{measure.replace('_', ' ')} {row[measure]:.4g}, norm {row['norm']:.4g}"
        f"<br>{wrapped(row['completion'])}"
        for row in rows.to_dict("records")
    ]
    return go.Scatter(
        x=rows["size"],
        y=rows[measure],
        name=name if first else f"{name}, random",
        legendgroup=name,
        showlegend=first,
        mode="lines+markers" if first else "markers",
        line={"width": 1.8, "color": colour},
        marker={"size": 8, "color": colour, "symbol": "circle" if first else "circle-open"},
        customdata=hover,
        hovertemplate=HOVER,
    )


@shape_checked
def scale_curves(
    swept: pd.DataFrame,
    *,
    changed: float = 0.5,
    repetitive: float = 0.2,
    title: str = "Changed and still coherent",
) -> go.Figure:
    """Draw KL and repetition against scale, with the window between too weak and too strong shaded.

    Thin lines are vectors, thick ones their median. The window is where the median KL is at least
    `changed` and the median repetition at most `repetitive`. Text can be incoherent without
    repeating itself: read the completions too.

    Args:
        swept: as `analysis.scale_sweep` gives it.
        changed: KL to the unsteered model, in nats, from which on the output counts as changed.
        repetitive: share of repeated 3-grams up to which it counts as coherent.
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    check_frame(swept, "swept", ("vector", "scale", "norm", "kl", "repetition", "completion"))
    median = swept.groupby("scale").median(numeric_only=True)
    inside = (median["kl"] >= changed) & (median["repetition"] <= repetitive)
    windows = _windows(median.index.to_numpy(), inside.to_numpy())
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    panels = (("kl", "KL (nats)", changed), ("repetition", "repetition", repetitive))
    for row, (column, name, threshold) in enumerate(panels, start=1):
        for trace in _scale_traces(swept, median, column):
            figure.add_trace(trace.update(showlegend=row == 1 and trace.showlegend), row, 1)
        figure.add_hline(threshold, row=row, col=1, line=DOTTED)  # pyright: ignore[reportArgumentType]
        for left, right in windows:
            figure.add_vrect(
                left, right, row=row, col=1,  # pyright: ignore[reportArgumentType]
                fillcolor=OTHERS[1], opacity=0.14, line_width=0, layer="below",
            )  # fmt: skip
        figure.update_yaxes(axis(name, rangemode="tozero"), row=row, col=1)
    figure.update_xaxes(axis(None)).update_xaxes(axis("scale"), row=2, col=1)
    return figure.update_layout(layout(title, height=600))


def _scale_traces(swept: pd.DataFrame, median: pd.DataFrame, column: str) -> Iterator[go.Scatter]:
    shown = ("vector", "scale", "norm", column, "completion")
    for number, (_, rows) in enumerate(swept.sort_values("scale").groupby("vector")):
        yield go.Scatter(
            x=rows["scale"],
            y=rows[column],
            mode="lines+markers",
            line={"width": 1, "color": PALE_BLUE},
            marker={"size": 5},
            opacity=0.6,
            name="each vector",
            legendgroup="each vector",
            showlegend=number == 0,
            customdata=[
                f"vector {vector} at {scale:g} (norm {norm:.4g})<br>{column} {value:.4g}<br>"
                f"{wrapped(completion)}"
                for vector, scale, norm, value, completion in zip(
                    *(rows[name] for name in shown), strict=True
                )
            ],
            hovertemplate=HOVER,
        )
    yield go.Scatter(
        x=median.index,
        y=median[column],
        mode="lines",
        line={"width": 2.6, "color": BLUE},
        name="median",
        legendgroup="median",
        showlegend=True,
        hoverinfo="skip",
    )


def _windows(scales: np.ndarray, inside: np.ndarray) -> list[tuple[float, float]]:
    """From half-way before each scale inside to half-way after it."""
    if len(scales) < 2:
        return []
    middles = (scales[1:] + scales[:-1]) / 2
    edges = np.concatenate([scales[:1], middles, scales[-1:]])
    return [(float(edges[i]), float(edges[i + 1])) for i in np.flatnonzero(inside)]
