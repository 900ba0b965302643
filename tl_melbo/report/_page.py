"""What the page shows: given, or computed here by asking the analyses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from tl_melbo import story
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis import Behaviours, behaviours, cosine_similarity, kl_divergence
from tl_melbo.analysis._completions import COMPLETION_COLUMNS, collect_completions
from tl_melbo.analysis._family import Family
from tl_melbo.analysis._side_effects import COLUMNS
from tl_melbo.files import replacing
from tl_melbo.model.bridge import Model
from tl_melbo.plots import cosine_heatmap, objective_history, specificity_points
from tl_melbo.report import _render, _tables
from tl_melbo.report._family import family_part
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import as_chat
from tl_melbo.vectors import SteeringVectors


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

    Whatever is not given is computed. The file needs nothing else and makes no network requests.

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
        The page's table, one row a vector and prompt: index, prompt, what the method measured
        (objective, for example; where known), kl (of the next token's distribution to the unsteered
        model's, KL(P_vector || P_unsteered), in nats), specificity and loss_increase (where side
        effects are given), behaviour (what `analysis.behaviours` grouped its completion with),
        completion, negated_completion.

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
    # Before the completions are written: it refuses vectors of no norm.
    similarity = cosine_similarity(found)
    options = {"layer": layer, "chat": chat, "batch_size": batch_size}
    # Opened before the work: a folder that cannot be written to shows at once.
    with replacing(path) as temporary:
        if completions is None:
            completions = collect_completions(
                model, texts, found, max_new_tokens=max_new_tokens, **options
            )
        kl = {text: kl_divergence(model, text, found, **options).tolist() for text in texts}
        groups = _groups(model, completions, as_chat(found, chat), batch_size)
        table = _tables.vectors_table(found, completions, kl, groups, side_effects)
        unsteered = completions[completions["vector"] == -1]
        page = _page(
            found,
            table,
            dict(zip(unsteered["prompt"], unsteered["completion"], strict=True)),
            groups,
            _figures(found, similarity, activation_map, side_effects),
            [family_part(part, activation_map) for part in families],
            title,
        )
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return table


def _groups(
    model: Model, completions: pd.DataFrame, chat: bool, batch_size: int
) -> Behaviours | None:
    """The behaviours of the vectors; their negatives have completions, but are the same vectors."""
    forward = pd.DataFrame(completions[completions["scale"] >= 0])
    if forward.empty:
        return None
    # Its logits are of whole texts: 8 at once take as much memory as many rows of the others.
    return behaviours(model, forward, chat=chat, batch_size=min(batch_size, 8))


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


def _figures(
    found: SteeringVectors,
    similarity: Tensor,
    activation_map: ActivationMap | None,
    side_effects: pd.DataFrame | None,
) -> dict[str, go.Figure | None]:
    numbers = found.columns["index"].tolist()
    labels = None if numbers == list(range(len(found))) else numbers
    specificity = None
    # Of rows without a finite number nothing can be drawn.
    if side_effects is not None and any(side_effects["specificity"].notna()):
        specificity = specificity_points(side_effects.assign(vector=numbers), "")
    has_history = found.history is not None and found.history.numel() > 0
    return {
        "vectors": cosine_heatmap(similarity, "", labels=labels),
        "effects": _render.effects_heatmap(found, activation_map, _positions(found), labels),
        "specificity": specificity,
        "history": objective_history(found, "") if has_history else None,
    }


def _positions(found: SteeringVectors) -> slice:
    return story.slice_from_json(found.story.get("hyperparameters", {}).get("positions"))


def _page(
    found: SteeringVectors,
    table: pd.DataFrame,
    unsteered: Mapping[str, str],
    groups: Behaviours | None,
    figures: Mapping[str, go.Figure | None],
    families: Sequence[Mapping[str, object]],
    title: str | None,
) -> str:
    prompts = list(dict.fromkeys(table["prompt"]))
    measure = _tables.measure_shown(found)
    return _render.render(
        title=title,
        prompts=prompts,
        about=story.about_of(found.story),
        facts=_render.facts(found),
        settings=_render.settings(found.story),
        layer=found.story.get("source_layer"),
        positions=story.slice_text(_positions(found)),
        orthogonal=bool(found.story.get("hyperparameters", {}).get("orthogonal")),
        n_vectors=len(found),
        measure=measure,
        not_converged=_tables.not_converged(found),
        unsteered=unsteered,
        groups=None if groups is None else _tables.groups_rows(groups, found),
        n_distinct=0 if groups is None else groups.n_distinct,
        n_incoherent=0 if groups is None else [*groups.texts["coherent"]].count(False),
        grouped_by_words=groups is not None and groups.embedder == "words",
        group_columns=_tables.groups_columns(many_prompts=len(prompts) > 1),
        columns=_tables.vectors_columns(table, measure),
        rows=table.to_dict("records"),
        figures=_render.figures_json(figures),
        families=families,
    )
