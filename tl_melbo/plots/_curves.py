"""One number a vector along the library, and the numbers of each vector along its search."""

import html
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from torch import Tensor

from tl_melbo import story
from tl_melbo.plots._style import (
    BLUE,
    HOVER,
    OTHERS,
    PALE_BLUE,
    SEQUENTIAL,
    SMALLEST_KL,
    axis,
    colour_bar,
    layout,
    whole_numbers,
    wrapped,
)
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.vectors import SteeringVectors

# More traces than this make a browser slow, and nobody tells more colours apart.
_MOST_TRACES = 64
# The last fifth of the colours is a yellow too pale for a line on white.
_DARKEST_TO_PALEST = (0.0, 0.85)


@shape_checked
def objective_history(
    found: SteeringVectors, title: str = "Objective during the search"
) -> go.Figure:
    """Draw what the search measured of every vector against its steps, one line a vector.

    Args:
        found: a library with a history. Its story says what was measured, in which unit, and what
            the x axis counts: gradient evaluations, for example.
        title: above the figure; "" for none.

    Raises:
        ValueError: the library has no vectors, or no history of its search.
    """
    if found.history is None or not found.history.numel():
        raise ValueError(
            "found: has no history of its search; scaling a library drops it, and vectors made "
            "elsewhere never had one. Pass what melbo returned, or slices of it"
        )
    measure = story.measure_of(found.story) or story.measure("objective", "objective")
    history = found.history.double().numpy()
    x = np.arange(history.shape[1]) + measure["first"]
    labels = found.columns["index"].numpy()
    n_traces = min(len(found), _MOST_TRACES)
    positions = np.array_split(np.arange(len(found)), n_traces)
    traces = [
        _lines(x, history[group], labels[group], colour)
        for group, colour in zip(positions, _shades(n_traces), strict=True)
    ]
    if len(found) > 1:
        traces.append(_colour_key(labels))
    across = axis(measure["counts"], **whole_numbers(len(x)))
    up = axis(f"{measure['label']} ({measure['unit']})", rangemode="tozero")
    return go.Figure(traces, layout(title, xaxis=across, yaxis=up))


def _lines(x: np.ndarray, history: np.ndarray, labels: np.ndarray, colour: str) -> go.Scatter:
    """Several vectors' lines as one trace, with a gap after each."""
    n_vectors, n_steps = history.shape
    gap = np.full((n_vectors, 1), np.nan)
    single = (~np.isnan(history)).sum(1).max(initial=0) <= 1
    return go.Scatter(
        x=np.tile(np.append(x, x[-1]), n_vectors),
        y=np.hstack([history, gap]).ravel(),
        customdata=np.repeat(labels, n_steps + 1),
        mode="markers" if single else "lines",
        line={"width": 1.3, "color": colour},
        marker={"color": colour},
        opacity=0.85,
        showlegend=False,
        hovertemplate="vector %{customdata}: %{y:.4g} at %{x}<extra></extra>",
    )


def _colour_key(labels: np.ndarray) -> go.Scatter:
    """Nothing to see but a colour bar from the first vector to the last."""
    ends = [str(labels[0]), str(labels[-1])]
    marker = {
        "color": [0],
        "cmin": 0,
        "cmax": 1,
        "colorscale": [[i / 8, shade] for i, shade in enumerate(_shades(9))],
        "colorbar": colour_bar("vector", tickvals=[0, 1], ticktext=ends),
        "showscale": True,
    }
    return go.Scatter(
        x=[None], y=[None], mode="markers", hoverinfo="skip", showlegend=False, marker=marker
    )


