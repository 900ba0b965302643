"""Numbers to figures: plotly, returned and never shown, readable by colour-blind eyes."""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from circuitsvis.tokens import colored_tokens
from circuitsvis.utils.render import RenderedHTML
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from torch import Tensor

from tl_melbo.analysis._presence import residuals_of
from tl_melbo.geometry import normalise
from tl_melbo.model.bridge import Model
from tl_melbo.model.tokens import to_tokens
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.steering import Vectors, as_theta, one_vector, steering_layer
from tl_melbo.text import printable
from tl_melbo.vectors import SteeringVectors

Measure = Literal["kl_to_reference", "kl_to_unsteered", "distance"]

_FONT = {
    "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif",
    "size": 13,
    "color": "#24292f",
}
# Blue to orange-red through near-white: apart for all common kinds of colour blindness, and the
# two ends are equally dark.
_DIVERGING = "RdBu_r"
_SEQUENTIAL = "Viridis"
# Its last fifth is a yellow too pale for a line on white.
_DARKEST_TO_PALEST = (0.0, 0.85)
# More traces than this make a browser slow, and nobody tells more colours apart.
_MOST_TRACES = 64
# Of the figure, not of the plot: it then keeps its distance at any size.
_AT_THE_BOTTOM = {"yref": "container", "y": 0, "yanchor": "bottom"}
_AXIS = {"ticks": "outside", "ticklen": 4, "tickcolor": "#8c959f", "zeroline": False}
_GRID = {"gridcolor": "#eaeef2"}
# Okabe and Ito's colours, which are apart for all common kinds of colour blindness.
_BLUE, _PALE_BLUE = "#0072b2", "#56b4e9"
_OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#57606a")
# A logarithmic axis has no zero: what is smaller than this, in nats, is drawn there.
_SMALLEST_KL = 1e-6
# A token coloured by more than this share of the largest value has white letters.
_DARK = 0.6
_HOVER_LENGTH, _HOVER_WIDTH = 200, 60
_HOVER_LABEL = {"align": "left", "bgcolor": "#ffffff", "font": {"color": "#24292f"}}
# Under the axis, where it hides no point however many there are.
_LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0.01}


@shape_checked
def cosine_heatmap(
    similarity: Float[Tensor, "row column"],
    title: str = "Cosine similarity",
    *,
    labels: Sequence[int | str] | None = None,
) -> go.Figure:
    """Draw a matrix of cosines: red for same direction, white for orthogonal, blue for opposite.

    Args:
        similarity: as `analysis.cosine_similarity` gives it, from -1 to 1.
        title: above the figure; "" for none.
        labels: what to call the vectors by, where they are not 0, 1, 2, ...; rows and columns
            must then be the same vectors.

    Raises:
        ValueError: values outside -1 to 1 or not finite, or as many labels as there are not rows.
    """
    z = similarity.detach().cpu().float().numpy()
    if not (np.abs(z) <= 1 + 1e-6).all():
        raise ValueError(
            "similarity: holds values outside -1 to 1, or not finite; pass what "
            "analysis.cosine_similarity returns"
        )
    names = None if labels is None else [str(label) for label in labels]
    if names is not None and z.shape != (len(names), len(names)):
        raise ValueError(f"labels: {len(names)} labels for a matrix of shape {z.shape}")
    heatmap = go.Heatmap(
        z=z,
        x=names,
        y=names,
        zmin=-1,
        zmid=0,
        zmax=1,
        colorscale=_DIVERGING,
        colorbar={
            "title": {"text": "cosine", "side": "top"},
            "orientation": "h",
            "thickness": 10,
            "len": 0.6,
            **_AT_THE_BOTTOM,
            "tickvals": [-1, -0.5, 0, 0.5, 1],
        },
        hovertemplate="vector %{y} and vector %{x}<br>cosine %{z:.3f}<extra></extra>",
    )
    axis = _AXIS | {"title": {"text": "vector", "standoff": 6}, "showgrid": False}
    axis |= {"constrain": "domain", "type": "linear" if names is None else "category"}
    axis |= _whole_numbers(max(z.shape))
    figure = go.Figure(heatmap)
    figure.update_layout(
        **_layout(title, width=640, height=740),
        xaxis=axis,
        yaxis=axis | {"autorange": "reversed", "scaleanchor": "x"},
    )
    return figure


