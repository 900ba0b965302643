"""What a vector does inside the model, as figures: tokens, components, layers."""

from itertools import cycle
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_melbo import checks
from tl_melbo.plots import _style
from tl_melbo.plots._style import BLUE, OTHERS, axis, figure, line
from tl_melbo.shapes import shape_checked

_ADVICE = "pass the frame as the analysis returned it"
_LONGEST_TOKEN, _MOST_TOLD = 9, 8
_CARRIED = {"share": "share of the effect", "kl": "next-token KL (nats)"}


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
    own = frame if vector is None else _style.of_vector(frame, vector)
    rows = list(dict.fromkeys(own[row]))
    # As many columns as either kind has, and one between.
    last = sum(max(some) for _, some in own.groupby("direction")["rank"])
    z = np.full((len(rows), last + 1), np.nan)
    text, hover = np.full(z.shape, "", object), np.full(z.shape, "", object)
    for each in own.to_dict("records"):
        # Promoted from the left, suppressed from the right: the strongest are outermost.
        column = each["rank"] - 1 if each["direction"] == "promoted" else last + 1 - each["rank"]
        place = rows.index(each[row]), column
        z[place], text[place] = each["log_prob_change"], _shown(each["token"])
        hover[place] = (
            f"{row} {each[row]}: {_style.escaped(repr(each['token']))}<br>log-probability "
            f"{each['log_prob_change']:+.2f} nats<br>probability {each['probability']:.3g}, "
            f"unsteered {each['unsteered_probability']:.3g}"
        )
    told = {"text": text, "texttemplate": "%{text}", "textfont": {"size": 11}}
    heatmap = _diverging(z, hover, "change of log-probability (nats)", y=[*map(str, rows)], **told)
    ends = {"tickvals": [0, last], "ticktext": ["promoted", "suppressed"]}
    # Layers go up, vectors down.
    order = None if row == "layer" else "reversed"
    down = axis(row, showgrid=False, type="category", autorange=order)
    what = "next token" if row == "vector" else f"logit lens of vector {vector}, by layer"
    firsts = own[(own["direction"] == "promoted") & (own["rank"] <= 3)].groupby(row)["token"]
    best = [f"{row} {each}: {', '.join(map(repr, some))}" for each, some in firsts]
    best = best[-1:] if row == "layer" else best[:_MOST_TOLD]
    alt = f"Tokens promoted and suppressed ({what}). Most promoted of {'; '.join(best)}."
    named = f"Promoted and suppressed tokens: {what}" if title is None else title
    size = 140 + 62 * (last + 1), 190 + 28 * len(rows)
    return figure(heatmap, named, alt, axis(None, showgrid=False, **ends), down, *size)


def _diverging(z: np.ndarray, hover: Any, name: str, **more: Any) -> go.Heatmap:
    largest = float(np.nanmax(np.abs(z)))
    return _style.heatmap(z, hover, name, -largest, largest, _style.DIVERGING, **more)


def _shown(token: str) -> str:
    """A token short enough for a cell; a space at its beginning is part of it."""
    shown = f"·{token[1:]}" if token.startswith(" ") else token
    return _style.wrapped(shown, _LONGEST_TOKEN)


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
    own = _style.of_vector(frame, vector)
    by_kind = {str(kind): pd.DataFrame(some) for kind, some in own.groupby("component")}
    if missing := {"all", "direct", "head", "mlp"} - by_kind.keys():
        raise ValueError(f"frame: has no rows {sorted(missing)} of vector {vector}; {_ADVICE}")
    parts = pd.concat([by_kind["head"], by_kind["mlp"]])
    heads, layers = max(parts["head"]) + 1, sorted({*parts["layer"]})
    z = np.full((len(layers), heads + 2), np.nan)
    hover = np.full(z.shape, "", object)
    for each in parts.to_dict("records"):
        place = layers.index(each["layer"]), each["head"] if each["head"] >= 0 else heads + 1
        z[place] = each[value]
        hover[place] = f"{_named(each)}<br>share {each['share']:.3f}<br>KL {each['kl']:.3g} nats"
    heatmap = _diverging(z, hover, _CARRIED[value], y=layers)
    ticks = {"tickvals": [*range(heads), heads + 1], "ticktext": [*map(str, range(heads)), "MLP"]}
    across, up = axis("head", showgrid=False, **ticks), axis("layer", showgrid=False, dtick=1)
    best = parts.sort_values(value, ascending=False).head(3).to_dict("records")
    told = ", ".join(f"{_named(each)} {each[value]:.2g}" for each in best)
    whole, direct = (by_kind[kind].iloc[0] for kind in ("all", "direct"))
    what = f"Vector {vector}: {_CARRIED[value]} that each component carries"
    rest = f"direct path {direct[value]:.2g}, all {whole[value]:.2g}"
    alt = f"{what} alone, from layer {whole['layer']} to {direct['layer']}. Most: {told}; {rest}."
    named = f"{what} ({rest})" if title is None else title
    return figure(heatmap, named, alt, across, up, 760, max(380, 220 + 32 * len(layers)))


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
    colours = cycle((*OTHERS[:1], BLUE, *OTHERS[1:]))
    for (name, some), colour in zip(named, colours, strict=False):
        # All of one group are one trace, with a gap after each vector.
        wide = some.pivot(index="vector", columns="layer", values="effect")
        wide["gap"] = np.nan
        x = np.tile([*wide.columns[:-1], np.nan], len(wide))
        numbers = np.repeat(wide.index.to_numpy(), wide.shape[1])
        look = {"width": 1, "color": colour}
        known = _style.escaped(str(name))
        hover = f"{known} %{{customdata}}: %{{y:.4g}} after layer %{{x}}<extra></extra>"
        shown = {"name": known, "customdata": numbers, "hovertemplate": hover}
        traces.append(line(x, wide.to_numpy().ravel(), look, opacity=0.7, **shown))
        ends = np.asarray(some[some["layer"] == last]["effect"])
        size = f"{_style.span(ends)}, median {np.median(ends):.3g}"
        told.append(f"{name} ({len(wide)} vectors) {size}")
    norms = frame["norm"]
    same = f", ‖θ‖ = {norms.mean():.3g}" if np.ptp(norms) <= 1e-3 * norms.max() else ""
    what = f"Effect size by layer: {' vs '.join(map(str, named.groups))}{same}"
    alt = f"{what}. After layer {last}: {'; '.join(told)}, in units of the residual stream."
    up = axis("effect (residual-stream units)", type="log", tickformat="~g", dtick="D2")
    across = axis("after layer", tickformat=",d")
    title = _style.escaped(what) if title is None else title
    return figure(traces, title, alt, across, up, showlegend=True)
