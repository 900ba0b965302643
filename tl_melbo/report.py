"""A library as one self-contained HTML page, to look at the outputs hard. It works offline."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import itables.options
import pandas as pd
import plotly.graph_objects as go
import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import (
    Behaviours,
    behaviours,
    cosine_similarity,
    kl_divergence,
)
from tl_melbo.analysis._completions import COMPLETION_COLUMNS, collect_completions
from tl_melbo.analysis._family import Family, collect_family
from tl_melbo.analysis._side_effects import COLUMNS
from tl_melbo.files import replacing
from tl_melbo.model.bridge import Model
from tl_melbo.plots import (
    composition_curves,
    cosine_heatmap,
    distance_curve,
    kl_curve,
    norm_curve,
    objective_history,
    specificity_points,
)
from tl_melbo.shapes import Delta, shape_checked
from tl_melbo.steering import as_chat
from tl_melbo.tables import Table
from tl_melbo.text import printable
from tl_melbo.vectors import SteeringVectors

__all__ = ["Family", "collect_completions", "collect_family", "write"]

# The tables about a family: name, label, kind and hint of each column.
_FAMILY_COLUMNS = (
    ("index", "Vector", "number", "Its place in the family"),
    ("norm", "Norm", "number", "Its length, in units of the residual stream"),
    ("distance", "Distance", "number", "How far its mean effect is from that of theta0"),
    ("kl_to_reference", "KL to theta0", "number", "Divergence of the next token, in nats"),
    ("kl_to_unsteered", "KL to unsteered", "number", "Divergence of the next token, in nats"),
    ("completion", "With the vector", "text", "What the model writes"),
)
_COMPOSITION_COLUMNS = (
    ("size", "Vectors", "number", "How many are added up"),
    ("subset", "Which", "word", "The first of the family, or a random choice"),
    ("members", "Members", "word", "Their numbers"),
    ("what", "Combined", "word", "Mean or sum, and at which norm"),
    ("norm", "Norm", "number", "Of the combination, in units of the residual stream"),
    ("distance", "Distance", "number", "How far its mean effect is from that of theta0"),
    ("kl_to_reference", "KL to theta0", "number", "Divergence of the next token, in nats"),
    ("kl_to_unsteered", "KL to unsteered", "number", "Divergence of the next token, in nats"),
    ("completion", "With the combination", "text", "What the model writes"),
)
_GROUP_COLUMNS = (
    ("name", "Behaviour", "text", "Words that set its texts apart from the others"),
    ("n_vectors", "Vectors", "number", "How many bring it out"),
    ("which", "Which", "word", "Their numbers"),
    ("example", "For example", "text", "The most fluent of its texts"),
)
_KINDS = ("unsteered", "reference", "family", "rescaled", "random")
_SCALINGS = {"raw": "", "reference norm": " at theta0’s norm", "mean norm": " at members’ norm"}
# The first token's residual is far longer than the others' and would decide every cosine.
_AFTER_THE_FIRST = slice(1, None)
# More of one text makes browsers slow, and nobody reads on.
_LONGEST_SHOWN = 20_000


@shape_checked
def write(
    path: str | Path,
    model: Model,
    found: SteeringVectors,
    *,
    completions: pd.DataFrame | None = None,
    activation_map: ActivationMap | None = None,
    families: Sequence[Family] = (),
    side_effects: pd.DataFrame | None = None,
    prompts: str | Sequence[str] | None = None,
    max_new_tokens: int = 50,
    title: str | None = None,
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Write one HTML file about a library: its settings, texts, numbers and figures.

    Whatever is not given is computed. The file needs nothing else and asks no network.

    Args:
        path: the file to write; replaced whole or not at all.
        model: a TransformerLens model.
        found: the vectors.
        completions: what `collect_completions` gives.
        activation_map: the map that the vectors were found with; None leaves out the comparison
            of effects.
        families: MELBO-ortho families of some of the vectors, from `collect_family`; each gets
            a part of the page.
        side_effects: what `evaluation.side_effects` gives for these vectors; None leaves them out.
        prompts: what to complete; None takes those of `completions`, or those of the story.
        max_new_tokens: the most tokens of each completion.
        title: the page's heading; None takes the prompt.
        layer: after which block to add the vectors; None takes the layer they were found at.
        chat: format the prompts as chat; None does as was done when the vectors were found.
        batch_size: rows of a batch.

    Returns:
        The page's table, one row a vector and prompt: index, prompt, objective (where known), kl
        (of the next token's distribution to the unsteered model's, KL(P_vector || P_unsteered), in
        nats), specificity and loss_increase (where side effects are given), behaviour (what
        `analysis.behaviours` grouped its text with), completion, negated_completion.

    Raises:
        ValueError: no vectors, no prompt given or known, completions or side effects of another
            shape; a zero vector; also as `generate` and `kl_divergence` do.
        FileNotFoundError: the folder does not exist.
        PermissionError: the folder cannot be written to.
    """
    if not len(found):
        raise ValueError("found: holds no vectors; there is nothing to show")
    if completions is not None:
        _check_completions(completions, found)
        texts = list(dict.fromkeys(completions["prompt"]))
    else:
        texts = _prompts(found, prompts)
    if side_effects is not None:
        _check_side_effects(side_effects, found)
    cosine_similarity(found)  # refuses vectors of no length now, not after the texts are written
    # Opened before the work: a folder that cannot be written to shows at once.
    with replacing(path) as temporary:
        if completions is None:
            completions = collect_completions(
                model,
                texts,
                found,
                max_new_tokens=max_new_tokens,
                layer=layer,
                chat=chat,
                batch_size=batch_size,
            )
        divergences = [
            kl_divergence(model, text, found, layer=layer, chat=chat, batch_size=batch_size)
            for text in texts
        ]
        # Negatives have texts of their own, but are the same vectors.
        forward = pd.DataFrame(completions[completions["scale"] >= 0])
        # Its logits are of whole texts: 8 at once take as much memory as many rows of the others.
        options = {"chat": as_chat(found, chat), "batch_size": min(batch_size, 8)}
        groups = None if forward.empty else behaviours(model, forward, **options)
        kls = [kl.tolist() for kl in divergences]
        table = _table(found, completions, texts, kls, groups, side_effects)
        unsteered = completions[completions["vector"] == -1]
        texts_without = dict(zip(unsteered["prompt"], unsteered["completion"], strict=True))
        page = _page(
            found,
            table,
            texts_without,
            groups,
            _figures(found, activation_map, side_effects),
            [_family_part(part, activation_map) for part in families],
            title,
        )
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return table


