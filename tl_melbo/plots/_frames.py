"""The frames that the analyses return, as figures. A frame without its columns: ValueError."""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_melbo import checks
from tl_melbo.plots import _style
from tl_melbo.plots._style import (
    BLUE,
    DOTTED,
    GREY,
    OTHERS,
    axis,
    figure,
    hovering,
    line,
    points,
    span,
)
from tl_melbo.shapes import shape_checked

Measure = Literal["kl_to_reference", "kl_to_unsteered", "distance"]
AtlasValue = Literal["singular_value", "share", "cumulative_share", "kl"]

_ADVICE = "pass the frame as the analysis returned it"
_MEASURES = {
    "kl_to_reference": "KL to the reference (nats)",
    "kl_to_unsteered": "KL to the unsteered model (nats)",
    "distance": "distance from the reference (residual-stream units)",
}
_ATLAS_TITLES = {
    "singular_value": "singular value",
    "share": "share of the sum of squared singular values",
    "cumulative_share": "share of this and the larger singular values, squared",
    "kl": "KL to unsteered (nats)",
}
_PRESENCE = ("mean_projection", "mean_projection_control", "p_value", "p_adjusted")
# Times the median: above that an axis is logarithmic.
_WIDE = 5
_SIGNS, _MOST_TEXTS = {1: "along", -1: "against"}, 4
# Combination, scaling, and what to call them.
_KINDS = (
    ("mean", "raw", "mean"),
    ("sum", "raw", "sum"),
    ("mean", "reference norm", "at the reference's norm"),
    ("mean", "mean norm", "at the members' mean norm"),
)


@shape_checked
def composition_curves(
    composed: pd.DataFrame, measure: Measure | None = None, title: str | None = None
) -> go.Figure:
    """Draw what adding up does against how many are added: lines for the first k, rings for random.

    Args:
        composed: as `analysis.composition` gives it.
        measure: the column on the vertical axis; None takes "kl_to_reference", or without a
            reference "kl_to_unsteered".
        title: None names the measure.
    """
    columns = ("size", "members", "subset", "combination", "scaling", "norm", "completion")
    checks.columns(composed, (*columns, *get_args(Measure)), "composed", _ADVICE)
    if measure is None:
        known = np.isfinite(composed["kl_to_reference"].to_numpy()).any()
        measure = "kl_to_reference" if known else "kl_to_unsteered"
    if np.isnan(composed[measure].to_numpy()).all():
        raise ValueError(f"measure={measure!r}: not known without a reference; compose with one")
    groups = dict(iter(composed.groupby(["combination", "scaling", "subset"])))
    traces = [
        _composition_trace(groups[combination, scaling, subset], measure, name, subset, colour)
        for (combination, scaling, name), colour in zip(_KINDS, (BLUE, *OTHERS), strict=False)
        for subset in ("first", "random")
        if (combination, scaling, subset) in groups
    ]
    across = axis(
        "vectors added up (rings: random subsets)",
        tickvals=sorted(set(composed["size"])),
        tickformat=",d",
    )
    what = _MEASURES[measure]
    named = f"Means and sums: {what}"
    told = [
        f"{kind}, first {rows['size'].min()}: {rows[measure].iloc[0]:.3g}, first "
        f"{rows['size'].max()}: {rows[measure].iloc[-1]:.3g}"
        for combination, scaling, kind in _KINDS
        if (rows := groups.get((combination, scaling, "first"))) is not None
    ]
    alt = f"{named} against how many vectors are added up. {'; '.join(told)}."
    values = composed[measure].dropna().to_numpy(dtype=float)
    # One sum far above all else would leave the others on one line.
    wide = bool(values.min() > 0 and values.max() > _WIDE * np.median(values))
    up = axis(what, **({"type": "log"} if wide else {"rangemode": "tozero"}))
    return figure(traces, named if title is None else title, alt, across, up)


def _composition_trace(
    rows: pd.DataFrame, measure: str, name: str, subset: str, colour: str
) -> go.Scatter:
    first = subset == "first"
    hover = [
        f"{subset} {row['size']}, {name}"
        f"<br>members {_style.wrapped(str(list(row['members'])), 100)}"
        f"<br>{measure.replace('_', ' ')} {row[measure]:.4g}, norm {row['norm']:.4g}"
        f"<br>{_style.wrapped(row['completion'])}"
        for row in rows.to_dict("records")
    ]
    look = {"size": 8, "color": colour, "symbol": "circle" if first else "circle-open"}
    told = {**hovering(hover), "legendgroup": name, "showlegend": first}
    place = rows["size"], rows[measure]
    if first:
        return line(*place, {"width": 1.8, "color": colour}, look, name=name, **told)
    return points(*place, look, name=f"{name}, random", **told)


