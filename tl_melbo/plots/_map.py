"""A library's effects as a map."""

from collections.abc import Sequence
from itertools import cycle

import plotly.graph_objects as go
from torch import Tensor

from tl_melbo.plots._style import (
    COLOURS,
    GREY,
    HOVER,
    PALE_BLUE,
    axis,
    escaped,
    figure,
    points,
)
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.text import printable

# Seen on white and on black.
_PALE_GREY = "#8c959f"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
_LOOKS = [(colour, symbol) for symbol in _SYMBOLS for colour in (*COLOURS, PALE_BLUE)]
_LONGEST_NAME = 40
# Grey, whatever there is beside them.
_ASIDE = {"≈ baseline": "circle", "filtered out": "x"}
# More names than this hide each other.
_MOST_NAMED = 80


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
    looks: dict[str | None, tuple[str, str]] = dict(zip(seen, cycle(_LOOKS), strict=False))
    xy, traces = places.detach().cpu().double().tolist(), []
    for name in dict.fromkeys(named):
        colour, symbol = looks.get(name, (_PALE_GREY, _ASIDE.get(str(name), "circle")))
        at = [place for place, other in enumerate(named) if other == name]
        # The legend shows the first one's symbol.
        at.sort(key=lambda place: str(labels[place]).endswith("-"))
        texts = [str(labels[place]) for place in at]
        hollow = [f"{symbol}-open" if text.endswith("-") else symbol for text in texts]
        whole = printable(str(name or "not grouped"))
        shown = escaped(whole if len(whole) <= _LONGEST_NAME else f"{whole[: _LONGEST_NAME - 1]}…")
        look = {"size": 10, "color": colour, "symbol": hollow, "opacity": 0.85}
        dots = points([xy[i][0] for i in at], [xy[i][1] for i in at], look, name=shown)
        told = [f"vector {escaped(text)}<br>{shown}" for text in texts]
        if len(labels) <= _MOST_NAMED:
            signed = [f"−{text[:-1]}" if text.endswith("-") else text for text in texts]
            shape = {"textposition": "top center", "textfont": {"size": 9, "color": GREY}}
            dots.update(mode="markers+text", text=[*map(escaped, signed)], **shape)
        traces.append(dots.update(customdata=told, meta=texts, hovertemplate=HOVER))
    titles = ["first component", "second component"]
    if shares is not None:
        titles = [f"{name} ({share:.0%})" for name, share in zip(titles, shares, strict=True)]
    across, up = axis(titles[0], zeroline=True), axis(titles[1], zeroline=True)
    alt = f"{title or 'Map of effects'}: {len(labels)} vectors in {len(seen)} behaviours; those "
    alt += "near each other have a similar effect."
    return figure(traces, title, alt, across, up, showlegend=True)
