"""Curves of a notebook in one figure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tl_melbo.plots import _style
from tl_melbo.plots._style import BLUE, OTHERS, axis, figure


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
    colours = (BLUE, *OTHERS)
    traces, told = [], []
    for number, (name, (x, y)) in enumerate(curves.items()):
        colour = colours[number % len(colours)]
        trace = go.Scatter(x=[*x], y=[*y], mode=mode, name=name, line={"color": colour})
        traces.append(trace)
        told.append(f"{name}: {_style.span(y)}, for {across} of {_style.span(x)}")
    told += [f"{name} is marked at {place:.3g}" for name, place in (mark or {}).items()]
    places = [[*x] for x, _ in curves.values()], [[*y] for _, y in curves.values()]
    scales = [
        _logarithmic(each) if name in log else {} for name, each in zip("xy", places, strict=True)
    ]
    axes = axis(across, **scales[0]), axis(up, **scales[1])
    drawn = figure(traces, title, f"{up}. {'; '.join(told)}.", *axes, height=420)
    drawn.update_layout(showlegend=len(traces) > 1)
    for name, place in (mark or {}).items():
        drawn.add_vline(place, line=_style.DOTTED)
        # Unlike a line, an annotation is placed by the logarithm on a logarithmic axis.
        x = math.log10(place) if "x" in log else place
        drawn.add_annotation(x=x, y=1, yref="paper", yanchor="bottom", text=name, showarrow=False)
    return drawn


def _logarithmic(curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Ticks with whole numbers, at 1, 2 and 5 times the powers of ten, or at the powers alone."""
    positive = [float(value) for values in curves for value in values if value > 0]
    wide = bool(positive) and max(positive) >= 1e4 * min(positive)
    return {"type": "log", "tickformat": "~g", "dtick": 1 if wide else "D2"}
