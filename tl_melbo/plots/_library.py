"""A library's vectors against each other, along their search, by index, and along a text.

Source of the curves: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
"""

import html
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from circuitsvis.tokens import colored_tokens
from circuitsvis.utils.render import RenderedHTML
from plotly.colors import sample_colorscale
from torch import Tensor

from tl_melbo import checks, story
from tl_melbo.analysis._presence import token_projections
from tl_melbo.analysis._similarity import cosine_similarity
from tl_melbo.model.bridge import Model
from tl_melbo.plots import _style
from tl_melbo.plots._style import BLUE, HOVER, OTHERS, axis, colour_bar, figure, line, points
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.steering import Vectors
from tl_melbo.text import printable
from tl_melbo.vectors import SteeringVectors

# More traces than this make a browser slow, and nobody tells more colours apart.
_MOST_TRACES = 64
# The last fifth of the colours is a yellow too pale for a line on white.
_DARKEST_TO_PALEST = (0.0, 0.85)
_UNIT = "residual-stream units"
# A token coloured by more than this share of the largest value has white letters.
_DARK = 0.6
_CALL = "CircuitsVis.render("


@shape_checked
def cosine_heatmap(
    similarity: Float[Tensor, "row column"] | SteeringVectors,
    title: str = "Cosine similarity",
    *,
    labels: Sequence[int | str] | None = None,
) -> go.Figure:
    """Draw a matrix of cosines: red for same direction, white for orthogonal, blue for opposite.

    A library is drawn as `analysis.cosine_similarity` of its vectors, by their numbers. `labels`
    name the vectors, None counts from 0. Raises ValueError where a value is outside -1 to 1 or not
    finite, or the labels are of another number.
    """
    if isinstance(similarity, SteeringVectors):
        numbers = similarity.columns["index"].tolist()
        if labels is None and numbers != [*range(len(numbers))]:
            labels = numbers
        similarity = cosine_similarity(similarity)
    z = similarity.detach().cpu().float().numpy()
    if not (np.abs(z) <= 1 + 1e-6).all():
        raise ValueError(
            "similarity: holds values outside -1 to 1, or not finite; pass what "
            "analysis.cosine_similarity returns"
        )
    names = None if labels is None else [*map(str, labels)]
    if names is not None and z.shape != (len(names), len(names)):
        raise ValueError(f"labels: {len(names)} labels for a matrix of shape {z.shape}")
    look = {"zmin": -1, "zmid": 0, "zmax": 1, "colorscale": _style.DIVERGING}
    look["colorbar"] = colour_bar("cosine", tickvals=[-1, -0.5, 0, 0.5, 1])
    hover = "vector %{y} and vector %{x}<br>cosine %{z:.3f}<extra></extra>"
    heatmap = go.Heatmap(z=z, x=names, y=names, hovertemplate=hover, **look)
    kind = "linear" if names is None else "category"
    across = axis("vector", showgrid=False, constrain="domain", type=kind)
    across |= _style.whole_numbers(max(z.shape))
    down = across | {"autorange": "reversed", "scaleanchor": "x"}
    return figure(heatmap, title, across, down, 640, 740)