@shape_checked
def scale_curves(
    swept: pd.DataFrame,
    *,
    changed: float = 0.5,
    repetitive: float = 0.2,
    title: str = "KL and repetition by scale",
) -> go.Figure:
    """Draw KL and repetition against scale, with the window between too weak and too strong shaded.

    Thin lines are vectors, thick ones their median.

    Args:
        swept: as `analysis.scale_sweep` gives it.
        changed: the median KL to the unsteered model, in nats, from which on the window begins.
        repetitive: the median share of repeated 3-grams up to which it goes.
    """
    columns = ("vector", "scale", "norm", "kl", "repetition", "completion")
    checks.columns(swept, columns, "swept", _ADVICE)
    median = swept.groupby("scale").median(numeric_only=True)
    inside = (median["kl"] >= changed) & (median["repetition"] <= repetitive)
    # From half-way before each scale inside to half-way after it.
    scales = median.index.to_numpy()
    edges = np.concatenate([scales[:1], (scales[1:] + scales[:-1]) / 2, scales[-1:]])
    window = span(scales[inside]) if np.any(inside) else "none"
    n_vectors = swept["vector"].nunique()
    alt = (
        f"KL to unsteered and repetition against scale, {n_vectors} vectors and their median. "
        f"Scales at which the median KL is at least {changed:g} and repetition at most "
        f"{repetitive:g}: {window}."
    )
    empty = figure([], title, alt, height=600)
    panels = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06, figure=empty)
    shown = (("kl", "KL (nats)", changed), ("repetition", "repetition", repetitive))
    for row, (column, name, threshold) in enumerate(shown, start=1):
        place: dict[str, Any] = {"row": row, "col": 1}
        for trace in _scale_traces(swept, median, column):
            panels.add_trace(trace.update(showlegend=row == 1 and trace.showlegend), **place)
        panels.add_hline(threshold, line=DOTTED, **place)
        window = {"fillcolor": OTHERS[1], "opacity": 0.14, "line_width": 0, "layer": "below"}
        for i in np.flatnonzero(inside):
            panels.add_vrect(edges[i], edges[i + 1], **window, **place)
        panels.update_yaxes(axis(name, rangemode="tozero"), **place)
    return panels.update_xaxes(axis(None)).update_xaxes(axis("scale"), row=2, col=1)


def _scale_traces(swept: pd.DataFrame, median: pd.DataFrame, column: str) -> Iterator[go.Scatter]:
    each = {"name": "each vector", "legendgroup": "each vector", "opacity": 0.6}
    for number, (_, rows) in enumerate(swept.sort_values("scale").groupby("vector")):
        hover = [
            f"vector {row['vector']} at {row['scale']:g} (norm {row['norm']:.4g})<br>"
            f"{column} {row[column]:.4g}<br>{_style.wrapped(row['completion'])}"
            for row in rows.to_dict("records")
        ]
        look, dots = {"width": 1, "color": _style.PALE_BLUE}, {"size": 5}
        told = {**hovering(hover), "showlegend": number == 0}
        yield line(rows["scale"], rows[column], look, dots, **each, **told)
    middle = {"name": "median", "legendgroup": "median", "showlegend": True, "hoverinfo": "skip"}
    yield line(median.index, median[column], {"width": 2.6, "color": BLUE}, **middle)


