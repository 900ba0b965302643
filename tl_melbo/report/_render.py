"""The page as text: the template with styles, scripts, figures and data in it."""

import hashlib
import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly

from tl_melbo.text import printable

_HERE = Path(__file__).parent
PLOTLY = _HERE / "vendor" / "plotly-cartesian.min.js"
# In the order in which they are put together: each imports only from those before it.
SCRIPTS = (
    "dom", "data", "notes", "state", "diff", "tables", "marks", "details", "vectors", "cards",
    "filters", "compare", "paint", "figures", "main",
)  # fmt: skip
SWEEP_SCRIPTS = ("dom", "paint", "sweep")
# More of one text makes browsers slow, and nobody reads on.
_LONGEST_SHOWN = 20_000
# The number of each text: many vectors, negated, write what the unsteered model writes.
TextPool = dict[str, int]


def render(data: Mapping[str, Any], **contents: Any) -> str:
    """The page: the template with these contents, and the data for its script."""
    told = {"data": as_json(data), "unsteered": data["unsteered"], "tables": data["tables"]}
    return filled(_beside("page.html.jinja"), SCRIPTS, **contents, **told)


def filled(template: str, scripts: Sequence[str], **contents: Any) -> str:
    """A template with these contents, the style, and these scripts, with hashes to allow them."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    # Newlines as the browser will see them: the scripts' hashes depend on it.
    plotly_js = re.sub("\r\n?", "\n", PLOTLY.read_text(encoding="utf-8"))
    page_js = page_script(scripts)
    return environment.from_string(template).render(
        **contents,
        css=Markup(_beside("page.css")),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
        script_hashes=[
            b64encode(hashlib.sha256(script.encode()).digest()).decode()
            for script in (plotly_js, page_js)
        ],
    )


def page_script(names: Sequence[str] = SCRIPTS) -> str:
    """The modules of a page as one script: each a function that gives what the module exports."""
    parts = []
    for name in names:
        source = _beside(f"js/{name}.js")
        exported = re.findall(r"(?m)^export (?:async )?(?:function|const) ([$\w]+)", source)
        body = re.sub(r"(?m)^import [^;]*;\n|^export ", "", source)
        given = ", ".join(exported)
        parts.append(f"const {{ {given} }} = (() => {{\n{body}\nreturn {{ {given} }};\n}})();\n")
    return "".join(parts)


def figures_json(figures: Mapping[str, go.Figure | None]) -> dict[str, Markup | None]:
    """Figures as JSON that fill the width they get and cannot end the script that holds them."""
    drawn: dict[str, Markup | None] = dict.fromkeys(figures)
    for name, figure in figures.items():
        if figure is not None:
            # Not by a copy of the figure: plotly would validate all of it again.
            parts = figure.to_plotly_json()
            parts["layout"] |= {"width": None, "height": None, "autosize": True}
            # The page's script colours them, for day and night.
            parts["layout"].pop("template", None)
            drawn[name] = Markup(str(to_json_plotly(parts)).replace("<", "\\u003c"))
    return drawn


def pooled(text: Any, pool: TextPool) -> int | None:
    """The number of a text, which may be new; None where there is none."""
    return pool.setdefault(shown(text), len(pool)) if isinstance(text, str) else None


def shown(value: Any) -> str:
    """Text for the page: printable, and cut where a browser would choke on it."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:#.4g}"
    text = str(value)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}… [cut: {len(text):,} characters in all]"
    return printable(text)


def number(value: Any) -> float | int | str | None:
    """A number as JSON has it: five digits, None for NaN, a sign for infinity."""
    if not isinstance(value, Real) or math.isnan(real := float(value)):
        return None
    if isinstance(value, Integral):
        return int(value)
    if math.isinf(real):
        return "∞" if real > 0 else "-∞"
    return float(f"{real:.5g}")


def as_json(value: Any) -> Markup:
    """JSON that cannot end the script element which holds it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _beside(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
