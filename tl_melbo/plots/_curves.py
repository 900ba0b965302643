"""One number a vector, along the library: a point each, their moving average, and baselines.

In each, `window` is how many points are averaged: those up to and with each, or as many as there
are yet. Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
"""

import html
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from tl_melbo import checks
from tl_melbo.plots._style import (
    BLUE,
    HOVER,
    OTHERS,
    PALE_BLUE,
    SMALLEST_KL,
    axis,
    figure,
    wrapped,
)
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.vectors import SteeringVectors


@shape_checked
def kl_curve(
    kl: Float[Tensor, "vector"],
    found: SteeringVectors | None = None,
    *,
    completions: Sequence[str] | None = None,
    window: int = 50,
    baselines: Mapping[str, Tensor] | None = None,
    log_y: bool = False,
    title: str = "Divergence from the reference",
) -> go.Figure:
    """Draw KL against index: a point a vector, and their moving average.

    Args:
        kl: as `analysis.kl_divergence` gives it, in nats.
        found: the library, for the index and norm of each vector; None numbers them from 0.
        completions: what the model writes under each, shown when a point is hovered over.
        window: how many points are averaged.
        baselines: what to compare with, by name, in nats: one number (the unsteered model) is a
            dashed line; one for each vector (random vectors of the same norms) small points and
            the dashed line of their moving average.
        log_y: a logarithmic axis; values under 1e-6 nats are drawn there.
        title: above the figure.

    Raises:
        ValueError: no values, or negative or not finite ones; another number of vectors,
            completions or baseline values; a window below one.
    """
    values = _checked_kl(kl, "kl")
    for argument, things in (("found", found), ("completions", completions)):
        if things is not None and len(things) != len(values):
            raise ValueError(
                f"{argument}: {len(things)}, but kl holds {len(values)} values; pass one for each"
            )
    hover = [[f"KL {value:.4g}"] for value in values]
    if found is not None:
        hover = [[*line, f"norm {norm:.4g}"] for line, norm in zip(hover, found.norms, strict=True)]
    if completions is not None:
        hover = [[*line, wrapped(text)] for line, text in zip(hover, completions, strict=True)]
    levels = {}
    for name, level in (baselines or {}).items():
        levels[name] = _checked_kl(level.flatten(), f"baselines[{name!r}]")
        if len(levels[name]) not in (1, len(values)):
            raise ValueError(
                f"baselines[{name!r}]: {len(levels[name])} values, expected one, or one for each "
                f"of the {len(values)} vectors"
            )
    more: dict[str, Any] = {"rangemode": "tozero"}
    if log_y:
        values = np.maximum(values, SMALLEST_KL)
        levels = {name: np.maximum(level, SMALLEST_KL) for name, level in levels.items()}
        more |= {"type": "log", "exponentformat": "power"}
    labels = np.arange(len(values)) if found is None else found.columns["index"].numpy()
    lines = ["<br>".join(line) for line in hover]
    return _curve(labels, values, lines, window, levels, title, axis("KL (nats)", **more))


@shape_checked
def norm_curve(
    found: SteeringVectors, window: int = 50, title: str = "Norm of each vector"
) -> go.Figure:
    """Draw norm against index, with theta0's norm as a dashed line for a MELBO-ortho family."""
    if not len(found):
        raise ValueError("found: a library without vectors; pass at least one")
    level = (found.story.get("theta0") or {}).get("norm")
    y_title = "norm (residual-stream units)"
    return _of_library(found, "norm", found.norms, window, {"theta0": level}, title, y_title)


@shape_checked
def distance_curve(
    found: SteeringVectors,
    unsteered: float | None = None,
    window: int = 50,
    title: str = "Distance from the effect of theta0",
) -> go.Figure:
    """Draw how near each vector of a MELBO-ortho family came to theta0's effect, by index.

    Args:
        found: a family, as `melbo_ortho` gives it.
        unsteered: the distance without a vector, |z(0) - z(theta0)|, for a dashed line: a vector
            that does not come under it has nothing of theta0's effect.
        window: how many points are averaged.
        title: above the figure.

    Raises:
        ValueError: no vectors, or no distances known of them; a window below one.
    """
    if not len(found) or "distance" not in found.columns:
        raise ValueError("found: has no distances; pass what melbo_ortho returned, not scaled")
    levels, y_title = {"unsteered": unsteered}, "|z − z₀| (residual-stream units)"
    distances = found.columns["distance"]
    return _of_library(found, "distance", distances, window, levels, title, y_title)


@shape_checked
def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each point; of all so far where there are fewer."""
    checks.at_least(1, window=window)
    # Window by window, not by differences of a running sum, which leave a large value's rounding.
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def _of_library(
    found: SteeringVectors,
    name: str,
    values: Tensor,
    window: int,
    levels: Mapping[str, float | None],
    title: str,
    y_title: str,
) -> go.Figure:
    numbers = values.double().numpy()
    hover = [f"{name} {number:.4g}" for number in numbers]
    known = {name: np.array([level]) for name, level in levels.items() if level is not None}
    labels, up = found.columns["index"].numpy(), axis(y_title, rangemode="tozero")
    return _curve(labels, numbers, hover, window, known, title, up)


def _curve(
    labels: np.ndarray,
    values: np.ndarray,
    hover: Sequence[str],
    window: int,
    levels: Mapping[str, np.ndarray],
    title: str,
    up: dict[str, Any],
) -> go.Figure:
    """A point a vector, their moving average, and what to compare with."""
    points = go.Scatter(
        x=labels,
        y=values,
        name="each vector",
        mode="markers",
        marker={"size": 6, "color": PALE_BLUE, "opacity": 0.75},
        customdata=[f"vector {i}<br>{line}" for i, line in zip(labels, hover, strict=True)],
        hovertemplate=HOVER,
    )
    average = go.Scatter(
        x=labels,
        y=moving_average(values, window),
        name=f"mean of the last {window}",
        mode="lines",
        line={"width": 2.2, "color": BLUE},
        hoverinfo="skip",
    )
    baselines = [
        trace
        for (name, level), colour in zip(levels.items(), cycle(OTHERS), strict=False)
        for trace in _baseline(labels, level, window, name, colour)
    ]
    return figure([points, average, *baselines], title, axis("vector", tickformat=",d"), up)


def _baseline(
    labels: np.ndarray, values: np.ndarray, window: int, name: str, colour: str
) -> list[go.Scatter]:
    """One value as a dashed line, or many as points with a dashed average."""
    level = len(values) == 1
    label = html.escape(name)
    # A single vector has no width to draw a line across.
    ends = np.array([labels.min() - 0.5, labels.max() + 0.5])
    line = go.Scatter(
        x=ends if level else labels,
        y=np.repeat(values, 2) if level else moving_average(values, window),
        name=label,
        legendgroup=label,
        mode="lines",
        line={"width": 1.6, "dash": "dash", "color": colour},
        hovertemplate=f"{label}: %{{y:.4g}}<extra></extra>",
    )
    if level:
        return [line]
    points = go.Scatter(
        x=labels,
        y=values,
        legendgroup=label,
        showlegend=False,
        mode="markers",
        marker={"size": 4, "color": colour, "opacity": 0.35},
        hovertemplate=f"{label} %{{x}}: %{{y:.4g}}<extra></extra>",
    )
    return [points, line]


def _checked_kl(kl: Tensor, argument: str) -> np.ndarray:
    values = kl.detach().cpu().double().numpy()
    if not len(values) or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"{argument}: no values, or negative or not finite ones; pass what "
            "analysis.kl_divergence returns, without the vectors whose KL is infinite"
        )
    return values