def _shades(count: int) -> list[str]:
    points = np.linspace(*_DARKEST_TO_PALEST, count).tolist()
    return [str(shade) for shade in sample_colorscale(SEQUENTIAL, points)]


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
        window: the average at a point is that of this many points up to and with it, or of as many
            as there are yet.
        baselines: what to compare with, by name, in nats: one number (the unsteered model) is a
            dashed line; one for each vector (random vectors of the same norms) small points and
            the dashed line of their moving average.
        log_y: a logarithmic axis; values under 1e-6 nats are drawn there.
        title: above the figure; "" for none.

    Raises:
        ValueError: no values, or negative or not finite ones; another number of vectors,
            completions or baseline values; a window below one.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    values = _checked_kl(kl, "kl")
    for argument, things in (("found", found), ("completions", completions)):
        if things is not None and len(things) != len(values):
            raise ValueError(
                f"{argument}: {len(things)}, but kl holds {len(values)} values; pass one for each"
            )
    labels = np.arange(len(values)) if found is None else found.columns["index"].numpy()
    more = [[f"KL {value:.4g}"] for value in values]
    if found is not None:
        more = [[*line, f"norm {norm:.4g}"] for line, norm in zip(more, found.norms, strict=True)]
    if completions is not None:
        more = [[*line, wrapped(text)] for line, text in zip(more, completions, strict=True)]
    levels = {name: level.flatten() for name, level in (baselines or {}).items()}
    levels = {name: _checked_kl(level, f"baselines[{name!r}]") for name, level in levels.items()}
    for name, level in levels.items():
        if len(level) not in (1, len(values)):
            raise ValueError(
                f"baselines[{name!r}]: {len(level)} values, expected one, or one for each of the "
                f"{len(values)} vectors"
            )
    if log_y:
        values, *heights = (np.maximum(v, SMALLEST_KL) for v in (values, *levels.values()))
        levels = dict(zip(levels, heights, strict=True))
    hover = ["<br>".join(line) for line in more]
    figure = _curve(labels, values, hover, window, levels, title, "KL (nats)")
    return figure.update_yaxes(type="log", exponentformat="power") if log_y else figure


@shape_checked
def norm_curve(
    found: SteeringVectors, window: int = 50, title: str = "Norm of each vector"
) -> go.Figure:
    """Draw norm against index: a point a vector, and their moving average.

    Args:
        found: the library. For a MELBO-ortho family, a dashed line is at the norm of its theta0.
        window: the average at a point is that of this many points up to and with it, or of as many
            as there are yet.
        title: above the figure; "" for none.

    Raises:
        ValueError: no vectors, or a window below one.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    if not len(found):
        raise ValueError("found: a library without vectors; pass at least one")
    norms = found.norms.double().numpy()
    start = (found.story.get("theta0") or {}).get("norm")
    levels = {} if start is None else {"theta0": np.array([start])}
    hover = [f"norm {norm:.4g}" for norm in norms]
    labels = found.columns["index"].numpy()
    return _curve(labels, norms, hover, window, levels, title, "norm (residual-stream units)")


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
        window: the average at a point is that of this many points up to and with it, or of as many
            as there are yet.
        title: above the figure; "" for none.

    Raises:
        ValueError: no vectors, or no distances known of them; a window below one.
    """
    if not len(found) or "distance" not in found.columns:
        raise ValueError("found: has no distances; pass what melbo_ortho returned, not scaled")
    distances = found.columns["distance"].double().numpy()
    levels = {} if unsteered is None else {"unsteered": np.array([unsteered])}
    hover = [f"distance {distance:.4g}" for distance in distances]
    labels = found.columns["index"].numpy()
    y_title = "|z − z₀| (residual-stream units)"
    return _curve(labels, distances, hover, window, levels, title, y_title)


@shape_checked
def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each point; of all so far where there are fewer.

    Raises:
        ValueError: a window below one.
    """
    if window < 1:
        raise ValueError(f"window={window}: at least 1, the number of points to average over")
    # Window by window, not by differences of a running sum, which leave a large value's rounding.
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def _curve(
    labels: np.ndarray,
    values: np.ndarray,
    hover: Sequence[str],
    window: int,
    levels: Mapping[str, np.ndarray],
    title: str,
    y_title: str,
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
    across, up = axis("vector", tickformat=",d"), axis(y_title, rangemode="tozero")
    return go.Figure([points, average, *baselines], layout(title, xaxis=across, yaxis=up))


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
