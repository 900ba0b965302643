"""What a vector does inside the model, as figures: tokens, components, layers."""

import html
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_melbo import checks
from tl_melbo.plots import _style
from tl_melbo.plots._style import BLUE, HOVER, OTHERS, axis, figure, line
from tl_melbo.shapes import shape_checked

_ADVICE = "pass the frame as the analysis returned it"
_LONGEST_TOKEN = 11
_CARRIED = {"share": "share of the effect", "kl": "KL of the next token (nats)"}


@shape_checked
def top_tokens(
    frame: pd.DataFrame, vector: int | None = None, title: str | None = None
) -> go.Figure:
    """Draw the tokens that are promoted (red) and suppressed (blue): a row a vector, or a layer.

    Args:
        frame: as `analysis.top_tokens` gives it, by layer or not.
        vector: by layer, whose; None takes the first in the frame. Else None draws all.
        title: None says what is drawn.
    """
    numbers = ("log_prob_change", "probability", "unsteered_probability")
    checks.columns(frame, ("vector", "direction", "rank", "token", *numbers), "frame", _ADVICE)
    row = "layer" if "layer" in frame else "vector"
    vector = int(frame["vector"].iloc[0]) if vector is None and row == "layer" else vector
    own = frame if vector is None else _of_vector(frame, vector)
    n, rows = int(own["rank"].max()), list(dict.fromkeys(own[row]))
    z = np.full((len(rows), 2 * n + 1), np.nan)
    text, hover = np.full(z.shape, "", object), np.full(z.shape, "", object)
    for each in own.to_dict("records"):
        # Promoted from the left, suppressed from the right: the strongest are outermost.
        column = each["rank"] - 1 if each["direction"] == "promoted" else 2 * n + 1 - each["rank"]
        place = rows.index(each[row]), column
        z[place], text[place] = each["log_prob_change"], _shown(each["token"])
        hover[place] = (
            f"{row} {each[row]}: {html.escape(repr(each['token']))}<br>log-probability "
            f"{each['log_prob_change']:+.2f} nats<br>probability {each['probability']:.3g}, "
            f"unsteered {each['unsteered_probability']:.3g}"
        )
    largest = float(np.nanmax(np.abs(z)))
    look = {"zmin": -largest, "zmid": 0, "zmax": largest, "colorscale": _style.DIVERGING}
    look["colorbar"] = _style.colour_bar("change of log-probability (nats)", side="bottom")
    told = {"text": text, "texttemplate": "%{text}", "customdata": hover, "hoverongaps": False}
    heatmap = go.Heatmap(z=z, y=[str(each) for each in rows], hovertemplate=HOVER, **told, **look)
    ticks = {
        "tickvals": [0, n - 1, n + 1, 2 * n],
        "ticktext": ["most promoted", "", "", "most suppressed"],
    }
    across = axis(None, showgrid=False, **ticks)
    down = axis(
        row, showgrid=False, type="category", autorange=None if row == "layer" else "reversed"
    )
    what = "next token" if row == "vector" else f"logit lens of vector {vector}, by layer"
    firsts = own[(own["direction"] == "promoted") & (own["rank"] <= 3)].groupby(row)["token"]
    best = "; ".join(f"{row} {each}: {', '.join(map(repr, some))}" for each, some in firsts)
    alt = f"Tokens promoted and suppressed ({what}). Most promoted of {best}."
    named = f"Promoted and suppressed tokens: {what}" if title is None else title
    width, height = 120 + 66 * (2 * n + 1), 190 + 30 * len(rows)
    return figure(heatmap, named, alt, across, down, width, height)


def _shown(token: str) -> str:
    """A token short enough for a cell; a space at its beginning is part of it."""
    token = f"·{token[1:]}" if token.startswith(" ") else token
    short = token if len(token) <= _LONGEST_TOKEN else f"{token[: _LONGEST_TOKEN - 1]}…"
    return html.escape(short)


def _of_vector(frame: pd.DataFrame, vector: int) -> pd.DataFrame:
    own = pd.DataFrame(frame[frame["vector"] == vector])
    if own.empty:
        raise ValueError(f"vector={vector}: the frame has {sorted({*frame['vector']})}")
    return own


