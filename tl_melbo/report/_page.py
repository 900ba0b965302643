"""What the page shows of a library and its families: given, or computed by the analyses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks, plots
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import behaviours, cosine_similarity, kl_divergence
from tl_melbo.analysis._completions import COMPLETION_COLUMNS, collect_completions
from tl_melbo.analysis._family import Family
from tl_melbo.analysis._side_effects import COLUMNS
from tl_melbo.files import replacing
from tl_melbo.model.bridge import Model
from tl_melbo.report import _render
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import as_chat
from tl_melbo.vectors import SteeringVectors

# The first token's residual is far longer than the others' and would decide every cosine.
_AFTER_THE_FIRST = slice(1, None)
_SCALINGS = {"raw": "", "reference norm": " at theta0’s norm", "mean norm": " at members’ norm"}


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
    """Write one HTML file about a library: its settings, completions, numbers and figures.

    The file is replaced whole or not at all; it makes no network requests.

    Args:
        completions: as `collect_completions` gives them; None writes them.
        activation_map: the map that the vectors were found with; without it, effects are not shown.
        families: from `collect_family`; each gets a part of the page.
        side_effects: as `analysis.side_effects` gives it for these vectors.
        prompts: what to complete; None takes those of `completions`, or those of the metadata.
        title: the page's heading; None takes the prompt.

    Returns:
        The page's table, one row a vector and prompt: index, prompt, what the method measured,
        kl (KL(P_vector || P_unsteered) of the next token, in nats), specificity and loss_increase
        (with side effects), behaviour, completion, negated_completion.

    Raises:
        ValueError: no vectors or a zero one, no prompt, completions or side effects of others; also
            as `generate` and `kl_divergence` do.
        FileNotFoundError, PermissionError: the folder does not exist, or cannot be written to.
    """
    if not len(found):
        raise ValueError("found: holds no vectors; there is nothing to show")
    _check_frames(completions, side_effects, found)
    if completions is not None:
        prompts = completions["prompt"].tolist()
    chosen = found.story.get("prompts") if prompts is None else prompts
    texts = list(dict.fromkeys(checks.as_texts(chosen or [])))
    # Before the completions are written: it refuses vectors of no norm.
    similarity = cosine_similarity(found)
    options = {"layer": layer, "chat": chat, "batch_size": batch_size}
    # Opened before the work: a folder that cannot be written to shows at once.
    with replacing(path) as temporary:
        if completions is None:
            completions = collect_completions(
                model, texts, found, max_new_tokens=max_new_tokens, **options
            )
        else:  # greedy, at the vectors' own length
            completions = completions[completions["scale"].isin([-1, 0, 1])]
            if "sample" in completions:
                completions = completions[completions["sample"] == 0]
        kl = {text: kl_divergence(model, text, found, **options).tolist() for text in texts}
        # Its logits are of whole texts: 8 at once take as much memory as many rows of others.
        grouping = {"chat": as_chat(found, chat), "batch_size": min(batch_size, 8)}
        groups = None if completions.empty else behaviours(model, completions, **grouping)
        table = _render.vectors_table(found, completions, kl, groups, side_effects)
        unsteered = completions[completions["vector"] == -1]
        page = _render.render(
            title=title,
            prompts=texts,
            unsteered=dict(zip(unsteered["prompt"], unsteered["completion"], strict=True)),
            **_render.library_facts(found),
            **_render.groups_part(groups, found, many_prompts=len(texts) > 1),
            columns=_render.vectors_columns(table, found),
            rows=table.to_dict("records"),
            figures=_figures(found, similarity, activation_map, side_effects),
            families=[_family_part(part, activation_map) for part in families],
        )
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return table


def _check_frames(
    completions: pd.DataFrame | None, side_effects: pd.DataFrame | None, found: SteeringVectors
) -> None:
    last = len(found) - 1
    if completions is not None:
        advice = "pass what report.collect_completions returns"
        checks.columns(completions, COMPLETION_COLUMNS, "completions", advice)
        if unknown := sorted({*completions["vector"]} - {*range(-1, len(found))}):
            raise ValueError(
                f"completions: has texts of vectors {unknown[:10]}, but found holds 0 to {last}; "
                "pass the completions of these vectors"
            )
    if side_effects is not None:
        advice = "pass what analysis.side_effects returns"
        checks.columns(side_effects, COLUMNS, "side_effects", advice, numbers=True)
        if [*side_effects["vector"]] != [*range(len(found))]:
            raise ValueError(
                f"side_effects: {len(side_effects)} rows that are not those of vectors 0 to "
                f"{last}, in order; measure the vectors of found"
            )


def _figures(
    found: SteeringVectors,
    similarity: Tensor,
    activation_map: ActivationMap | None,
    side_effects: pd.DataFrame | None,
) -> dict[str, Any]:
    numbers = found.columns["index"].tolist()
    labels = None if numbers == list(range(len(found))) else numbers
    figures: dict[str, Any] = {"specificity": None, "history": None}
    # Of rows without a finite number nothing can be drawn.
    if side_effects is not None and any(side_effects["specificity"].notna()):
        figures["specificity"] = plots.specificity_points(side_effects.assign(vector=numbers), "")
    if found.history is not None and found.history.numel():
        figures["history"] = plots.objective_history(found, "")
    figures["vectors"] = plots.cosine_heatmap(similarity, "", labels=labels)
    positions = _render.positions_of(found)
    figures["effects"] = _render.effects_heatmap(found, activation_map, positions, labels)
    return _render.figures_json(figures)


def _family_part(part: Family, activation_map: ActivationMap | None) -> dict[str, Any]:
    """What the page's template shows of a family."""
    vectors, numbers = part.vectors, part.vectors.columns["index"].tolist()
    rows = {kind: frame.to_dict("records") for kind, frame in part.table.groupby("kind")}
    (unsteered,), (reference,) = rows["unsteered"], rows["reference"]
    window = min(50, max(1, len(vectors) // 4))
    both = SteeringVectors(torch.cat([part.reference.vectors, vectors.vectors]))
    similarity = cosine_similarity(both)
    labels = ["θ₀", *numbers]
    figures = {
        "kl": plots.kl_curve(part.table, window=window, title=""),
        "norm": plots.norm_curve(vectors, window, ""),
        "distance": plots.distance_curve(vectors, float(unsteered["distance"]), window, ""),
        "vectors": plots.cosine_heatmap(similarity, "", labels=labels),
        "effects": _render.effects_heatmap(both, activation_map, _AFTER_THE_FIRST, labels),
        "composition": plots.composition_curves(part.composition, title=""),
    }
    composed = part.composition.assign(
        members=[" ".join(map(str, members)) for members in part.composition["members"]],
        what=part.composition["combination"] + part.composition["scaling"].replace(_SCALINGS),
    )
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
        "facts": facts,
        "settings": _render.settings(vectors.story),
        "reference": reference["completion"],
        "unsteered_kl": float(unsteered["kl_to_reference"]),
        "figures": _render.figures_json(figures),
        "columns": _render.FAMILY,
        "rows": rows["family"],
        "composition_columns": _render.COMPOSITION,
        "composition_rows": composed.to_dict("records"),
    }