@shape_checked
def objective_history(
    found: SteeringVectors, title: str = "Objective during the search"
) -> go.Figure:
    """Draw the objective of every vector against the steps of its search, one line a vector.

    Args:
        found: a library with a history. The x axis counts gradient evaluations if its story says
            that it was found by "ascent" or by melbo_ortho, and steps otherwise. The history of a
            melbo_ortho family is the distance from what its theta0 does.
        title: above the figure; "" for none.

    Raises:
        ValueError: the library has no vectors, or no history of its search.
    """
    if found.history is None or not found.history.numel():
        raise ValueError(
            "found: has no history of its search; scaling a library drops it, and vectors made "
            "elsewhere never had one. Pass what melbo returned, or slices of it"
        )
    chosen = found.story.get("hyperparameters", {})
    is_family = found.story.get("method") == "melbo_ortho"
    by_gradient = is_family or chosen.get("optimiser") == "ascent"
    in_units = is_family or chosen.get("p") == chosen.get("q")
    unit = "residual-stream units" if in_units else f"p = {chosen['p']}, q = {chosen['q']}"
    quantity = "distance |z − z₀|" if is_family else "objective"
    history = found.history.double().numpy()
    # An ascent's first number took one gradient evaluation; AdamW's is before its first step.
    x = np.arange(history.shape[1]) + (1 if by_gradient else 0)
    labels = found.columns["index"].numpy()
    n_traces = min(len(found), _MOST_TRACES)
    positions = np.array_split(np.arange(len(found)), n_traces)
    shades = _shades(n_traces)
    figure = go.Figure(
        [
            _lines(x, history[group], labels[group], colour)
            for group, colour in zip(positions, shades, strict=True)
        ]
    )
    if len(found) > 1:
        figure.add_trace(_colour_key(labels))
    figure.update_layout(
        **_layout(title, width=820, height=520),
        plot_bgcolor="#ffffff",
        hovermode="closest",
        xaxis=_AXIS
        | {
            "title": {"text": "gradient evaluations" if by_gradient else "step", "standoff": 8},
            "gridcolor": "#eaeef2",
            **_whole_numbers(len(x)),
        },
        yaxis=_AXIS
        | {
            "title": {"text": f"{quantity} ({unit})", "standoff": 8},
            "gridcolor": "#eaeef2",
            "rangemode": "tozero",
        },
    )
    return figure


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
    shades = _shades(9)
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        hoverinfo="skip",
        showlegend=False,
        marker={
            "color": [0],
            "cmin": 0,
            "cmax": 1,
            "colorscale": [[i / 8, shade] for i, shade in enumerate(shades)],
            "colorbar": {
                "title": {"text": "vector", "side": "top"},
                "orientation": "h",
                "thickness": 10,
                "len": 0.6,
                **_AT_THE_BOTTOM,
                "tickvals": [0, 1],
                "ticktext": [str(labels[0]), str(labels[-1])],
            },
            "showscale": True,
        },
    )


def _shades(count: int) -> list[str]:
    points = np.linspace(*_DARKEST_TO_PALEST, count).tolist()
    return [str(shade) for shade in sample_colorscale(_SEQUENTIAL, points)]


def _whole_numbers(count: int) -> dict[str, Any]:
    """Ticks between whole numbers, which plotly makes where there are few, mean nothing here."""
    return {"tickformat": ",d", "dtick": 1} if count <= 12 else {"tickformat": ",d"}