@shape_checked
def mechanism(
    frame: pd.DataFrame,
    vector: int | None = None,
    value: Literal["share", "kl"] = "share",
    title: str | None = None,
) -> go.Figure:
    """Draw what each attention head and MLP carries alone: layers down, heads across, MLPs last.

    Args:
        frame: as `analysis.mechanism` gives it; what that can show stands there.
        vector: None takes the first in the frame.
        title: None says what is drawn, and what the direct path carries.
    """
    checks.columns(frame, ("vector", "component", "layer", "head", "share", "kl"), "frame", _ADVICE)
    vector = int(frame["vector"].iloc[0]) if vector is None else vector
    own = _of_vector(frame, vector)
    whole, direct = (own[own["component"] == kind].iloc[0] for kind in ("all", "direct"))
    parts = own[own["component"].isin(["head", "mlp"])]
    heads, layers = int(parts["head"].max()) + 1, sorted({*parts["layer"]})
    z, hover = (
        np.full((len(layers), heads + 2), np.nan),
        np.full((len(layers), heads + 2), "", object),
    )
    for each in parts.to_dict("records"):
        place = layers.index(each["layer"]), each["head"] if each["head"] >= 0 else heads + 1
        z[place] = each[value]
        hover[place] = f"{_named(each)}<br>share {each['share']:.3f}<br>KL {each['kl']:.3g} nats"
    largest = float(np.nanmax(np.abs(z)))
    look: dict[str, Any] = {"zmin": -largest, "zmid": 0, "zmax": largest}
    look |= {"colorscale": _style.DIVERGING, "hoverongaps": False}
    look["colorbar"] = _style.colour_bar(_CARRIED[value], side="bottom")
    heatmap = go.Heatmap(z=z, y=layers, customdata=hover, hovertemplate=HOVER, **look)
    ticks = {"tickvals": [*range(heads), heads + 1], "ticktext": [*map(str, range(heads)), "MLP"]}
    across = axis("head", showgrid=False, **ticks)
    up = axis("layer", showgrid=False, dtick=1)
    best = parts.sort_values(value, ascending=False).head(3).to_dict("records")
    told = ", ".join(f"{_named(each)} {each[value]:.2g}" for each in best)
    what = f"{_CARRIED[value]} of vector {vector} that each component carries alone"
    alt = f"{what[0].upper()}{what[1:]}. Most: {told}. Direct path {direct[value]:.2g}, all "
    named = (
        f"Vector {vector}: {_CARRIED[value]} at layer {direct['layer']}, by component"
        f"<br><sub>direct path {direct[value]:.2g}, all {whole[value]:.2g}</sub>"
        if title is None
        else title
    )
    height = max(380, 220 + 32 * len(layers))
    return figure(heatmap, named, f"{alt}{whole[value]:.2g}.", across, up, 720, height)


def _named(part: Any) -> str:
    return f"layer {part['layer']} " + (f"head {part['head']}" if part["head"] >= 0 else "MLP")


@shape_checked
def effect_by_layer(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw the norm of each vector's effect after every layer: a thin line a vector, log axis.

    Args:
        frame: as `analysis.effect_by_layer` gives it.
        title: None names the groups, and their norm where they share one.
    """
    checks.columns(frame, ("vectors", "vector", "norm", "layer", "effect"), "frame", _ADVICE)
    traces, told = [], []
    named = frame.groupby("vectors", sort=False)
    last = frame["layer"].max()
    for (name, some), colour in zip(
        named, (*OTHERS[:1], BLUE, *OTHERS[1:]) * len(named), strict=False
    ):
        # All of one group are one trace, with a gap after each vector.
        wide = some.pivot(index="vector", columns="layer", values="effect")
        wide["gap"] = np.nan
        x = np.tile([*wide.columns[:-1], np.nan], len(wide))
        numbers = np.repeat(wide.index.to_numpy(), wide.shape[1])
        look = {"width": 1, "color": colour}
        known = html.escape(str(name))
        hover = f"{known} %{{customdata}}: %{{y:.4g}} after layer %{{x}}<extra></extra>"
        shown = {"name": known, "customdata": numbers, "hovertemplate": hover}
        traces.append(line(x, wide.to_numpy().ravel(), look, opacity=0.7, **shown))
        ends = some[some["layer"] == last]["effect"]
        told.append(f"{name} ({len(wide)} vectors) {_style.span(ends)}, median {ends.median():.3g}")
    norms = frame["norm"]
    same = f", ‖θ‖ = {norms.mean():.3g}" if np.ptp(norms) <= 1e-3 * norms.max() else ""
    what = f"Effect size by layer: {' vs '.join(map(str, named.groups))}{same}"
    alt = f"{what}. After layer {last}: {'; '.join(told)}, in units of the residual stream."
    up = axis("effect (residual-stream units)", type="log", tickformat="~g", dtick="D2")
    across = axis("after layer", tickformat=",d")
    return figure(
        traces, html.escape(what) if title is None else title, alt, across, up, showlegend=True
    )
