"""A text's tokens, coloured by where they lie along a vector."""

import html

from circuitsvis.tokens import colored_tokens
from circuitsvis.utils.render import RenderedHTML

from tl_melbo.analysis._presence import token_projections
from tl_melbo.model.bridge import Model
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Vectors
from tl_melbo.text import printable

# A token coloured by more than this share of the largest value has white letters.
_DARK = 0.6
_CALL = "CircuitsVis.render("


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
    shares = [value / largest if largest else 0.0 for value in values]
    spans = "".join(map(_span, tokens, values, shares))
    source = f'<div id="{name}">{spans}</div>\n{before}{remove}{_CALL}{data}{end}{rest}'
    return _Offline(source, source)


class _Offline(RenderedHTML):
    """Coloured tokens that do not look for a network each time they are shown."""

    def _repr_html_(self) -> str:
        return self.local_src


def _span(token: str, value: float, share: float) -> str:
    """A token in circuitsvis's colours: blue along the vector, red against it."""
    pale = f"{255 * (1 - abs(share)):.0f}"
    colour = f"rgb({pale},{pale},255)" if share > 0 else f"rgb(255,{pale},{pale})"
    ink = "white" if abs(share) > _DARK else "black"
    style = f"background:{colour};color:{ink};padding:1px;white-space:pre-wrap"
    return f'<span style="{style}" title="{value:.4g}">{html.escape(printable(token))}</span>'
