"""Coloured tokens: along a text, and along a completion. No network, and nothing in them is run."""

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
from circuitsvis.tokens import colored_tokens
from circuitsvis.utils.render import RenderedHTML
from plotly.colors import sample_colorscale

from tl_melbo import checks
from tl_melbo.analysis._presence import token_projections
from tl_melbo.model.bridge import Model
from tl_melbo.plots import _style
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Vectors
from tl_melbo.text import printable

# A token coloured by more than this share of the largest value has white letters.
_DARK = 0.6
# The ends of the heatmaps' colours, a little paler, for circuitsvis.
_AGAINST, _ALONG = "#2166ac", "#b2182b"
_CALL = "CircuitsVis.render("
_TEXT = "font-family:system-ui,sans-serif;font-size:14px;line-height:1.9;margin:4px 0"
_DIVERGENCE = ("position", "token", "kl", "log_prob", "unsteered_log_prob", "top", "unsteered_top")


class _Offline(RenderedHTML):
    """Coloured tokens that do not look for a network each time they are shown."""

    def __init__(self, source: str) -> None:
        super().__init__(source, source)

    def _repr_html_(self) -> str:
        return self.local_src


@shape_checked
def token_presence(
    model: Model, vector: Vectors, text: str, layer: int | None = None
) -> RenderedHTML:
    """Show a text's tokens coloured by their projection on a vector, in the unsteered model.

    In standard deviations from the mean over ordinary prose (`evaluation.PASSAGES`). Red tokens
    point along the vector, blue ones against it; the first, an attention sink in most models, is
    left white. Most texts have some of both: only `analysis.presence` tells whether that means
    anything.

    Args:
        vector: exactly one; its norm does not matter.
        text: raw, of more than one token.
        layer: after which block to look; None takes the layer that the vector was found at.
    """
    tokens, values = token_projections(model, vector, text, layer)
    hover = [f"{value:+.2f} sd" for value in values]
    largest = max(map(abs, values)) or 1.0
    limits = -largest, largest
    source = colored_tokens(tokens, values, *limits, _AGAINST, _ALONG).local_src
    name = "static-" + source.partition('id="')[2].partition('"')[0]
    before, _, after = source.rpartition(_CALL)
    data, end, rest = after.rpartition("</script>")
    # No "<" in its data: a token "</script>" would end the script.
    data = data.replace("<", "\\u003c")
    # Plain coloured text stands above; the script, where it runs, takes it away.
    remove = f'document.getElementById("{name}")?.remove();\n    '
    shown = _coloured([printable(token) for token in tokens], values, hover, largest)
    bar = _bar(-1.0, f"{-largest:.1f} sd: against the vector", f"{largest:+.1f} sd: along")
    script = f"{before}{remove}{_CALL}{data}{end}{rest}"
    return _Offline(f'<div id="{name}">{shown}</div>\n{script}{bar}')


@shape_checked
def token_divergence(divergence: pd.DataFrame, vector: int = 0) -> RenderedHTML:
    """Show a completion's tokens coloured by KL(steered || unsteered): where the two part.

    Hovering over a token shows its log-probability under both, and the likeliest tokens of both.

    Args:
        divergence: as `analysis.token_divergence` gives it.
        vector: whose completion; of several, the first. Filter the frame for others.
    """
    checks.columns(
        divergence, ("vector", *_DIVERGENCE), "divergence", "pass analysis.token_divergence"
    )
    own = _style.of_vector(divergence, vector)
    # The first completion ends where a position comes again.
    again = np.diff(own["position"].to_numpy(), prepend=-1) <= 0
    own = pd.DataFrame(own[np.cumsum(again) == 0])
    hover = [
        f"KL {row['kl']:.3g} nats\n"
        f"log-prob {row['log_prob']:.2f}, unsteered {row['unsteered_log_prob']:.2f}\n"
        f"steered: {likeliest(row['top'])}\nunsteered: {likeliest(row['unsteered_top'])}"
        for row in own.to_dict("records")
    ]
    largest = max(own["kl"]) or 1.0
    tokens = [str(token).replace("⏎", "⏎\n") for token in own["token"]]
    # Without circuitsvis, whose tokens can show no more than their number.
    shown = _coloured(tokens, own["kl"].tolist(), hover, largest)
    return _Offline(shown + _bar(0.0, "KL 0: as unsteered", f"{largest:.2g} nats"))


def likeliest(told: object) -> str:
    """The likeliest tokens; from a file they come as a text."""
    if isinstance(told, Sequence) and not isinstance(told, str):
        return ", ".join(f"{token!r} {probability:.0%}" for token, probability in told)
    return str(told)


def _coloured(
    tokens: Sequence[str], values: Sequence[float], hover: Sequence[str], largest: float
) -> str:
    """Tokens in the heatmaps' colours, as shares of the largest value."""
    spans = []
    for token, value, words in zip(tokens, values, hover, strict=True):
        share = value / largest
        ink = "white" if abs(share) > _DARK else "black"
        style = f"background:{_colour(share)};color:{ink};padding:1px;white-space:pre-wrap"
        told, shown = html.escape(words), html.escape(token)
        spans.append(f'<span style="{style}" title="{told}">{shown}</span>')
    return f'<div style="{_TEXT}">{"".join(spans)}</div>'


def _bar(least: float, low: str, high: str) -> str:
    """What the colours mean, from `least` (-1 or 0) to 1."""
    colours = ",".join(_colour(least + (1 - least) * i / 8) for i in range(9))
    look = "display:inline-block;width:120px;height:10px;border:1px solid #8c959f"
    gradient = f"background:linear-gradient(to right,{colours})"
    bar = f'<span style="{look};{gradient}"></span>'
    ends = html.escape(low), html.escape(high)
    return f'<div style="{_TEXT};font-size:12px">{ends[0]} {bar} {ends[1]}</div>'


def _colour(share: float) -> str:
    """From -1 to 1, white at 0."""
    if abs(share) < 1e-9:
        return "rgb(255,255,255)"
    return str(sample_colorscale(_style.DIVERGING, [min(1.0, (1 + share) / 2)])[0]).replace(" ", "")
