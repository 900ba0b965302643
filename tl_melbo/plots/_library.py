"""A library's vectors against each other, and along their search."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from torch import Tensor

from tl_melbo import story
from tl_melbo.plots._style import DIVERGING, SEQUENTIAL, axis, colour_bar, figure, whole_numbers
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.vectors import SteeringVectors

# More traces than this make a browser slow, and nobody tells more colours apart.
_MOST_TRACES = 64
# The last fifth of the colours is a yellow too pale for a line on white.
_DARKEST_TO_PALEST = (0.0, 0.85)


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
        title: above the figure.
        labels: what to call the vectors, which then are rows and columns; None counts from 0.

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
        colorscale=DIVERGING,
        colorbar=colour_bar("cosine", tickvals=[-1, -0.5, 0, 0.5, 1]),
        hovertemplate="vector %{y} and vector %{x}<br>cosine %{z:.3f}<extra></extra>",
    )
    kind = "linear" if names is None else "category"
    across = axis("vector", showgrid=False, constrain="domain", type=kind)
    across |= whole_numbers(max(z.shape))
    down = across | {"autorange": "reversed", "scaleanchor": "x"}
    return figure(heatmap, title, across, down, 640, 740)


@shape_checked
def objective_history(
    found: SteeringVectors, title: str = "Objective during the search"
) -> go.Figure:
    """Draw what the search measured against its steps (or gradient evaluations), a line a vector.

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
    return figure(traces, title, across, up)


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
