"""Facts, tables and figures as the page's template wants them; nothing in them runs."""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import itables.options
import pandas as pd
import plotly.graph_objects as go
import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from tl_melbo import story
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import Behaviours, cosine_similarity
from tl_melbo.plots import cosine_heatmap
from tl_melbo.tables import Table
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
        script_hashes=[
            b64encode(hashlib.sha256(script.encode()).digest()).decode()
            for script in (plotly_js, page_js)
        ],
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
        "facts": facts,
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


def settings(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every fact of the metadata as name and text, nested ones flattened."""
    pairs: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            inner = "" if name == "hyperparameters" else f"{name}: "
            pairs += settings(value, prefix + inner)
            continue
        if name == "positions":
            value = story.slice_text(story.slice_from_json(value))
        elif name in ("prompts", "other") and isinstance(value, list):
            value = "\n".join(map(str, value))
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


class Column(NamedTuple):
    """One column; its kind is "number", "word" or "text"."""

    name: str
    label: str
    kind: str
    hint: str


_PROMPT = Column("prompt", "Prompt", "text", "What the model was asked")
_EFFECT = (
    Column("distance", "Distance", "number", "From the mean effect of theta0 to its own"),
    Column("kl_to_reference", "KL to theta0", "number", "Divergence of the next token, in nats"),
    Column("kl_to_unsteered", "KL to unsteered", "number", "Divergence of the next token, in nats"),
)
FAMILY = (
    Column("index", "Vector", "number", "Its number in the family"),
    Column("norm", "Norm", "number", "In units of the residual stream"),
    *_EFFECT,
    Column("completion", "+v", "text", "The completion with the vector added"),
)
COMPOSITION = (
    Column("size", "Vectors", "number", "How many are added up"),
    Column("subset", "Subset", "word", "The first of the family, or a random choice"),
    Column("members", "IDs", "word", "Numbers of the vectors"),
    Column("what", "Combined", "word", "Mean or sum, and at which norm"),
    Column("norm", "Norm", "number", "Of the combination, in units of the residual stream"),
    *_EFFECT,
    Column("completion", "Completion", "text", "With the combination added"),
)
_GROUPS = (
    Column("name", "Behaviour", "text", "What its completions are, and how they begin"),
    Column("n_vectors", "Vectors", "number", "How many bring it out, added or subtracted"),
    Column("which", "IDs", "word", "Numbers of the vectors; − where the negative does"),
    Column("example", "Example", "text", "The most fluent of its completions"),
)
_INDEX = Column("index", "Vector", "number", "found[0], found[1], ...")
_KL = Column("kl", "KL", "number", "Divergence of the next token from unsteered, in nats")
_COSTS = (
    Column("specificity", "Specificity", "number", "1: acts on the prompt alone; 0.5: anywhere"),
    Column("loss_increase", "Loss", "number", "What it costs on prose, in nats a token"),
)
_TEXTS = (
    Column("behaviour", "Behaviour", "text", "The group of its completion"),
    Column("completion", "+v", "text", "The completion with the vector added"),
    Column("negated_completion", "−v", "text", "The completion with the vector subtracted"),
)


def measure_shown(found: SteeringVectors) -> dict[str, Any] | None:
    """What the method measured of each vector, if the library holds it."""
    measure = story.measure_of(found.story) or story.measure("objective", "objective")
    return measure if measure["column"] in found.columns else None


def not_converged(found: SteeringVectors) -> str:
    """How many vectors still gained when their search ended; "" where none did, or none is told."""
    table = found.table()
    known = [*table["converged"].dropna()] if "converged" in table else []
    if not (count := known.count("no")):
        return ""
    told = f"{count} of {len(known)} still gained more than 1% in their last step"
    unknown = len(found) - len(known)
    return f"{told}; of {unknown} more it is not known" if unknown else told


def vectors_table(
    found: SteeringVectors,
    completions: pd.DataFrame,
    divergences: dict[str, list[float]],
    groups: Behaviours | None,
    side_effects: pd.DataFrame | None,
) -> pd.DataFrame:
    """One row a prompt and vector: its numbers, its behaviour, and what the model writes."""
    names = {} if groups is None else _behaviour_names(groups)
    written = completions.set_index(["prompt", "vector", "scale"])["completion"].to_dict()
    measure, costs = measure_shown(found), [column.name for column in _COSTS]
    places = [(prompt, vector) for prompt in divergences for vector in range(len(found))]
    prompts, vectors = map(list, zip(*places, strict=True))
    table = Table({"index": found.columns["index"][vectors].tolist(), "prompt": prompts})
    if measure is not None:
        table[measure["column"]] = found.columns[measure["column"]][vectors].tolist()
    table["kl"] = [divergences[prompt][vector] for prompt, vector in places]
    if side_effects is not None:
        table[costs] = side_effects[costs].astype(float).to_numpy()[vectors]
    table["behaviour"] = [names.get(place) for place in places]
    for name, scale in (("completion", 1.0), ("negated_completion", -1.0)):
        table[name] = [written.get((*place, scale)) for place in places]
    return table


def vectors_columns(table: pd.DataFrame, found: SteeringVectors) -> list[Column]:
    """The columns of `vectors_table` that hold something."""
    measured, measure = [], measure_shown(found)
    if measure is not None:
        label = measure["label"][:1].upper() + measure["label"][1:]
        hint = f"What the search measured of it, in {measure['unit']}"
        measured = [Column(measure["column"], label, "number", hint)]
    prompt = [_PROMPT] if len({*table["prompt"]}) > 1 else []
    return [
        column
        for column in (_INDEX, *prompt, *measured, _KL, *_COSTS, *_TEXTS)
        if column.name in table and (column.kind == "number" or any(table[column.name].notna()))
    ]


def groups_part(
    groups: Behaviours | None, found: SteeringVectors, many_prompts: bool
) -> dict[str, Any]:
    """What the page's template shows of the behaviours."""
    return {
        "groups": groups and _groups_rows(groups, found),
        "n_distinct": groups and groups.n_distinct,
        "n_incoherent": groups and [*groups.texts["coherent"]].count(False),
        "grouped_by_words": groups and groups.embedder == "words",
        "group_columns": [_PROMPT, *_GROUPS] if many_prompts else _GROUPS,
    }


def _groups_rows(groups: Behaviours, found: SteeringVectors) -> list[dict[str, Any]]:
    """The table of behaviours, vectors called by their numbers in the library.

    What was filtered out comes last, for whoever reads what a machine would not.
    """
    rows = groups.groups.to_dict("records")
    aside = groups.texts.query("vector >= 0 and coherent == False")
    for _, some in aside.groupby(["prompt", "filtered_out"], sort=False):
        best = some.sort_values("perplexity").iloc[0]
        row = {
            "name": f"filtered out: {best['filtered_out']}",
            "vectors": sorted({*some["vector"][some["scale"] > 0]}),
            "negatives": sorted({*some["vector"][some["scale"] < 0]}),
        }
        rows.append({**row, "prompt": best["prompt"], "example": best["completion"]})
    indices = found.columns["index"].tolist()
    return [
        {
            **row,
            "n_vectors": len(row["vectors"]) + len(row["negatives"]),
            "which": " ".join(
                f"{sign}{indices[vector]}"
                for sign, side in (("", "vectors"), ("−", "negatives"))
                for vector in row[side]
            ),
        }
        for row in rows
        if row["vectors"] or row["negatives"]
    ]


def _behaviour_names(groups: Behaviours) -> dict[tuple[str, int], str]:
    """What the completion of each prompt and vector was grouped with."""
    names = dict(zip(groups.groups["behaviour"], groups.groups["name"], strict=True))
    return {
        (row["prompt"], row["vector"]): names.get(
            row["behaviour"], f"filtered out: {row['filtered_out']}"
        )
        for row in groups.texts.to_dict("records")
        if row["scale"] > 0
    }
