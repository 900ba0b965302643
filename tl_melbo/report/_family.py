"""The part of the page about a MELBO-ortho family."""

from typing import Any

import pandas as pd
import torch

from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import cosine_similarity
from tl_melbo.analysis._family import Family
from tl_melbo.plots import composition_curves, cosine_heatmap, distance_curve, kl_curve, norm_curve
from tl_melbo.report._render import effects_heatmap, figures_json, settings
from tl_melbo.report._tables import COMPOSITION, FAMILY, described
from tl_melbo.vectors import SteeringVectors

# The first token's residual is far longer than the others' and would decide every cosine.
_AFTER_THE_FIRST = slice(1, None)
_SCALINGS = {"raw": "", "reference norm": " at theta0’s norm", "mean norm": " at members’ norm"}


def family_part(part: Family, activation_map: ActivationMap | None) -> dict[str, Any]:
    """What the page's template shows of a family."""
    rows = dict(iter(part.table.groupby("kind")))
    n_vectors = len(part.vectors)
    window = min(50, max(1, n_vectors // 4))
    unsteered, reference = rows["unsteered"].iloc[0], rows["reference"].iloc[0]
    both = SteeringVectors(torch.cat([part.reference.vectors, part.vectors.vectors]))
    similarity = cosine_similarity(both)
    labels = ["θ₀", *part.vectors.columns["index"].tolist()]
    figures = {
        "kl": _kl_curve(part, rows, window),
        "norm": norm_curve(part.vectors, window, ""),
        "distance": distance_curve(part.vectors, float(unsteered["distance"]), window, ""),
        "vectors": cosine_heatmap(similarity, "", labels=labels),
        "effects": effects_heatmap(both, activation_map, _AFTER_THE_FIRST, labels),
        "composition": composition_curves(part.composition, title=""),
    }
    norms, chosen = part.vectors.norms, part.vectors.story.get("hyperparameters", {})
    facts = {
        "Vectors": n_vectors,
        "Norms": f"{norms.min():.4g} to {norms.max():.4g}",
        "Norm of theta0": f"{reference['norm']:.4g}",
        "Optimiser": chosen.get("optimiser"),
        "Norm penalty": chosen.get("norm_penalty") or None,
        "Largest |cosine|": f"{float(similarity.fill_diagonal_(0.0).abs().max()):.1e}",
    }
    return {
        "number": part.number,
        "n_vectors": n_vectors,
        "window": window,
        "facts": [(name, str(value)) for name, value in facts.items() if value is not None],
        "settings": settings(part.vectors.story),
        "reference": reference["completion"],
        "unsteered_kl": float(unsteered["kl_to_reference"]),
        "figures": figures_json(figures),
        "columns": described(FAMILY),
        "rows": rows["family"].to_dict("records"),
        "composition_columns": described(COMPOSITION),
        "composition_rows": _composition_rows(part.composition),
    }


def _kl_curve(part: Family, rows: dict[Any, pd.DataFrame], window: int) -> Any:
    baselines = {
        "unsteered": "unsteered",
        "random vectors of the same norms": "random",
        f"the family at norm {part.reference.norms[0]:.4g}": "rescaled",
    }
    measured = {
        kind: torch.tensor(frame["kl_to_reference"].to_numpy()) for kind, frame in rows.items()
    }
    return kl_curve(
        measured["family"],
        part.vectors,
        completions=[str(text) for text in rows["family"]["completion"]],
        window=window,
        baselines={name: measured[kind] for name, kind in baselines.items()},
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
