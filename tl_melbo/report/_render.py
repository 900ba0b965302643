"""Facts, figures and files as the page's template wants them; nothing in them runs."""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import itables.options
import plotly.graph_objects as go
import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from tl_melbo import story
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import cosine_similarity
from tl_melbo.plots import cosine_heatmap
from tl_melbo.report._tables import measure_shown, not_converged
from tl_melbo.text import printable
from tl_melbo.vectors import SteeringVectors

# More of one text makes browsers slow, and nobody reads on.
_LONGEST_SHOWN = 20_000


def render(**contents: Any) -> str:
    """The page: the template with these contents, the scripts and the styles in it."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = _shown
    bundle = Path(itables.options.dt_bundle)
    # Newlines as the browser will see them: the scripts' hashes depend on it.
    plotly_js, page_js = re.sub("\r\n?", "\n", get_plotlyjs()), _beside("page.js")
    # Kept as text: nothing in it may end the element that holds it.
    tables_js = bundle.read_text(encoding="utf-8").replace("</script", "<\\/script")
    return environment.from_string(_beside("page.html.jinja")).render(
        **contents,
        css=Markup(_beside("page.css")),
        datatables_css=Markup(bundle.with_suffix(".css").read_text(encoding="utf-8")),
        datatables_js=Markup(tables_js.replace("<!--", "<\\!--")),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
        script_hashes=[_sha256(plotly_js), _sha256(page_js)],
    )


def effects_heatmap(
    found: SteeringVectors,
    activation_map: ActivationMap | None,
    positions: slice,
    labels: Sequence[int | str] | None,
) -> go.Figure | None:
    """The vectors' effects against each other; None without a map, or where one has no effect."""
    if activation_map is None:
        return None
    with torch.no_grad():
        delta = activation_map.delta(found.vectors.to(activation_map.x.device), positions)
    if not (delta.flatten(1).norm(dim=-1) > 0).all():
        return None
    return cosine_heatmap(cosine_similarity(delta), "", labels=labels)


def library_facts(found: SteeringVectors) -> dict[str, Any]:
    """What the page's template tells of a library."""
    about, chosen = found.story, found.story.get("hyperparameters", {})
    source, target = about.get("source_layer"), about.get("target_layer")
    low, high = float(found.norms.min()), float(found.norms.max())
    radius = f"{high:.4g}" if high - low <= 1e-3 * high else f"{low:.4g} to {high:.4g}"
    facts = {
        "Model": about.get("model"),
        "Method": about.get("method"),
        "Layers": source if target is None else f"{source} → {target}",
        "Vectors": len(found),
        "Norm": f"{radius} (calibrated)" if "calibration" in about else radius,
        "Optimiser": chosen.get("optimiser"),
        "Seed": about.get("seed"),
        "Date": str(about.get("date", ""))[:10] or None,
    }
    return {
        "facts": known(facts),
        "settings": settings(about),
        "about": story.about_of(about),
        "layer": source,
        "positions": story.slice_text(positions_of(found)),
        "orthogonal": bool(chosen.get("orthogonal")),
        "n_vectors": len(found),
        "measure": measure_shown(found),
        "not_converged": not_converged(found),
    }


def positions_of(found: SteeringVectors) -> slice:
    """Where the effects of a library's vectors were measured."""
    return story.slice_from_json(found.story.get("hyperparameters", {}).get("positions"))


def known(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    """The facts that are not None, as texts."""
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def settings(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every fact of the metadata as name and text, nested ones flattened."""
    pairs: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            inner = "" if name == "hyperparameters" else f"{name}: "
            pairs += settings(value, prefix + inner)
        elif name == "positions" and isinstance(value, list) and len(value) == 3:
            pairs.append((prefix + name, story.slice_text(story.slice_from_json(value))))
        elif name == "prompts" and isinstance(value, list):
            pairs.append((prefix + name, "\n".join(map(str, value))))
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pairs.append((prefix + name, text))
    return pairs


def figures_json(figures: Mapping[str, go.Figure | None]) -> dict[str, Markup | None]:
    """Figures as JSON that fill the width they get and cannot end the script that holds them."""
    drawn: dict[str, Markup | None] = dict.fromkeys(figures)
    for name, figure in figures.items():
        if figure is not None:
            # Not by a copy of the figure: plotly would validate all of it again.
            parts = figure.to_plotly_json()
            parts["layout"] |= {"width": None, "height": None, "autosize": True}
            drawn[name] = Markup(str(to_json_plotly(parts)).replace("<", "\\u003c"))
    return drawn


def _shown(value: Any) -> str:
    """Text for the page: printable, and cut where a browser would choke on it."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:#.4g}"
    text = str(value)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}… [cut: {len(text):,} characters in all]"
    return printable(text)


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return b64encode(hashlib.sha256(script.encode()).digest()).decode()