def _prompts(found: SteeringVectors, prompts: str | Sequence[str] | None) -> list[str]:
    chosen = found.story.get("prompts") if prompts is None else prompts
    texts = [chosen] if isinstance(chosen, str) else list(dict.fromkeys(chosen or []))
    if not texts:
        raise ValueError(
            "prompts: none given, and the vectors' story names none; pass prompts='...'"
        )
    return texts


def _check_completions(completions: pd.DataFrame, found: SteeringVectors) -> None:
    missing = [name for name in COMPLETION_COLUMNS if name not in completions.columns]
    if missing or completions.empty:
        what = f"lacks the columns {missing}" if missing else "is empty"
        raise ValueError(f"completions: {what}; pass what report.collect_completions returns")
    unknown = sorted(set(completions["vector"]) - set(range(-1, len(found))))
    if unknown:
        raise ValueError(
            f"completions: has texts of vectors {unknown[:10]}, but found holds 0 to "
            f"{len(found) - 1}; pass the completions of these vectors"
        )


def _check_side_effects(side_effects: pd.DataFrame, found: SteeringVectors) -> None:
    is_number = pd.api.types.is_numeric_dtype
    columns = side_effects.columns
    missing = [name for name in COLUMNS if name not in columns or not is_number(side_effects[name])]
    if missing:
        raise ValueError(
            f"side_effects: lacks the columns {missing}, or holds no numbers there; pass what "
            "evaluation.side_effects returns"
        )
    if [*side_effects["vector"]] != [*range(len(found))]:
        raise ValueError(
            f"side_effects: {len(side_effects)} rows that are not those of vectors 0 to "
            f"{len(found) - 1}, in order; measure the vectors of found"
        )


def _table(
    found: SteeringVectors,
    completions: pd.DataFrame,
    texts: list[str],
    divergences: list[list[float]],
    groups: Behaviours | None,
    side_effects: pd.DataFrame | None,
) -> pd.DataFrame:
    names = {} if groups is None else _behaviour_names(groups)
    written = {
        (row["prompt"], row["vector"], row["scale"]): row["completion"]
        for row in completions.to_dict("records")
    }
    indices = found.columns["index"].tolist()
    objectives = None if found.objective is None else found.objective.tolist()
    rows = []
    for text, kl in zip(texts, divergences, strict=True):
        for vector, index in enumerate(indices):
            row = {"index": index, "prompt": text}
            if objectives is not None:
                row["objective"] = objectives[vector]
            row["kl"] = kl[vector]
            if side_effects is not None:
                for name in ("specificity", "loss_increase"):
                    row[name] = float(side_effects[name].iloc[vector])
            row |= {
                "behaviour": names.get((text, vector)),
                "completion": written.get((text, vector, 1.0)),
                "negated_completion": written.get((text, vector, -1.0)),
            }
            rows.append(row)
    return Table(rows)