@shape_checked
def transfer_heatmap(
    transferred: pd.DataFrame, title: str = "KL to unsteered on each prompt"
) -> go.Figure:
    """Draw the KL of every vector on every prompt, as `analysis.transfer` gives it."""
    columns = ("prompt", "vector", "kl", "completion", "unsteered_completion")
    checks.columns(transferred, columns, "transferred", _ADVICE)
    n_vectors = len(set(transferred["vector"]))
    prompts = transferred["prompt"].to_numpy()[::n_vectors]
    hover = [
        f"vector {row['vector']}, KL {row['kl']:.4g}<br>{_style.wrapped(row['completion'])}<br><br>"
        f"unsteered:<br>{_style.wrapped(row['unsteered_completion'])}"
        for row in transferred.to_dict("records")
    ]
    z = transferred["kl"].to_numpy().reshape(-1, n_vectors)
    told, numbers = np.array(hover).reshape(z.shape), transferred["vector"].to_numpy()[:n_vectors]
    heatmap = _style.heatmap(z, told, "KL to unsteered (nats)", 0, z.max(), x=numbers)
    # By number, not by name: two prompts may begin alike.
    names = [_style.wrapped(prompt, 40) for prompt in prompts]
    ticks = {"tickvals": list(range(len(prompts))), "ticktext": names}
    down = axis(None, showgrid=False, autorange="reversed", automargin=True, **ticks)
    height = max(440, 240 + 32 * len(prompts))
    best = ", ".join(f"{value:.3g}" for value in np.median(z, axis=1))
    alt = f"KL to unsteered of {n_vectors} vectors on {len(prompts)} prompts; medians {best} nats."
    return figure(heatmap, title, alt, axis("vector", showgrid=False), down, height=height)


@shape_checked
def atlas_heatmap(
    table: pd.DataFrame,
    value: AtlasValue = "singular_value",
    vector: int = 0,
    title: str = "Pairs of layers",
) -> go.Figure:
    """Draw a number of every pair of layers: its source across, its target up.

    Args:
        table: of an `evaluation.Atlas`.
        value: a column; of "kl", the mean over prompts for the sign whose mean is larger.
        vector: 0 is that of each pair's largest singular value.
    """
    columns = ("source_layer", "target_layer", "vector", "sign", "norm", "completion")
    checks.columns(table, (*columns, *get_args(AtlasValue)), "table", "pass Atlas.table")
    rows = _style.of_vector(table, vector, "table")
    cells = pd.DataFrame([_atlas_cell(pair) for _, pair in rows.groupby([*columns[:2]])])
    name = _ATLAS_TITLES[value]
    return _style.layers_heatmap(cells, value, name, f"{name} of vector {vector}", title)


def _atlas_cell(pair: Any) -> dict[str, Any]:
    """The numbers of one pair of layers, and what hovering tells of it."""
    row: dict[str, Any] = pair.to_dict("records")[0]
    kl = pair.groupby(pair["sign"].map(_SIGNS), sort=False)["kl"].mean()
    texts = zip(pair["sign"].map(_SIGNS), pair["completion"], strict=True)
    texts = [f"{name}: {text}" for name, text in texts if isinstance(text, str)]
    hover = (
        f"layer {row['source_layer']} to {row['target_layer']}, vector {row['vector']}"
        f"<br>singular value {row['singular_value']:.4g}, share {row['share']:.3g}"
        f"<br>KL {', '.join(f'{value:.3g} {name}' for name, value in kl.items())}"
        f" at norm {row['norm']:.4g}"
    )
    hover += "".join(f"<br><br>{_style.wrapped(text)}" for text in texts[:_MOST_TEXTS])
    return {**row, "kl": kl.max(), "hover": hover}


@shape_checked
def presence_points(
    scanned: pd.DataFrame,
    q: float = 0.05,
    title: str = "Is the direction used? AUROC per vector",
) -> go.Figure:
    """Draw the AUROC of every vector, those beyond the random-direction null apart.

    A positive control is a star, filled where the test finds it: the test has power.

    Args:
        scanned: as `analysis.presence` gives it.
        q: adjusted p-values below this count as found.
    """
    checks.columns(scanned, ("index", "auroc", *_PRESENCE), "scanned", _ADVICE)
    is_control = scanned.get("kind", pd.Series("vector", scanned.index)) == "control"
    found = scanned["p_adjusted"] < q
    traces, told = [], []
    for rows, name, colour, symbol in (
        (pd.DataFrame(scanned[~found & ~is_control]), "n.s.", "#8c959f", "circle-open"),
        (pd.DataFrame(scanned[found & ~is_control]), f"adjusted p < {q:g}", OTHERS[0], "diamond"),
    ):
        traces.append(_presence_trace(rows, f"{name} ({len(rows)})", colour, symbol, 8))
        known = f", AUROC {span(rows['auroc'])}" if len(rows) else ""
        told.append(f"{len(rows)} {name}{known}")
    for place in np.flatnonzero(is_control):
        control = pd.DataFrame(scanned.iloc[[int(place)]])
        symbol = "star" if found.iloc[place] else "star-open"
        words = f"AUROC {control['auroc'].iloc[0]:.2f}, p {control['p_value'].iloc[0]:.2g}"
        name = f"positive control ({words})"
        traces.append(_presence_trace(control, name, OTHERS[1], symbol, 14))
        told.append(name)
    up = axis("AUROC, texts against control", range=[-0.03, 1.03])
    across = axis("vector", **_style.whole_numbers(len(found)))
    alt = f"AUROC of {len(scanned)} directions, texts against control texts. {'; '.join(told)}."
    drawn = figure(traces, title, alt, across, up, showlegend=True)
    return drawn.add_hline(0.5, line=DOTTED)


