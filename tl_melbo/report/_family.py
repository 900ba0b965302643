"""The part of the page about a MELBO-ortho family."""

from typing import Any

import pandas as pd
import torch

from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import cosine_similarity
from tl_melbo.analysis._family import Family
from tl_melbo.plots import composition_curves, cosine_heatmap, distance_curve, kl_curve, norm_curve
from tl_melbo.report._render import effects_heatmap, figures_json, known, settings
from tl_melbo.report._tables import COMPOSITION, FAMILY
from tl_melbo.vectors import SteeringVectors

# The first token's residual is far longer than the others' and would decide every cosine.
_AFTER_THE_FIRST = slice(1, None)
_SCALINGS = {"raw": "", "reference norm": " at theta0’s norm", "mean norm": " at members’ norm"}


def family_part(part: Family, activation_map: ActivationMap | None) -> dict[str, Any]:
    """What the page's template shows of a family."""
    vectors, numbers = part.vectors, part.vectors.columns["index"].tolist()
    rows = {kind: frame.to_dict("records") for kind, frame in part.table.groupby("kind")}
    (unsteered,), (reference,) = rows["unsteered"], rows["reference"]
    window = min(50, max(1, len(vectors) // 4))
    both = SteeringVectors(torch.cat([part.reference.vectors, vectors.vectors]))
    similarity = cosine_similarity(both)
    labels = ["θ₀", *numbers]
    figures = {
        "kl": _kl_curve(part, rows, window),
        "norm": norm_curve(vectors, window, ""),
        "distance": distance_curve(vectors, float(unsteered["distance"]), window, ""),
        "vectors": cosine_heatmap(similarity, "", labels=labels),
        "effects": effects_heatmap(both, activation_map, _AFTER_THE_FIRST, labels),
        "composition": composition_curves(part.composition, title=""),
    }
    chosen = vectors.story.get("hyperparameters", {})
    facts = {
        "Vectors": len(vectors),
        "Norms": f"{vectors.norms.min():.4g} to {vectors.norms.max():.4g}",
        "Norm of theta0": f"{reference['norm']:.4g}",
        "Optimiser": chosen.get("optimiser"),
        "Norm penalty": chosen.get("norm_penalty") or None,
        "Largest |cosine|": f"{float(similarity.fill_diagonal_(0.0).abs().max()):.1e}",
    }
    return {
        "number": part.number,
        "n_vectors": len(vectors),
        "window": window,
        "facts": known(facts),
        "settings": settings(vectors.story),
        "reference": reference["completion"],
        "unsteered_kl": float(unsteered["kl_to_reference"]),
        "figures": figures_json(figures),
        "columns": FAMILY,
        "rows": rows["family"],
        "composition_columns": COMPOSITION,
        "composition_rows": _composition_rows(part.composition),
    }


def _kl_curve(part: Family, rows: dict[Any, list[dict[str, Any]]], window: int) -> Any:
    names = {
        "unsteered": "unsteered",
        "random": "random vectors of the same norms",
        "rescaled": f"the family at norm {part.reference.norms[0]:.4g}",
    }
    kl = {k: torch.tensor([row["kl_to_reference"] for row in some]) for k, some in rows.items()}
    return kl_curve(
        kl["family"],
        part.vectors,
        completions=[str(row["completion"]) for row in rows["family"]],
        window=window,
        baselines={name: kl[kind] for kind, name in names.items()},
        title="",
    )


def _composition_rows(composed: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "members": " ".join(map(str, row["members"])),
            "what": row["combination"] + _SCALINGS[row["scaling"]],
        }
        for row in composed.to_dict("records")
        # Rescaled, the sum is the mean: one row is enough.
        if row["combination"] == "mean" or row["scaling"] == "raw"
    ]