@shape_checked
def objective_history(
    found: SteeringVectors, title: str = "Objective during the search"
) -> go.Figure:
    """Draw what the search measured against its steps, a line a vector.

    Raises ValueError where the library has no history.
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
    groups = np.array_split(np.arange(len(found)), min(len(found), _MOST_TRACES))
    shades = np.linspace(*_DARKEST_TO_PALEST, len(groups)).tolist()
    shades = [*map(str, sample_colorscale(_style.SEQUENTIAL, shades))]
    traces = [
        _lines(x, history[group], labels[group], colour)
        for group, colour in zip(groups, shades, strict=True)
    ]
    if len(found) > 1:  # nothing to see but a colour bar from the first vector to the last
        ends = [str(labels[0]), str(labels[-1])]
        key = {"color": [0], "cmin": 0, "cmax": 1, "colorscale": shades, "showscale": True}
        key["colorbar"] = colour_bar("vector", tickvals=[0, 1], ticktext=ends)
        traces.append(points([None], [None], key, hoverinfo="skip", showlegend=False))
    across = axis(measure["counts"], **_style.whole_numbers(len(x)))
    label = measure.get("history") or f"{measure['label']} ({measure['unit']})"
    up = axis(label, rangemode="tozero")
    return figure(traces, title, across, up)


def _lines(x: np.ndarray, history: np.ndarray, labels: np.ndarray, colour: str) -> go.Scatter:
    """Several vectors' lines as one trace, with a gap after each."""
    n_vectors, n_steps = history.shape
    x = np.tile(np.append(x, x[-1]), n_vectors)
    y = np.hstack([history, np.full((n_vectors, 1), np.nan)]).ravel()
    trace = line(x, y, {"width": 1.3, "color": colour}, opacity=0.85, showlegend=False)
    hover = "vector %{customdata}: %{y:.4g} at %{x}<extra></extra>"
    trace.update(customdata=np.repeat(labels, n_steps + 1), hovertemplate=hover)
    if (~np.isnan(history)).sum(1).max(initial=0) <= 1:
        trace.update(mode="markers", marker={"color": colour})
    return trace


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
        window: how many points, up to and with each, are averaged.
        baselines: what to compare with, by name, in nats: one number, or one for each vector.
        log_y: a logarithmic axis; values under 1e-6 nats are drawn there.

    Raises:
        ValueError: no values, or negative or not finite ones, or lengths that differ.
    """
    values = _checked_kl(kl, "kl")
    for argument, things in (("found", found), ("completions", completions)):
        if things is not None and len(things) != len(values):
            raise ValueError(
                f"{argument}: {len(things)}, but kl holds {len(values)} values; pass one for each"
            )
    more = [] if found is None else [[f"norm {norm:.4g}" for norm in found.norms]]
    if completions is not None:
        more.append([_style.wrapped(text) for text in completions])
    levels = {}
    for name, level in (baselines or {}).items():
        levels[name] = _checked_kl(level.flatten(), f"baselines[{name!r}]")
        if len(levels[name]) not in (1, len(values)):
            raise ValueError(
                f"baselines[{name!r}]: {len(levels[name])} values, expected one, or one for each "
                f"of the {len(values)} vectors"
            )
    labels = np.arange(len(values)) if found is None else found.columns["index"].numpy()
    least = _style.SMALLEST_KL if log_y else 0.0
    drawn = _curve(labels, values, "KL", "KL (nats)", window, levels, title, more, least)
    return drawn.update_yaxes(type="log", exponentformat="power") if log_y else drawn


@shape_checked
def norm_curve(
    found: SteeringVectors, window: int = 50, title: str = "Norm of each vector"
) -> go.Figure:
    """Draw norm against index, with theta0's norm as a dashed line for a MELBO-ortho family."""
    if not len(found):
        raise ValueError("found: a library without vectors; pass at least one")
    levels = {"theta0": (found.story.get("theta0") or {}).get("norm")}
    labels, norms = found.columns["index"].numpy(), found.norms.double().numpy()
    return _curve(labels, norms, "norm", f"norm ({_UNIT})", window, levels, title)


@shape_checked
def distance_curve(
    found: SteeringVectors,
    unsteered: float | None = None,
    window: int = 50,
    title: str = "Distance from the effect of theta0",
) -> go.Figure:
    """Draw how near each vector of a MELBO-ortho family came to theta0's effect, by index.

    `unsteered` is the distance without a vector, |z(0) - z(theta0)|, for a dashed line. Raises
    ValueError where no distances are known.
    """
    if not len(found) or "distance" not in found.columns:
        raise ValueError("found: has no distances; pass what melbo_ortho returned, not scaled")
    levels, name = {"unsteered": unsteered}, f"|z − z₀| ({_UNIT})"
    labels, distances = (found.columns[each].numpy() for each in ("index", "distance"))
    return _curve(labels, distances.astype(float), "distance", name, window, levels, title)


