"""A library's vectors against each other, along their search, by index, and as a map.

Source of the curves: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.colors import sample_colorscale
from torch import Tensor

from tl_melbo import checks, story
from tl_melbo.analysis._similarity import cosine_similarity
from tl_melbo.plots import _style
from tl_melbo.plots._style import OTHERS, axis, escaped, figure, hovering, line, points
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.vectors import SteeringVectors

# More traces than this make a browser slow, and nobody tells more colours apart.
_MOST_TRACES = 64
# The last fifth of the colours is a yellow too pale for a line on white.
_DARKEST_TO_PALEST = (0.0, 0.85)
_UNIT = "residual-stream units"
_FAMILY_BASELINES = {
    "unsteered": "unsteered",
    "random": "random vectors of the same norms",
    "rescaled": "the family at the reference's norm",
}
# Seen on white and on black.
_PALE_GREY = "#8c959f"
_LONGEST_NAME = 40
# Grey, whatever there is beside them.
_ASIDE = {"≈ baseline": "circle", "filtered out": "x"}
# More names than this hide each other.
_MOST_NAMED = 80


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
        raise ValueError("similarity: holds values outside -1 to 1 or not finite; pass cosines")
    names = None if labels is None else [*map(str, labels)]
    if names is not None and z.shape != (len(names), len(names)):
        raise ValueError(f"labels: {len(names)} labels for a matrix of shape {z.shape}")
    bar = _style.colour_bar("cosine", tickvals=[-1, -0.5, 0, 0.5, 1])
    hover = "vector %{y} and vector %{x}<br>cosine %{z:.3f}<extra></extra>"
    look = {"zmin": -1, "zmid": 0, "zmax": 1, "colorscale": _style.DIVERGING, "colorbar": bar}
    heatmap = go.Heatmap(z=z, x=names, y=names, hovertemplate=hover, **look)
    kind = "linear" if names is None else "category"
    across = axis("vector", showgrid=False, constrain="domain", type=kind)
    across |= _style.whole_numbers(max(z.shape))
    down = across | {"autorange": "reversed", "scaleanchor": "x"}
    apart = z[~np.eye(*z.shape, dtype=bool)]
    alt = f"{title or 'Cosine similarity'} of {z.shape[0]} by {z.shape[1]} vectors: off the "
    alt += f"diagonal {_style.span(apart, 2)}." if len(apart) else "diagonal nothing."
    return figure(heatmap, title, alt, across, down, 640, 740)


@shape_checked
def objective_history(
    found: SteeringVectors, title: str = "Objective during the search"
) -> go.Figure:
    """Draw what the search measured against its steps, a line a vector.

    Raises ValueError where the library has no history.
    """
    if found.history is None or not found.history.numel():
        raise ValueError(
            "found: has no history of steps; pass what melbo or dct returned, not scaled"
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
        bar = _style.colour_bar("vector", tickvals=[0, 1], ticktext=ends)
        key: dict[str, Any] = {"color": [0], "cmin": 0, "cmax": 1, "colorscale": shades}
        key |= {"showscale": True, "colorbar": bar}
        traces.append(points([None], [None], key, hoverinfo="skip", showlegend=False))
    across = axis(measure["counts"], **_style.whole_numbers(len(x)))
    label = measure.get("history") or f"{measure['label']} ({measure['unit']})"
    up = axis(label, rangemode="tozero")
    finite = [row[np.isfinite(row)] for row in history]
    first, last = ([row[at] for row in finite if len(row)] for at in (0, -1))
    alt = f"{label} against {measure['counts']}, {len(found)} vectors: at first "
    alt += f"{_style.span(first)}, at the end {_style.span(last)}."
    return figure(traces, title, alt, across, up)


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
    kl: Float[Tensor, "vector"] | pd.DataFrame,
    found: SteeringVectors | None = None,
    *,
    completions: Sequence[str] | None = None,
    window: int = 50,
    baselines: Mapping[str, Tensor] | None = None,
    log_y: bool = False,
    title: str = "KL to the reference by vector",
) -> go.Figure:
    """Draw KL against index: a point a vector, and their moving average.

    Args:
        kl: as `analysis.kl_divergence` gives it, in nats; or the frame of `analysis.family`, also
            from a run's file, which brings numbers, norms, completions and baselines along.
        found: the library, for the index and norm of each vector; None numbers them from 0.
        completions: what the model writes under each, shown when a point is hovered over.
        window: how many points, up to and with each, are averaged.
        baselines: what to compare with, by name, in nats: one number, or one for each vector. With
            a frame, beside its own.
        log_y: a logarithmic axis; values under 1e-6 nats are drawn there.

    Raises:
        ValueError: no values, or negative or not finite ones, or lengths that differ; a frame
            without a family.
    """
    if isinstance(kl, pd.DataFrame):
        values, labels, more, levels = _of_family(kl)
    else:
        values, more, levels = _checked_kl(kl, "kl"), [], {}
        labels = np.arange(len(values)) if found is None else found.columns["index"].numpy()
    for argument, things in (("found", found), ("completions", completions)):
        if things is not None and len(things) != len(values):
            raise ValueError(
                f"{argument}: {len(things)}, but kl holds {len(values)} values; pass one for each"
            )
    if found is not None and not isinstance(kl, pd.DataFrame):
        more.append([f"norm {norm:.4g}" for norm in found.norms])
    if completions is not None:
        more.append([_style.wrapped(text) for text in completions])
    for name, level in (baselines or {}).items():
        levels[name] = _checked_kl(level.flatten(), f"baselines[{name!r}]")
    for name, level in levels.items():
        if len(level) not in (1, len(values)):
            raise ValueError(f"baselines[{name!r}]: {len(level)} values, not 1 or {len(values)}")
    least = _style.SMALLEST_KL if log_y else 0.0
    drawn = _curve(labels, values, "KL", "KL (nats)", window, levels, title, more, least)
    return drawn.update_yaxes(type="log", exponentformat="power") if log_y else drawn


def _of_family(
    frame: pd.DataFrame,
) -> tuple[np.ndarray, np.ndarray, list[list[str]], dict[str, np.ndarray]]:
    """Of the family's own rows: KL, numbers, what hovering shows; and its baselines."""
    needed = ("kind", "index", "norm", "kl_to_reference", "completion")
    checks.columns(frame, needed, "kl", "pass the frame of analysis.family")
    rows = {str(kind): pd.DataFrame(some) for kind, some in frame.groupby("kind")}
    if "family" not in rows:
        raise ValueError("kl: no row is of the kind 'family'; pass the frame of analysis.family")
    kl = {
        kind: _checked_kl(torch.tensor(some["kl_to_reference"].to_numpy()), f"kl, {kind}")
        for kind, some in rows.items()
        if kind != "reference"
    }
    own, names = rows["family"], dict(_FAMILY_BASELINES)
    if "reference" in rows:
        names["rescaled"] = f"the family at norm {rows['reference']['norm'].iloc[0]:.4g}"
    told = [
        [f"norm {norm:.4g}" for norm in own["norm"]],
        ["" if pd.isna(text) else _style.wrapped(str(text)) for text in own["completion"]],
    ]
    levels = {name: kl[kind] for kind, name in names.items() if kind in kl}
    return kl["family"], own["index"].to_numpy(), told, levels


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
    average = moving_average(values, window)
    mean = {"name": f"mean of the last {window}", "hoverinfo": "skip", "showlegend": window > 1}
    traces = [
        points(labels, values, look, name="each vector", **hovering(told)),
        line(labels, average, {"width": 2.2, "color": _style.BLUE}, **mean),
    ]
    for (name, level), colour in zip(levels.items(), cycle(OTHERS), strict=False):
        if level is not None:
            heights = np.maximum(np.atleast_1d(level), least)
            traces += _baseline(labels, heights, window, escaped(name), colour)
    up = axis(y_title, rangemode="tozero")
    across = axis("vector", **_style.whole_numbers(len(labels)))
    known = [(name, level) for name, level in levels.items() if level is not None]
    alt = f"{y_title} of {len(values)} vectors: {_style.span(values)}, median "
    alt += f"{np.median(values):.3g}." + "".join(
        f" {name}: {_style.span(np.atleast_1d(level))}." for name, level in known
    )
    return figure(traces, title, alt, across, up)


