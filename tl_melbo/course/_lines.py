"""Curves of a notebook in one figure."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import plotly.graph_objects as go

from tl_melbo.plots import _style
from tl_melbo.plots._style import COLOURS, GREY, axis, figure, log_axis


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    across: str,
    up: str,
    *,
    log: str = "",
    mode: str = "lines+markers",
    mark: Mapping[str, float] | None = None,
) -> go.Figure:
    """Draw curves by name, each its places across and its values.

    Args:
        across, up: what the axes show, with its unit.
        log: "x", "y" or "xy": which axes are logarithmic.
        mode: "markers" draws points alone.
        mark: vertical dotted lines, by what they mean.
    """
    traces, told = [], []
    for (name, (x, y)), colour in zip(curves.items(), cycle((*COLOURS, GREY)), strict=False):
        traces.append(go.Scatter(x=[*x], y=[*y], mode=mode, name=name, line={"color": colour}))
        told.append(f"{name}: {_style.span(y)}, for {across} of {_style.span(x)}")
    told += [f"{name} is marked at {place:.3g}" for name, place in (mark or {}).items()]
    axes = [axis(across), axis(up)]
    for i, name in enumerate("xy"):
        if name in log:
            values = [float(value) for curve in curves.values() for value in curve[i]]
            positive = [value for value in values if value > 0] or [1.0]
            axes[i] = log_axis((across, up)[i], min(positive), max(positive))
    alt = f"{up}. {'; '.join(told)}."
    drawn = figure(traces, title, alt, axes[0], axes[1], height=420)
    drawn.update_layout(showlegend=len(traces) > 1)
    for name, place in (mark or {}).items():
        drawn.add_vline(place, line=_style.DOTTED)
        # Unlike a line, an annotation is placed by the logarithm on a logarithmic axis.
        x = math.log10(place) if "x" in log else place
        drawn.add_annotation(x=x, y=1, yref="paper", yanchor="bottom", text=name, showarrow=False)
    return drawn