def _presence_trace(
    rows: pd.DataFrame, name: str, colour: str, symbol: str, size: int
) -> go.Scatter:
    what = "positive control" if symbol.startswith("star") else "vector %{x}"
    hover = (
        f"{what}<br>AUROC %{{y:.3f}}<br>mean projection %{{customdata[0]:.3g}}, in control "
        "%{customdata[1]:.3g}<br>p %{customdata[2]:.3g}, adjusted %{customdata[3]:.3g}"
        "<extra></extra>"
    )
    look = {"size": size, "color": colour, "symbol": symbol}
    numbers = np.asarray(rows[[*_PRESENCE]])
    told = {"name": name, "customdata": numbers, "hovertemplate": hover}
    return points(rows["index"], rows["auroc"], look, **told)


@shape_checked
def specificity_points(
    measured: pd.DataFrame, title: str = "Effect on the prompt and elsewhere"
) -> go.Figure:
    """Draw what every vector does on its prompt against what it does elsewhere.

    On the dotted diagonal the specificity is 0.5. Darker dots cost more on ordinary prose. The
    frame is that of `analysis.side_effects`.
    """
    columns = ("vector", "kl_target", "kl_unrelated", "specificity", "loss_increase")
    # A row that was not finite has no place.
    if "specificity" in measured:
        measured = pd.DataFrame(measured[measured["specificity"].notna()])
    checks.columns(measured, columns, "measured", _ADVICE)
    elsewhere = measured["kl_unrelated"].clip(lower=_style.SMALLEST_KL).tolist()
    target = measured["kl_target"].clip(lower=_style.SMALLEST_KL).tolist()
    hover = (
        "vector %{customdata[0]}<br>KL on the prompt %{y:.3g}, elsewhere %{x:.3g}<br>specificity "
        "%{customdata[1]:.2f}<br>loss increase %{customdata[2]:.3g}<extra></extra>"
    )
    told = measured[["vector", "specificity", "loss_increase"]].to_numpy()
    losses = measured["loss_increase"].to_numpy()
    look: dict[str, Any] = {"size": 10, "color": losses, "line": {"width": 1, "color": GREY}}
    look |= {"colorscale": _style.SEQUENTIAL, "reversescale": True}
    # A tenth of a nat at least: without it, noise would get every colour.
    look |= {"cmin": min(0.0, losses.min()), "cmax": max(0.1, losses.max())}
    look["colorbar"] = {"title": {"text": "loss increase<br>(nats a token)"}, "thickness": 10}
    dots = points(elsewhere, target, look, customdata=told, hovertemplate=hover)
    names = {"textposition": "top center", "textfont": {"size": 9, "color": GREY}}
    dots.update(mode="markers+text", text=measured["vector"], **names)
    low, high = 0.6 * min(*elsewhere, *target), 1.7 * max(*elsewhere, *target)
    ends = [math.log10(low), math.log10(high)]
    across, up = (
        _style.log_axis(f"{name} (nats)", low, high, range=ends)
        for name in ("mean KL on unrelated prompts", "KL on the prompt")
    )
    alt = (
        f"KL on the prompt against KL on unrelated prompts, {len(measured)} vectors. Specificity "
        f"{span(measured['specificity'])}; loss increase {span(losses)} nats a token."
    )
    drawn = figure(dots, title, alt, across, up, 620)
    diagonal = {"x0": low, "y0": low, "x1": high, "y1": high, "layer": "below"}
    drawn.add_shape(type="line", **diagonal, line=DOTTED | {"color": GREY})
    corner: dict[str, Any] = {"xref": "paper", "yref": "paper", "font": {"color": GREY}}
    corner |= {"showarrow": False}
    drawn.add_annotation(text="more on the prompt", x=0.02, y=0.98, xanchor="left", **corner)
    return drawn.add_annotation(text="more elsewhere", x=0.98, y=0.02, xanchor="right", **corner)
