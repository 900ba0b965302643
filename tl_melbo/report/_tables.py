"""The page's tables: what each column is called, and what a reader should know about it."""

from typing import Any, NamedTuple

import pandas as pd

from tl_melbo import story
from tl_melbo.analysis import Behaviours
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors


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
    Column("name", "Behaviour", "text", "Words that set its completions apart from the others"),
    Column("n_vectors", "Vectors", "number", "How many bring it out"),
    Column("which", "IDs", "word", "Numbers of the vectors"),
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
    count = [*table["converged"]].count("no") if "converged" in table else 0
    return f"{count} of {len(found)} still gained more than 1% in their last step" if count else ""


def vectors_table(
    found: SteeringVectors,
    completions: pd.DataFrame,
    divergences: dict[str, list[float]],
    groups: Behaviours | None,
    side_effects: pd.DataFrame | None,
) -> pd.DataFrame:
    """One row a prompt and vector: its numbers, its behaviour, and what the model writes."""
    names = {} if groups is None else _behaviour_names(groups)
    keys = zip(completions["prompt"], completions["vector"], completions["scale"], strict=True)
    written = dict(zip(keys, completions["completion"], strict=True))
    measure, costs = measure_shown(found), [column.name for column in _COSTS]
    frames = []
    for prompt, kl in divergences.items():
        vectors = range(len(found))
        frame = Table({"index": found.columns["index"].tolist(), "prompt": prompt})
        if measure is not None:
            frame[measure["column"]] = found.columns[measure["column"]].tolist()
        frame["kl"] = kl
        if side_effects is not None:
            frame[costs] = side_effects[costs].astype(float).to_numpy()
        frame["behaviour"] = [names.get((prompt, vector)) for vector in vectors]
        for name, scale in (("completion", 1.0), ("negated_completion", -1.0)):
            frame[name] = [written.get((prompt, vector, scale)) for vector in vectors]
        frames.append(frame)
    return Table(pd.concat(frames, ignore_index=True))


def vectors_columns(table: pd.DataFrame, found: SteeringVectors) -> list[Column]:
    """The columns of `vectors_table` that hold something."""
    measured, measure = [], measure_shown(found)
    if measure is not None:
        label = measure["label"][:1].upper() + measure["label"][1:]
        hint = f"What the search measured of it, in {measure['unit']}"
        measured = [Column(measure["column"], label, "number", hint)]
    prompt = [_PROMPT] if len(set(table["prompt"])) > 1 else []
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
    for (prompt, reason), some in aside.groupby(["prompt", "filtered_out"], sort=False):
        example = some.sort_values("perplexity")["completion"].iloc[0]
        about = {"name": f"filtered out: {reason}", "prompt": prompt, "example": example}
        rows.append({**about, "vectors": sorted({*some["vector"]})})
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


def _behaviour_names(groups: Behaviours) -> dict[tuple[str, int], str]:
    """What each prompt and vector's completion was grouped with."""
    names = dict(zip(groups.groups["behaviour"], groups.groups["name"], strict=True))
    return {
        (row["prompt"], row["vector"]): names.get(
            row["behaviour"], f"filtered out: {row['filtered_out']}"
        )
        for row in groups.texts.to_dict("records")
    }