@shape_checked
def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each point; of all so far where there are fewer."""
    checks.at_least(1, window=window)
    # Window by window, not by differences of a running sum, which leave a large value's rounding.
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def _curve(
    labels: np.ndarray,
    values: np.ndarray,
    name: str,
    y_title: str,
    window: int,
    levels: Mapping[str, np.ndarray | float | None],
    title: str,
    more: Sequence[Sequence[str]] = (),
    least: float = 0.0,
) -> go.Figure:
    """A point a vector, their moving average, and what to compare with; nothing below `least`."""
    lines = ([f"vector {i}" for i in labels], [f"{name} {value:.4g}" for value in values], *more)
    told = ["<br>".join(of_one) for of_one in zip(*lines, strict=True)]
    values = np.maximum(values, least)
    look = {"size": 6, "color": _style.PALE_BLUE, "opacity": 0.75}
    average, name = moving_average(values, window), f"mean of the last {window}"
    traces = [
        points(labels, values, look, name="each vector", customdata=told, hovertemplate=HOVER),
        line(labels, average, {"width": 2.2, "color": BLUE}, name=name, hoverinfo="skip"),
    ]
    for (name, level), colour in zip(levels.items(), cycle(OTHERS), strict=False):
        if level is not None:
            heights = np.maximum(np.atleast_1d(level), least)
            traces += _baseline(labels, heights, window, html.escape(name), colour)
    up = axis(y_title, rangemode="tozero")
    across = axis("vector", **_style.whole_numbers(len(labels)))
    return figure(traces, title, across, up)


def _baseline(
    labels: np.ndarray, values: np.ndarray, window: int, name: str, colour: str
) -> list[go.Scatter]:
    """One value as a dashed line, or many as points with a dashed average."""
    dashed = {"width": 1.6, "dash": "dash", "color": colour}
    more = {"name": name, "legendgroup": name}
    more["hovertemplate"] = f"{name}: %{{y:.4g}}<extra></extra>"
    if len(values) == 1:
        # A single vector has no width to draw a line across.
        ends = np.array([labels.min() - 0.5, labels.max() + 0.5])
        return [line(ends, np.repeat(values, 2), dashed, **more)]
    look = {"size": 4, "color": colour, "opacity": 0.35}
    each = {"legendgroup": name, "showlegend": False}
    each["hovertemplate"] = f"{name} %{{x}}: %{{y:.4g}}<extra></extra>"
    average = moving_average(values, window)
    return [points(labels, values, look, **each), line(labels, average, dashed, **more)]


def _checked_kl(kl: Tensor, argument: str) -> np.ndarray:
    values = kl.detach().cpu().double().numpy()
    if not len(values) or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"{argument}: no values, or negative or not finite ones; pass what "
            "analysis.kl_divergence returns, without the vectors whose KL is infinite"
        )
    return values


@shape_checked
def token_presence(
    model: Model, vector: Vectors, text: str, layer: int | None = None
) -> RenderedHTML:
    """Show a text's tokens coloured by their projection on a vector, in the unsteered model.

    Blue tokens point along the vector, red ones against it; the first, an attention sink in most
    models, is left white. It makes no network requests; `str` is HTML.

    Args:
        vector: exactly one; its norm does not matter.
        text: raw, of more than one token.
        layer: after which block to look; None takes the layer that the vector was found at.
    """
    tokens, values = token_projections(model, vector, text, layer)
    largest = max(map(abs, values))
    source = colored_tokens(tokens, values, min_value=-largest, max_value=largest).local_src
    name = "static-" + source.partition('id="')[2].partition('"')[0]
    before, _, after = source.rpartition(_CALL)
    data, end, rest = after.rpartition("</script>")
    # No "<" in its data: a token "</script>" would end the script.
    data = data.replace("<", "\\u003c")
    # Plain coloured text stands above; the script, where it runs, takes it away.
    remove = f'document.getElementById("{name}")?.remove();\n    '
    spans = "".join(_span(*pair, largest or 1.0) for pair in zip(tokens, values, strict=True))
    source = f'<div id="{name}">{spans}</div>\n{before}{remove}{_CALL}{data}{end}{rest}'
    return _Offline(source, source)


class _Offline(RenderedHTML):
    """Coloured tokens that do not look for a network each time they are shown."""

    def _repr_html_(self) -> str:
        return self.local_src


def _span(token: str, value: float, largest: float) -> str:
    """A token in circuitsvis's colours: blue along the vector, red against it."""
    share = value / largest
    pale = f"{255 * (1 - abs(share)):.0f}"
    colour = f"rgb({pale},{pale},255)" if share > 0 else f"rgb(255,{pale},{pale})"
    ink = "white" if abs(share) > _DARK else "black"
    style = f"background:{colour};color:{ink};padding:1px;white-space:pre-wrap"
    return f'<span style="{style}" title="{value:.4g}">{html.escape(printable(token))}</span>'