def _layout(title: str, width: int, height: int) -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "font": _FONT,
        "title": {"text": title or None, "x": 0.02, "xanchor": "left"},
        "margin": {"l": 64, "r": 24, "t": 56 if title else 16, "b": 108},
        "width": width,
        "height": height,
        "paper_bgcolor": "#ffffff",
    }


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
    _check_count(found, len(values), "found")
    _check_count(completions, len(values), "completions")
    labels = _labels(found, len(values))
    hover = _hover_lines(labels, values, found, completions)
    drawn = np.maximum(values, _SMALLEST_KL) if log_y else values
    figure = go.Figure(_points_and_average(labels, drawn, window, "each vector", hover))
    for (name, baseline), colour in zip((baselines or {}).items(), cycle(_OTHERS), strict=False):
        height = _checked_kl(baseline.flatten(), f"baselines[{name!r}]")
        if len(height) not in (1, len(values)):
            raise ValueError(
                f"baselines[{name!r}]: {len(height)} values, expected one, or one for each of the "
                f"{len(values)} vectors"
            )
        height = np.maximum(height, _SMALLEST_KL) if log_y else height
        figure.add_traces(_baseline(labels, height, window, name, colour))
    _style_curve(figure, title, "KL (nats)", log_y)
    return figure


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
    labels = _labels(found, len(found))
    norms = found.norms.double().numpy()
    hover = [f"vector {i}<br>norm {norm:.4g}" for i, norm in zip(labels, norms, strict=True)]
    figure = go.Figure(_points_and_average(labels, norms, window, "each vector", hover))
    start = (found.story.get("theta0") or {}).get("norm")
    if start is not None:
        figure.add_traces(_baseline(labels, np.array([start]), window, "theta0", _OTHERS[0]))
    _style_curve(figure, title, "norm (residual-stream units)", log_y=False)
    return figure


@shape_checked
def distance_curve(
    found: SteeringVectors,
    unsteered: float | None = None,
    window: int = 50,
    title: str = "Distance from what theta0 does",
) -> go.Figure:
    """Draw how near each vector of a MELBO-ortho family came to theta0's effect, by index.

    Args:
        found: a family, as `melbo_ortho` gives it.
        unsteered: the distance without a vector, |z(0) - z(theta0)|, for a dashed line: a vector
            that does not come under it does nothing of what theta0 does.
        window: the average at a point is that of this many points up to and with it, or of as many
            as there are yet.
        title: above the figure; "" for none.

    Raises:
        ValueError: no vectors, or no distances known of them; a window below one.
    """
    if not len(found) or "distance" not in found.columns:
        raise ValueError("found: has no distances; pass what melbo_ortho returned, not scaled")
    labels = _labels(found, len(found))
    distances = found.columns["distance"].double().numpy()
    hover = [f"vector {i}<br>distance {d:.4g}" for i, d in zip(labels, distances, strict=True)]
    figure = go.Figure(_points_and_average(labels, distances, window, "each vector", hover))
    if unsteered is not None:
        level = np.array([unsteered])
        figure.add_traces(_baseline(labels, level, window, "unsteered", _OTHERS[0]))
    _style_curve(figure, title, "|z − z₀| (residual-stream units)", log_y=False)
    return figure


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


def _points_and_average(
    labels: np.ndarray, values: np.ndarray, window: int, name: str, hover: Sequence[str]
) -> list[go.Scatter]:
    average = moving_average(values, window)
    points = go.Scatter(
        x=labels,
        y=values,
        name=name,
        mode="markers",
        marker={"size": 6, "color": _PALE_BLUE, "opacity": 0.75},
        customdata=list(hover),
        hovertemplate="%{customdata}<extra></extra>",
    )
    line = go.Scatter(
        x=labels,
        y=average,
        name=f"mean of the last {window}",
        mode="lines",
        line={"width": 2.2, "color": _BLUE},
        hoverinfo="skip",
    )
    return [points, line]


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


def _style_curve(figure: go.Figure, title: str, y_title: str, log_y: bool) -> None:
    figure.update_layout(
        **_layout(title, width=820, height=520),
        plot_bgcolor="#ffffff",
        hovermode="closest",
        hoverlabel=_HOVER_LABEL,
        legend=_LEGEND,
        xaxis=_AXIS | _GRID | {"title": {"text": "vector", "standoff": 8}, "tickformat": ",d"},
        yaxis=_AXIS
        | _GRID
        | {"title": {"text": y_title, "standoff": 8}}
        | ({"type": "log", "exponentformat": "power"} if log_y else {"rangemode": "tozero"}),
    )


def _hover_lines(
    labels: np.ndarray,
    kl: np.ndarray,
    found: SteeringVectors | None,
    completions: Sequence[str] | None,
) -> list[str]:
    lines = [
        [f"vector {label}", f"KL {value:.4g}"] for label, value in zip(labels, kl, strict=True)
    ]
    if found is not None:
        for line, norm in zip(lines, found.norms.tolist(), strict=True):
            line.append(f"norm {norm:.4g}")
    if completions is not None:
        for line, completion in zip(lines, completions, strict=True):
            line.append(_wrapped(completion))
    return ["<br>".join(line) for line in lines]


