"""The parts of the page beside its vectors: figures, MELBO-ortho families, adapters, factors."""

from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import plots
from tl_melbo.activation_map import ActivationMap
from tl_melbo.adapters import Adapter
from tl_melbo.analysis import cosine_similarity
from tl_melbo.analysis._effect_plane import effect_plane, largest_cosine
from tl_melbo.analysis._family import Family
from tl_melbo.gated import GatedFactors
from tl_melbo.report import _facts
from tl_melbo.report._data import Column
from tl_melbo.report._render import figures_json, number, shown
from tl_melbo.vectors import SteeringVectors

# The first token's residual is far longer than the others' and would decide every cosine.
_AFTER_THE_FIRST = slice(1, None)
_SCALINGS = {"raw": "", "reference norm": " at theta0’s norm", "mean norm": " at members’ norm"}
_EFFECT = (
    Column("distance", "Distance", "number", "From the mean effect of theta0 to its own"),
    Column("kl_to_reference", "KL to theta0", "number", "Divergence of the next token, in nats"),
    Column("kl_to_unsteered", "KL to unsteered", "number", "Divergence of the next token, in nats"),
)
FAMILY = (
    Column("index", "Vector", "number", "Its number in the family"),
    Column("norm", "Norm", "number", "In units of the residual stream"),
    *_EFFECT,
    Column("completion", "Completion", "text", "With the vector added"),
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


class Effects(NamedTuple):
    """Cosines of the effects of vectors and negatives, and their places in a plane."""

    cosines: Tensor
    places: Tensor
    shares: tuple[float, float]


def effects_of(found: SteeringVectors, activation_map: ActivationMap | None) -> Effects | None:
    """Of the vectors, then of their negatives; None without a map, or where one has no effect."""
    if activation_map is None:
        return None
    theta = found.vectors.to(activation_map.x.device)
    delta = _delta(torch.cat([theta, -theta]), activation_map, _facts.positions_of(found))
    if delta is None:
        return None
    return Effects(cosine_similarity(delta), *effect_plane(delta))


def _delta(theta: Tensor, f: ActivationMap, positions: slice) -> Tensor | None:
    with torch.no_grad():
        delta = f.delta(theta, positions).cpu()
    return delta if (delta.flatten(1).norm(dim=-1) > 0).all() else None


def library_figures(
    found: SteeringVectors,
    data: dict[str, Any],
    effects: Effects | None,
    side_effects: pd.DataFrame | None,
) -> dict[str, Any]:
    """Effects against each other and in a plane, side effects, and the search; None if unknown."""
    figures: dict[str, Any] = dict.fromkeys(("effects", "map", "specificity", "history"))
    numbers = found.columns["index"].tolist()
    # Of rows without a finite number nothing can be drawn.
    if side_effects is not None and any(side_effects["specificity"].notna()):
        figures["specificity"] = plots.specificity_points(side_effects.assign(vector=numbers), "")
    if found.history is not None and found.history.numel():
        figures["history"] = plots.objective_history(found, "")
    if effects is not None:
        rows = [row for row in data["rows"] if row["prompt"] == 0]
        names = {card["key"]: card["name"] for card in data["behaviours"]}
        # Rows of one behaviour side by side, in the order of the cards; those without one last.
        cards = {key: place for place, key in enumerate(names)}
        order = [row for row in rows if row["sign"] > 0]
        order.sort(key=lambda row: cards.get(row["behaviour"], len(cards)))
        places = [row["vector"] for row in order]
        figures["effects"] = plots.cosine_heatmap(
            effects.cosines[places][:, places], "", labels=[row["key"] for row in order]
        )
        at = [row["vector"] + len(found) * (row["sign"] < 0) for row in rows]
        figures["map"] = plots.effect_map(
            effects.places[at],
            [row["key"] for row in rows],
            [names.get(row["behaviour"], row["filtered"] and "filtered out") for row in rows],
            shares=effects.shares,
            title="",
        )
    return figures_json(figures)


def family_part(part: Family, activation_map: ActivationMap | None) -> dict[str, Any]:
    """What the page's template shows of a family, and the tables that its script builds."""
    vectors, numbers = part.vectors, part.vectors.columns["index"].tolist()
    rows = {kind: frame.to_dict("records") for kind, frame in part.table.groupby("kind")}
    (unsteered,), (reference,) = rows["unsteered"], rows["reference"]
    window = min(50, max(1, len(vectors) // 4))
    both = torch.cat([part.reference.vectors, vectors.vectors])
    figures: dict[str, Any] = {
        "kl": plots.kl_curve(part.table, window=window, title=""),
        "norm": plots.norm_curve(vectors, window, ""),
        "distance": plots.distance_curve(vectors, float(unsteered["distance"]), window, ""),
        "effects": None,
        "composition": plots.composition_curves(part.composition, title=""),
    }
    if activation_map is not None:
        delta = _delta(both.to(activation_map.x.device), activation_map, _AFTER_THE_FIRST)
        if delta is not None:
            labels = ["θ₀", *numbers]
            figures["effects"] = plots.cosine_heatmap(cosine_similarity(delta), "", labels=labels)
    chosen = vectors.story.get("hyperparameters", {})
    told = {
        "Vectors": len(vectors),
        "Norms": f"{vectors.norms.min():.4g} to {vectors.norms.max():.4g}",
        "Norm of theta0": f"{reference['norm']:.4g}",
        "Optimiser": chosen.get("optimiser"),
        "Norm penalty": chosen.get("norm_penalty") or None,
        "Largest |cosine|": f"{largest_cosine(both):.1g}",
    }
    return {
        "number": part.number,
        "n_vectors": len(vectors),
        "window": window,
        "facts": told,
        "settings": _facts.settings(vectors.story),
        "reference": reference["completion"],
        "unsteered_kl": float(unsteered["kl_to_reference"]),
        "figures": figures_json(figures),
    }


def family_tables(part: Family) -> dict[str, Any]:
    """A family's own table and that of its sums."""
    composed = part.composition.assign(
        members=[" ".join(map(str, members)) for members in part.composition["members"]],
        what=part.composition["combination"] + part.composition["scaling"].replace(_SCALINGS),
    )
    family = pd.DataFrame(part.table[part.table["kind"] == "family"])
    return {
        f"family-{part.number}-vectors": table(FAMILY, family),
        f"composition-{part.number}": table(COMPOSITION, composed),
    }


def adapter_tables(
    adapters: Adapter | GatedFactors | None, texts: pd.DataFrame | None, called: str = "adapter"
) -> dict[str, Any]:
    """What was measured of the adapters or factors, and what the model writes under each."""
    tables = {}
    if adapters is not None:
        frame = adapters.table()
        hint = "Measured at the end of its training; losses, KL and entropies in nats a token"
        if called == "factor":
            hint = "Measured at the end of the search, on the residual stream"
        names = [*map(str, frame)]
        columns = [Column(name, name.replace("_", " "), "number", hint) for name in names]
        tables[f"{called}s"] = table(columns, frame)
    if texts is not None:
        numbers = [] if adapters is None else adapters.columns["index"].tolist()
        names = [
            "unsteered" if place < 0 else str(numbers[place] if place < len(numbers) else place)
            for place in texts["vector"]
        ]
        columns = [
            Column("called", called.capitalize(), "word", "Its number; the unsteered model first"),
            Column("prompt", "Prompt", "text", "What the model was asked"),
            Column("completion", "Completion", "text", "Sampled at temperature 1"),
        ]
        frame = texts.assign(called=names).sort_values(["prompt", "vector"], kind="stable")
        tables[f"{called}-texts"] = table(columns, frame)
    return tables


def table(columns: "tuple[Column, ...] | list[Column]", frame: pd.DataFrame) -> dict[str, Any]:
    """A frame as the page's script wants it."""
    rows = [
        [number(row[c.name]) if c.kind == "number" else shown(row[c.name]) for c in columns]
        for row in frame.to_dict("records")
    ]
    return {"columns": [column._asdict() for column in columns], "rows": rows}
