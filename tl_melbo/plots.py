"""Numbers to figures: plotly, returned and never shown, readable by colour-blind eyes."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from torch import Tensor

from tl_melbo.shapes import Float, shape_checked
from tl_melbo.vectors import SteeringVectors

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


@shape_checked
def cosine_heatmap(
    similarity: Float[Tensor, "row column"],
    title: str = "Cosine similarity",
    *,
    labels: list[int] | None = None,
) -> go.Figure:
    """Draw a matrix of cosines: red for same direction, white for orthogonal, blue for opposite.

    Args:
        similarity: as `analysis.cosine_similarity` gives it, from -1 to 1.
        title: above the figure; "" for none.
        labels: numbers to call the vectors by, where they are not 0, 1, 2, ...; rows and columns
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
            that it was found by "ascent", and steps otherwise.
        title: above the figure; "" for none.

    Raises:
        ValueError: the library has no vectors, or no history of its search.
    """
    if found.history is None or not found.history.numel():
        raise ValueError(
            "found: has no history of its search; scaling a library drops it, and vectors made "
            "elsewhere never had one. Pass what melbo returned, or slices of it"
        )
    ascent = found.story.get("hyperparameters", {}).get("optimiser") == "ascent"
    history = found.history.double().numpy()
    # An ascent's first number took one gradient evaluation; AdamW's is before its first step.
    x = np.arange(history.shape[1]) + (1 if ascent else 0)
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
            "title": {"text": "gradient evaluations" if ascent else "step", "standoff": 8},
            "gridcolor": "#eaeef2",
            "tickformat": ",d",
        },
        yaxis=_AXIS
        | {
            "title": {"text": "objective (residual-stream units)", "standoff": 8},
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