def _wrapped(text: str, length: int = _HOVER_LENGTH) -> str:
    """Text for a hover label: cut, wrapped, and with nothing in it that plotly takes for HTML."""
    short = printable(text[:length] if len(text) <= length else text[: length - 1] + "…")
    return "<br>".join(html.escape(line) for line in textwrap.wrap(short, _HOVER_WIDTH))


def _checked_kl(kl: Tensor, argument: str) -> np.ndarray:
    values = kl.detach().cpu().double().numpy()
    if not len(values) or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"{argument}: no values, or negative or not finite ones; pass what "
            "analysis.kl_divergence returns, without the vectors whose KL is infinite"
        )
    return values


def _check_count(things: SteeringVectors | Sequence[str] | None, count: int, name: str) -> None:
    if things is not None and len(things) != count:
        raise ValueError(f"{name}: {len(things)}, but kl holds {count} values; pass one for each")


def _labels(found: SteeringVectors | None, count: int) -> np.ndarray:
    return np.arange(count) if found is None else found.columns["index"].numpy()


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
    _check_frame(composed, "composed", (*columns, *get_args(Measure)))
    if measure is None:
        known = np.isfinite(composed["kl_to_reference"].to_numpy()).any()
        measure = "kl_to_reference" if known else "kl_to_unsteered"
    if np.isnan(composed[measure].to_numpy()).all():
        raise ValueError(
            f"measure={measure!r}: not known without a reference; compose with reference=, or "
            "choose 'kl_to_unsteered'"
        )
    figure = go.Figure()
    # Rescaled, the sum is the mean: drawn once.
    kinds = (
        ("mean", "raw", "mean"),
        ("sum", "raw", "sum"),
        ("mean", "reference norm", "at the reference's norm"),
        ("mean", "mean norm", "at the members' mean norm"),
    )
    groups = dict(iter(composed.groupby(["combination", "scaling", "subset"])))
    for (combination, scaling, name), colour in zip(kinds, (_BLUE, *_OTHERS), strict=False):
        for subset in ("first", "random"):
            rows = groups.get((combination, scaling, subset))
            if rows is not None:
                figure.add_trace(_composition_trace(rows, measure, name, subset, colour))
    axis_titles = {
        "kl_to_reference": "KL to the reference (nats)",
        "kl_to_unsteered": "KL to the unsteered model (nats)",
        "distance": "distance (residual-stream units)",
    }
    _style_curve(figure, title, axis_titles[measure], log_y=False)
    figure.update_xaxes(title_text="vectors added up", tickvals=sorted(set(composed["size"])))
    return figure


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
    _check_frame(swept, "swept", ("vector", "scale", "norm", "kl", "repetition", "completion"))
    median = swept.groupby("scale").median(numeric_only=True)
    is_changed = median["kl"].to_numpy() >= changed
    windows = _windows(
        median.index.to_numpy(), is_changed & (median["repetition"].to_numpy() <= repetitive)
    )
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    panels = (("kl", "KL (nats)", changed), ("repetition", "repetition", repetitive))
    for row, (column, y_title, threshold) in enumerate(panels, start=1):
        for trace in _scale_traces(swept, median, column):
            figure.add_trace(trace.update(showlegend=row == 1 and trace.showlegend), row, 1)
        axis = "" if row == 1 else row
        across = {"xref": f"x{axis} domain", "yref": f"y{axis}", "x0": 0, "x1": 1}
        line = {"width": 1, "dash": "dot"}
        figure.add_shape(type="line", **across, y0=threshold, y1=threshold, line=line)
        for left, right in windows:
            whole_height = {"xref": f"x{axis}", "yref": f"y{axis} domain", "y0": 0, "y1": 1}
            look = {"fillcolor": _OTHERS[1], "opacity": 0.14, "line_width": 0, "layer": "below"}
            figure.add_shape(type="rect", **whole_height, x0=left, x1=right, **look)
        figure.update_yaxes(
            _AXIS | _GRID | {"title": {"text": y_title, "standoff": 8}, "rangemode": "tozero"},
            row=row,
            col=1,
        )
    figure.update_xaxes(_AXIS | _GRID)
    figure.update_xaxes(title={"text": "scale", "standoff": 8}, row=2, col=1)
    figure.update_layout(
        **_layout(title, width=820, height=600),
        plot_bgcolor="#ffffff",
        hovermode="closest",
        hoverlabel=_HOVER_LABEL,
        legend=_LEGEND,
    )
    return figure