def _behaviour_names(groups: Behaviours) -> dict[tuple[str, int], str]:
    """What each prompt and vector's text was grouped with."""
    names = dict(zip(groups.groups["behaviour"], groups.groups["name"], strict=True))
    texts = groups.texts
    return {
        (prompt, vector): names.get(behaviour) or _put_aside(reason)
        for prompt, vector, behaviour, reason in zip(
            texts["prompt"], texts["vector"], texts["behaviour"], texts["put_aside"], strict=True
        )
    }


def _put_aside(reason: str) -> str:
    return f"put aside: {reason}"


def _group_rows(groups: Behaviours, found: SteeringVectors) -> list[dict[str, Any]]:
    """The table of behaviours, vectors called by their numbers in the library.

    What was put aside comes last, for whoever reads what a machine would not.
    """
    rows = groups.groups.to_dict("records")
    aside: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in groups.texts.to_dict("records"):
        if row["vector"] >= 0 and not row["coherent"]:
            aside.setdefault((row["prompt"], row["put_aside"]), []).append(row)
    for (prompt, reason), some in aside.items():
        best = min(some, key=lambda row: row["perplexity"])
        vectors = sorted({row["vector"] for row in some})
        about = {"name": _put_aside(reason), "prompt": prompt, "example": best["completion"]}
        rows.append({**about, "vectors": vectors})
    indices = found.columns["index"].tolist()
    return [
        {
            **row,
            "n_vectors": len(row["vectors"]),
            "which": " ".join(str(indices[vector]) for vector in row["vectors"]),
        }
        for row in rows
        if row["vectors"]
    ]


def _figures(
    found: SteeringVectors,
    activation_map: ActivationMap | None,
    side_effects: pd.DataFrame | None,
) -> dict[str, go.Figure | None]:
    labels = found.columns["index"].tolist()
    labels = None if labels == list(range(len(found))) else labels
    effects = None
    if activation_map is not None:
        delta = _effects(found, activation_map, _positions(found))
        # A vector without any effect points nowhere: then there is nothing to compare.
        if (delta.flatten(1).norm(dim=-1) > 0).all():
            effects = cosine_heatmap(cosine_similarity(delta), "", labels=labels)
    # Of rows without a finite number nothing can be drawn.
    specificity = None
    if side_effects is not None and any(side_effects["specificity"].notna()):
        numbers = found.columns["index"].tolist()
        specificity = specificity_points(side_effects.assign(vector=numbers), "")
    has_history = found.history is not None and found.history.numel() > 0
    return {
        "vectors": cosine_heatmap(cosine_similarity(found), "", labels=labels),
        "effects": effects,
        "specificity": specificity,
        "history": objective_history(found, "") if has_history else None,
    }


def _effects(found: SteeringVectors, activation_map: ActivationMap, positions: slice) -> Delta:
    """What each vector does at some positions.

    Over all of them the first token, whose residual is far longer than the others', would decide
    every cosine.
    """
    counted = activation_map.position_mask(positions)
    with torch.no_grad():
        delta = activation_map.delta(found.vectors.to(activation_map.x.device))
    return delta * counted[:, :, None]


def _positions(found: SteeringVectors) -> slice:
    parts = found.story.get("hyperparameters", {}).get("positions")
    return slice(*parts) if isinstance(parts, list) and len(parts) == 3 else slice(None)


