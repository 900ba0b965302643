"""The page of a sweep, or of an atlas: one file that loads nothing from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from tl_melbo import analysis, plots
from tl_melbo.report._render import SWEEP_SCRIPTS, figures_json, filled
from tl_melbo.tables import groups

_TEMPLATE = Path(__file__).with_name("sweep.html.jinja")
_TAGS = ("stance", "form", "speaker")
_HINT = Markup(
    "Each search has a folder beside this page with its vectors; <code>tl-melbo page FOLDER</code> "
    "makes a page of it. The table below is in <code>sweep.parquet</code>. A high number alone "
    "proves nothing: gibberish diverges, too. Read the completions. Where several searches share a "
    "cell of a heatmap, or a point of a curve, it is their median."
)
_COLUMNS = (
    "source_layer", "target_layer", "radius", "kl_median", "kl_max", "status", "model", "method",
    "seed", "found", "measure_median", "seconds",
)  # fmt: skip


def render(table: pd.DataFrame, records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of a sweep's table, and of the tags that its records hold."""
    figures: dict[str, Any] = {**_figures(table), **_behaviours(table, records)}
    columns = [name for name in _COLUMNS if name in table and {*table[name].dropna()}]
    counts = table["status"].str.capitalize().value_counts().to_dict()
    return page_of(
        figures,
        kind="Sweep",
        heading=f"{len(table)} searches",
        hint=_HINT,
        prompts=list(dict.fromkeys(table["prompt"])),
        baseline=(),
        facts={**counts, "Models": ", ".join(dict.fromkeys(table["model"]))},
        columns=columns,
        # pyrefly: ignore[bad-argument-type]  # None is no value to its stubs of pandas
        rows=table.astype(object).where(table.notna(), None).to_dict("records"),
    )


def page_of(figures: Mapping[str, Any], **contents: Any) -> str:
    """The template's page with these figures, each under its name."""
    drawn, template = figures_json(figures), _TEMPLATE.read_text(encoding="utf-8")
    told = [(name, figure.layout.meta["alt"], drawn[name]) for name, figure in figures.items()]
    return filled(template, SWEEP_SCRIPTS, figures=told, **contents)


def _figures(table: pd.DataFrame) -> dict[str, go.Figure]:
    """Heatmaps and curves of each model, where layers or radii vary; what was measured by method.

    A radius means something else in each model.
    """
    found: dict[str, go.Figure] = {}
    drawn: Any = (("kl_median", ["model"]), ("measure_median", ["model", "method"]))
    for value, by in drawn:
        done = pd.DataFrame(table[(table["status"] == "done") & table[value].notna()])
        for key, rows in groups(done, by).items():
            label = "KL" if value == "kl_median" else str(rows["measure"].iloc[0]).capitalize()
            name = ", ".join(key)
            if len(groups(rows, ["source_layer", "target_layer"])) > 1:
                found[f"{label} over layers, {name}"] = plots.sweep_layers(rows, value, title="")
            if len({*rows["radius"]}) > 1:
                found[f"{label} over radius, {name}"] = plots.sweep_radius(rows, value, title="")
    return found


def _behaviours(
    table: pd.DataFrame, records: Mapping[str, Mapping[str, Any]]
) -> dict[str, go.Figure]:
    """How often completions are of each kind, by model; nothing where there are none."""
    models = dict(zip(table["folder"], table["model"], strict=True))
    rows = [
        (models[folder], *tagged)
        for folder, record in records.items()
        if record["status"] == "done"
        for tagged in record.get("tags", [])
    ]
    if not rows:
        return {}
    frame = pd.DataFrame(rows, columns=["model", "vector", *_TAGS]).assign(scale=1.0)
    return {
        f"{tag.capitalize()} of completions, by model": plots.behaviour_rates(
            analysis.rates(frame, tag, by=("model",)), title=""
        )
        for tag in _TAGS
    }