@shape_checked
def presence_points(
    scanned: pd.DataFrame, q: float = 0.05, title: str = "Presence in the unsteered model"
) -> go.Figure:
    """Draw the AUROC of every vector, those beyond the random-direction null apart.

    Args:
        scanned: as `analysis.presence` gives it.
        q: adjusted p-values below this count as found.
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    columns = ("index", "mean_projection", "mean_projection_control", "auroc", "p_value")
    _check_frame(scanned, "scanned", (*columns, "p_adjusted"))
    figure = go.Figure()
    found = scanned["p_adjusted"] < q
    groups = ((~found, "like random directions", "#8c959f", "circle-open"),
              (found, f"adjusted p < {q:g}", _OTHERS[0], "diamond"))  # fmt: skip
    for chosen, name, colour, symbol in groups:
        rows = scanned[chosen]
        figure.add_trace(
            go.Scatter(
                x=rows["index"],
                y=rows["auroc"],
                name=f"{name} ({len(rows)})",
                mode="markers",
                marker={"size": 8, "color": colour, "symbol": symbol},
                customdata=rows.drop(columns=["index", "auroc"]).to_numpy(),
                hovertemplate="vector %{x}<br>AUROC %{y:.3f}<br>mean projection "
                "%{customdata[0]:.3g}, in control %{customdata[1]:.3g}<br>p %{customdata[2]:.3g}, "
                "adjusted %{customdata[3]:.3g}<extra></extra>",
            )
        )
    figure.add_hline(0.5, line={"width": 1, "dash": "dot"})
    _style_curve(figure, title, "AUROC, texts against control", log_y=False)
    figure.update_yaxes(rangemode="normal", range=[-0.03, 1.03])
    figure.update_layout(showlegend=True)
    return figure


@shape_checked
def specificity_points(
    measured: pd.DataFrame, title: str = "Effect on the prompt and elsewhere"
) -> go.Figure:
    """Draw what every vector does on its prompt against what it does elsewhere.

    On the dotted diagonal a vector acts alike on both: specificity 0.5. The darker a dot, the more
    the vector costs on ordinary prose.

    Args:
        measured: as `evaluation.side_effects` gives it.
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    columns = ("vector", "kl_target", "kl_unrelated", "specificity", "loss_increase")
    _check_frame(measured, "measured", columns)
    # A row that was not finite has no place.
    measured = pd.DataFrame(measured[measured["specificity"].notna()])
    _check_frame(measured, "measured", columns)
    elsewhere = [max(_SMALLEST_KL, kl) for kl in measured["kl_unrelated"]]
    target = [max(_SMALLEST_KL, kl) for kl in measured["kl_target"]]
    ends = [0.6 * min(*elsewhere, *target), 1.7 * max(*elsewhere, *target)]
    losses = measured["loss_increase"]
    figure = go.Figure(
        go.Scatter(
            x=elsewhere,
            y=target,
            mode="markers+text",
            text=measured["vector"],
            textposition="top center",
            textfont={"size": 9, "color": "#57606a"},
            marker={
                "size": 10,
                "color": losses,
                "colorscale": _SEQUENTIAL,
                "reversescale": True,
                # A tenth of a nat at least: without it, noise would get every colour.
                "cmin": min(0.0, losses.min()),
                "cmax": max(0.1, losses.max()),
                "line": {"width": 1, "color": "#57606a"},
                "colorbar": {"title": {"text": "loss increase<br>(nats a token)"}, "thickness": 10},
            },
            customdata=measured[["vector", "specificity", "loss_increase"]].to_numpy(),
            hovertemplate="vector %{customdata[0]}<br>KL on the prompt %{y:.3g}, elsewhere "
            "%{x:.3g}<br>specificity %{customdata[1]:.2f}<br>loss increase %{customdata[2]:.3g}"
            "<extra></extra>",
        )
    )
    figure.add_shape(
        type="line", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1],
        line={"width": 1, "dash": "dot", "color": "#57606a"}, layer="below",
    )  # fmt: skip
    for text, place, side in (
        ("more on the prompt", 0.02, "left"),
        ("more elsewhere", 0.98, "right"),
    ):
        figure.add_annotation(
            text=text, x=place, y=1 - place, xref="paper", yref="paper", xanchor=side,
            showarrow=False, font={"color": "#57606a"},
        )  # fmt: skip
    figure.update_layout(**_layout(title, width=620, height=520), hoverlabel=_HOVER_LABEL)
    ticks = _round_numbers(*ends)
    logarithmic = {
        **_AXIS,
        **_GRID,
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
        "range": [math.log10(end) for end in ends],
    }
    figure.update_xaxes(logarithmic, title="mean KL on unrelated prompts (nats)")
    figure.update_yaxes(logarithmic, title="KL on the prompt (nats)")
    return figure


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in a range; only the powers where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    numbers = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [number for number in numbers if low <= number <= high]