def _page(
    found: SteeringVectors,
    table: pd.DataFrame,
    unsteered: Mapping[str, str],
    groups: Behaviours | None,
    figures: Mapping[str, go.Figure | None],
    families: Sequence[Mapping[str, Any]],
    title: str | None,
) -> str:
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = _shown
    plotly_js, page_js = _normal(get_plotlyjs()), _normal(_beside("report.js"))
    bundle = Path(itables.options.dt_bundle)
    prompts = list(dict.fromkeys(table["prompt"]))
    return environment.from_string(template).render(
        title=title,
        prompts=prompts,
        facts=_facts(found),
        settings=_settings(found.story),
        positions=_slice_text(_positions(found)),
        orthogonal=bool(found.story.get("hyperparameters", {}).get("orthogonal")),
        n_vectors=len(found),
        unsteered=unsteered,
        groups=None if groups is None else _group_rows(groups, found),
        n_distinct=0 if groups is None else groups.n_distinct,
        n_incoherent=0
        if groups is None
        else sum(not coherent for coherent in groups.texts["coherent"]),
        grouped_by_words=groups is not None and groups.embedder == "words",
        group_columns=_described(
            [("prompt", "Prompt", "text", "What the model was asked")] * (len(prompts) > 1)
            + [*_GROUP_COLUMNS]
        ),
        columns=_columns(table, many_prompts=len(prompts) > 1),
        rows=table.to_dict("records"),
        figures=_figures_json(figures),
        families=families,
        css=Markup(_beside("report.css")),
        datatables_css=Markup(bundle.with_suffix(".css").read_text(encoding="utf-8")),
        datatables_js=_inert(bundle.read_text(encoding="utf-8")),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
        script_hashes=[_sha256(plotly_js), _sha256(page_js)],
    )