def _baseline(
    labels: np.ndarray, values: np.ndarray, window: int, name: str, colour: str
) -> list[go.Scatter]:
    """One value as a dashed line, or many as points with a dashed average."""
    dashed = {"width": 1.6, "dash": "dash", "color": colour}
    more: dict[str, Any] = {"name": name, "legendgroup": name}
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
        raise ValueError(f"{argument}: no values, or negative or not finite ones; leave these out")
    return values


@shape_checked
def effect_map(
    places: Float[Tensor, "vector 2"],
    labels: Sequence[int | str],
    groups: Sequence[str | None] | None = None,
    *,
    shares: tuple[float, float] | None = None,
    title: str = "Map of effects",
) -> go.Figure:
    """Draw vectors as points, near each other where their effects are alike, by behaviour.

    Args:
        places: of each vector, as `analysis.effect_plane` gives them.
        labels: what the vectors are called; one that ends in "-" is a negative, drawn hollow.
        groups: the behaviour of each; grey where it is "≈ baseline", "filtered out", or None.
        shares: of the variance, for the names of the axes.

    Raises:
        ValueError: other numbers of labels or groups than of places.
    """
    named = [None] * len(labels) if groups is None else groups
    for argument, things in (("labels", labels), ("groups", named)):
        if len(things) != len(places):
            raise ValueError(
                f"{argument}: {len(things)} for {len(places)} places; pass one for each"
            )
    seen = [name for name in dict.fromkeys(named) if name and name not in _ASIDE]
    looks: dict[str | None, tuple[str, str]] = dict(zip(seen, cycle(_style.LOOKS), strict=False))
    xy, traces = places.detach().cpu().double().tolist(), []
    for name in dict.fromkeys(named):
        colour, symbol = looks.get(name, (_PALE_GREY, _ASIDE.get(str(name), "circle")))
        at = [place for place, other in enumerate(named) if other == name]
        # The legend shows the first one's symbol.
        at.sort(key=lambda place: str(labels[place]).endswith("-"))
        texts = [str(labels[place]) for place in at]
        hollow = [f"{symbol}-open" if text.endswith("-") else symbol for text in texts]
        whole = str(name or "not grouped")
        shown = _style.wrapped(whole, _LONGEST_NAME)
        look = {"size": 10, "color": colour, "symbol": hollow, "opacity": 0.85}
        dots = points([xy[i][0] for i in at], [xy[i][1] for i in at], look, name=shown)
        told = [f"vector {escaped(text)}<br>{shown}" for text in texts]
        if len(labels) <= _MOST_NAMED:
            signed = [f"−{text[:-1]}" if text.endswith("-") else text for text in texts]
            shape = {"textposition": "top center", "textfont": {"size": 9, "color": _style.GREY}}
            dots.update(mode="markers+text", text=[*map(escaped, signed)], **shape)
        traces.append(dots.update(meta=texts, **hovering(told)))
    titles = ["first component", "second component"]
    if shares is not None:
        titles = [f"{name} ({share:.0%})" for name, share in zip(titles, shares, strict=True)]
    across, up = axis(titles[0], zeroline=True), axis(titles[1], zeroline=True)
    alt = f"{title or 'Map of effects'}: {len(labels)} vectors in {len(seen)} behaviours; those "
    alt += "near each other have a similar effect."
    return figure(traces, title, alt, across, up, showlegend=True)