@shape_checked
def transfer_heatmap(
    transferred: pd.DataFrame, title: str = "Effect on other prompts"
) -> go.Figure:
    """Draw the KL of every vector on every prompt; hovering shows what the model writes.

    Args:
        transferred: as `analysis.transfer` gives it.
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    columns = ("prompt", "vector", "kl", "completion", "unsteered_completion")
    _check_frame(transferred, "transferred", columns)
    n_vectors = len(set(transferred["vector"]))
    prompts = transferred["prompt"].to_numpy()[::n_vectors]
    hover = [
        f"vector {vector}, KL {kl:.4g}<br>{_wrapped(completion)}<br><br>unsteered:<br>"
        f"{_wrapped(unsteered)}"
        for vector, kl, completion, unsteered in zip(
            *(transferred[column] for column in columns[1:]), strict=True
        )
    ]
    heatmap = go.Heatmap(
        z=transferred["kl"].to_numpy().reshape(-1, n_vectors),
        x=transferred["vector"].to_numpy()[:n_vectors],
        customdata=np.array(hover).reshape(-1, n_vectors),
        zmin=0,
        zmax=max(transferred["kl"]),
        colorscale=_SEQUENTIAL,
        colorbar={
            "title": {"text": "KL to unsteered (nats)", "side": "bottom"},
            "orientation": "h",
            "thickness": 10,
            "len": 0.6,
            **_AT_THE_BOTTOM,
        },
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure = go.Figure(heatmap)
    layout = _layout(title, width=820, height=max(440, 240 + 32 * len(prompts)))
    figure.update_layout(**layout, hoverlabel=_HOVER_LABEL)
    figure.update_xaxes(_AXIS | {"title": {"text": "vector", "standoff": 8}, "showgrid": False})
    figure.update_yaxes(
        _AXIS | {"showgrid": False, "autorange": "reversed", "automargin": True},
        tickvals=list(range(len(prompts))),
        # By number, not by name: two prompts may begin alike.
        ticktext=[_wrapped(prompt, 40) for prompt in prompts],
    )
    return figure


@shape_checked
def token_presence(
    model: Model,
    vector: Vectors,
    text: str,
    layer: int | None = None,
) -> RenderedHTML:
    """Show a text's tokens coloured by their projection on a vector, in the unsteered model.

    Red tokens point against the vector and blue ones along it, darkest at the text's longest
    projection. The first token, whose residual is an outlier in most models, is left white.

    Args:
        model: a TransformerLens model.
        vector: exactly one vector; its length does not matter.
        text: a raw text, of more than one token.
        layer: after which block to look; None takes the layer that the vector was found at.

    Returns:
        circuitsvis's coloured tokens, for a notebook or, as `str`, for a page. The script is in
        it: nothing is asked of the internet.

    Raises:
        ValueError: more or fewer than one vector, or one that has no direction; unknown layer; a
            text without a second token.
    """
    theta = one_vector(vector, "vector")
    unit = normalise(as_theta(model, theta))[0].cpu()
    residuals = residuals_of(model, text, steering_layer(model, theta, layer), argument="text")
    values = [0.0, *(residuals @ unit).tolist()]
    tokens = [model.tokenizer.decode([token]) for token in to_tokens(model, text)[0].tolist()]
    largest = max(map(abs, values))
    shown = colored_tokens(tokens, values, min_value=-largest, max_value=largest)
    source = _with_fallback(_without_tags(shown.local_src), tokens, values, largest)
    return _Offline(source, source)


class _Offline(RenderedHTML):
    """Coloured tokens that do not look for a network each time they are shown."""

    def _repr_html_(self) -> str:
        return self.local_src


def _with_fallback(source: str, tokens: list[str], values: list[float], largest: float) -> str:
    """The same with plain coloured text above it, which the script, where it runs, takes away."""
    identity = source.partition('id="')[2].partition('"')[0]
    name = f"static-{identity}"
    spans = []
    for token, value in zip(tokens, values, strict=True):
        share = value / largest if largest else 0.0
        # circuitsvis's colours: blue along the vector, red against it.
        pale = f"{255 * (1 - abs(share)):.0f}"
        colour = f"rgb({pale},{pale},255)" if share > 0 else f"rgb(255,{pale},{pale})"
        ink = "white" if abs(share) > _DARK else "black"
        style = f"background:{colour};color:{ink};padding:1px;white-space:pre-wrap"
        text = html.escape(printable(token))
        spans.append(f'<span style="{style}" title="{value:.4g}">{text}</span>')
    before, call, after = source.rpartition("CircuitsVis.render(")
    remove = f'document.getElementById("{name}")?.remove();\n    '
    return f'<div id="{name}">{"".join(spans)}</div>\n{before}{remove}{call}{after}'


def _without_tags(source: str) -> str:
    """The page of circuitsvis with no "<" in its data: a token "</script>" would end it."""
    script, call, rest = source.rpartition("CircuitsVis.render(")
    data, end, after = rest.rpartition("</script>")
    return script + call + data.replace("<", "\\u003c") + end + after


def _composition_trace(
    rows: pd.DataFrame, measure: str, name: str, subset: str, colour: str
) -> go.Scatter:
    first = subset == "first"
    hover = [
        f"{subset} {row['size']}, {name}<br>members {_wrapped(str(list(row['members'])), 100)}"
        f"<br>{measure.replace('_', ' ')} {row[measure]:.4g}, norm {row['norm']:.4g}"
        f"<br>{_wrapped(row['completion'])}"
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
        hovertemplate="%{customdata}<extra></extra>",
    )


def _scale_traces(swept: pd.DataFrame, median: pd.DataFrame, column: str) -> list[go.Scatter]:
    traces = [
        go.Scatter(
            x=rows["scale"],
            y=rows[column],
            mode="lines+markers",
            line={"width": 1, "color": _PALE_BLUE},
            marker={"size": 5},
            opacity=0.6,
            name="each vector",
            legendgroup="each vector",
            showlegend=number == 0,
            customdata=[
                f"vector {vector} at {scale:g} (norm {norm:.4g})<br>{column} {value:.4g}<br>"
                f"{_wrapped(completion)}"
                for vector, scale, norm, value, completion in zip(
                    *(rows[c] for c in ("vector", "scale", "norm", column, "completion")),
                    strict=True,
                )
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for number, (_, rows) in enumerate(swept.sort_values("scale").groupby("vector"))
    ]
    thick = go.Scatter(
        x=median.index,
        y=median[column],
        mode="lines",
        line={"width": 2.6, "color": _BLUE},
        name="median",
        legendgroup="median",
        showlegend=True,
        hoverinfo="skip",
    )
    return [*traces, thick]


def _windows(scales: np.ndarray, inside: np.ndarray) -> list[tuple[float, float]]:
    """From half-way before each scale inside to half-way after it."""
    if len(scales) < 2:
        return []
    middles = (scales[1:] + scales[:-1]) / 2
    edges = np.concatenate([scales[:1], middles, scales[-1:]])
    return [(float(edges[i]), float(edges[i + 1])) for i in np.flatnonzero(inside)]


def _check_frame(frame: pd.DataFrame, argument: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing or not len(frame):
        raise ValueError(
            f"{argument}: "
            + (f"lacks the columns {missing}" if missing else "has no rows")
            + "; pass the frame as the analysis returned it"
        )