def _family_part(part: Family, activation_map: ActivationMap | None) -> dict[str, Any]:
    """What the page's template shows of a family."""
    rows = {kind: part.table.loc[part.table["kind"] == kind] for kind in _KINDS}
    own, unsteered, reference = rows["family"], rows["unsteered"].iloc[0], rows["reference"].iloc[0]
    measured = {kind: torch.tensor(rows[kind]["kl_to_reference"].to_numpy()) for kind in rows}
    n_vectors, norms = len(part.vectors), part.vectors.norms
    window = min(50, max(1, n_vectors // 4))
    curve = kl_curve(
        measured["family"],
        part.vectors,
        completions=[str(text) for text in own["completion"]],
        window=window,
        baselines={
            "no vector": measured["unsteered"],
            "random vectors of the same norms": measured["random"],
            f"the family at norm {part.reference.norms[0]:.4g}": measured["rescaled"],
        },
        title="",
    )
    labels = ["θ₀", *part.vectors.columns["index"].tolist()]
    both = SteeringVectors(torch.cat([part.reference.vectors, part.vectors.vectors]))
    effects = None
    if activation_map is not None:
        delta = _effects(both, activation_map, _AFTER_THE_FIRST)
        if (delta.flatten(1).norm(dim=-1) > 0).all():
            effects = cosine_heatmap(cosine_similarity(delta), "", labels=labels)
    figures = {
        "kl": curve,
        "norm": norm_curve(part.vectors, window, ""),
        "distance": distance_curve(part.vectors, float(unsteered["distance"]), window, ""),
        "vectors": cosine_heatmap(cosine_similarity(both), "", labels=labels),
        "effects": effects,
        "composition": composition_curves(part.composition, title=""),
    }
    # Rescaled, the sum is the mean: one row is enough.
    composed = part.composition
    composed = composed[(composed["combination"] == "mean") | (composed["scaling"] == "raw")]
    composed = composed.assign(
        members=[" ".join(map(str, members)) for members in composed["members"]],
        what=[
            combination + _SCALINGS[scaling]
            for combination, scaling in zip(
                composed["combination"], composed["scaling"], strict=True
            )
        ],
    )
    chosen = part.vectors.story.get("hyperparameters", {})
    facts = {
        "Vectors": n_vectors,
        "Norms": f"{norms.min():.4g} to {norms.max():.4g}",
        "Norm of theta0": f"{reference['norm']:.4g}",
        "Optimiser": chosen.get("optimiser"),
        "Norm penalty": chosen.get("norm_penalty") or None,
        "Largest |cosine|": f"{_largest_cosine(both):.1e}",
    }
    return {
        "number": part.number,
        "n_vectors": n_vectors,
        "window": window,
        "facts": [(name, str(value)) for name, value in facts.items() if value is not None],
        "settings": _settings(part.vectors.story),
        "reference": reference["completion"],
        "unsteered_kl": float(unsteered["kl_to_reference"]),
        "figures": _figures_json(figures),
        "columns": _described(_FAMILY_COLUMNS),
        "rows": own.to_dict("records"),
        "composition_columns": _described(_COMPOSITION_COLUMNS),
        "composition_rows": composed.to_dict("records"),
    }


def _largest_cosine(vectors: SteeringVectors) -> float:
    similarity = cosine_similarity(vectors)
    return float(similarity.fill_diagonal_(0.0).abs().max())


def _columns(table: pd.DataFrame, many_prompts: bool) -> list[dict[str, str]]:
    """The table's columns: what each is called, and what a student should know about it."""
    columns = [("index", "Vector", "number", "Its place in the library: found[0], found[1], ...")]
    if many_prompts:
        columns.append(("prompt", "Prompt", "text", "What the model was asked"))
    if "objective" in table.columns:
        columns.append(
            ("objective", "Objective", "number", "Size of its effect on the target layer")
        )
    columns.append(("kl", "KL", "number", "Divergence of the next token from unsteered, in nats"))
    if "specificity" in table.columns:
        columns += [
            ("specificity", "Specificity", "number", "1: acts on the prompt alone; 0.5: anywhere"),
            ("loss_increase", "Loss", "number", "What it costs on prose, in nats a token"),
        ]
    if any(isinstance(name, str) for name in table["behaviour"]):
        columns.append(("behaviour", "Behaviour", "text", "What its text was grouped with"))
    if any(isinstance(text, str) for text in table["completion"]):
        columns.append(("completion", "With the vector", "text", "What the model writes"))
    if any(isinstance(text, str) for text in table["negated_completion"]):
        columns.append(("negated_completion", "With its negative", "text", "The vector subtracted"))
    return _described(columns)


def _described(columns: Sequence[tuple[str, str, str, str]]) -> list[dict[str, str]]:
    names = ("name", "label", "kind", "hint")
    return [dict(zip(names, column, strict=True)) for column in columns]


def _facts(found: SteeringVectors) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    story, chosen = found.story, found.story.get("hyperparameters", {})
    source, target = story.get("source_layer"), story.get("target_layer")
    layers = f"{source} → {target}" if target is not None else source
    norms = found.norms
    same = float(norms.max() - norms.min()) <= 1e-3 * float(norms.max())
    radius = f"{norms.max():.4g}" if same else f"{norms.min():.4g} to {norms.max():.4g}"
    if "calibration" in story:
        radius += " (calibrated)"
    facts = {
        "Model": story.get("model"),
        "Method": story.get("method"),
        "Layers": layers,
        "Vectors": len(found),
        "Norm": radius,
        "Optimiser": chosen.get("optimiser"),
        "Seed": story.get("seed"),
        "Date": str(story.get("date", ""))[:10] or None,
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _settings(story: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every fact of the story as name and text, nested ones flattened."""
    settings: list[tuple[str, str]] = []
    for name, value in story.items():
        if isinstance(value, Mapping):
            inner = "" if name == "hyperparameters" else f"{name}: "
            settings += _settings(value, prefix + inner)
        elif name == "positions" and isinstance(value, list) and len(value) == 3:
            settings.append((prefix + name, _slice_text(slice(*value))))
        elif name == "prompts" and isinstance(value, list):
            settings.append((prefix + name, "\n".join(map(str, value))))
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            settings.append((prefix + name, text))
    return settings


def _slice_text(positions: slice) -> str:
    parts = (positions.start, positions.stop, positions.step)
    start, stop, step = ("" if part is None else str(part) for part in parts)
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _shown(value: Any) -> str:
    """Text for the page: printable, and cut where a browser would choke on it."""
    if isinstance(value, float):
        return "–" if value != value else f"{value:#.4g}"
    if value is None:
        return "–"
    text = str(value)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}… [cut: {len(text):,} characters in all]"
    return printable(text)


def _figure_json(figure: go.Figure) -> Markup:
    """A figure as JSON that fills the width it gets and cannot end the script it lies in."""
    fluid = go.Figure(figure).update_layout(width=None, height=None, autosize=True)
    return Markup(str(fluid.to_json()).replace("<", "\\u003c"))


def _figures_json(figures: Mapping[str, go.Figure | None]) -> dict[str, Markup | None]:
    return {name: figure and _figure_json(figure) for name, figure in figures.items()}


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _normal(script: str) -> str:
    """Newlines as the browser will see them: the script's hash depends on it."""
    return script.replace("\r\n", "\n").replace("\r", "\n")


def _inert(script: str) -> Markup:
    """JavaScript to be kept as text: nothing in it may end the element that holds it."""
    return Markup(script.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _sha256(script: str) -> str:
    return b64encode(hashlib.sha256(script.encode()).digest()).decode()
