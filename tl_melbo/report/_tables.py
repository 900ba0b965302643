"""The page's tables: what each column is called, and what a reader should know about it."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tl_melbo import story
from tl_melbo.analysis import Behaviours
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

# Name, label, kind and hint of each column.
Column = tuple[str, str, str, str]

PROMPT: Column = ("prompt", "Prompt", "text", "What the model was asked")
_KL: tuple[Column, ...] = (
    ("kl_to_reference", "KL to theta0", "number", "Divergence of the next token, in nats"),
    ("kl_to_unsteered", "KL to unsteered", "number", "Divergence of the next token, in nats"),
)
_DISTANCE: Column = ("distance", "Distance", "number", "From the mean effect of theta0 to its own")
FAMILY: tuple[Column, ...] = (
    ("index", "Vector", "number", "Its number in the family"),
    ("norm", "Norm", "number", "In units of the residual stream"),
    _DISTANCE,
    *_KL,
    ("completion", "+v", "text", "The completion with the vector added"),
)
COMPOSITION: tuple[Column, ...] = (
    ("size", "Vectors", "number", "How many are added up"),
    ("subset", "Subset", "word", "The first of the family, or a random choice"),
    ("members", "IDs", "word", "Numbers of the vectors"),
    ("what", "Combined", "word", "Mean or sum, and at which norm"),
    ("norm", "Norm", "number", "Of the combination, in units of the residual stream"),
    _DISTANCE,
    *_KL,
    ("completion", "Completion", "text", "With the combination added"),
)
_GROUPS: tuple[Column, ...] = (
    ("name", "Behaviour", "text", "Words that set its completions apart from the others"),
    ("n_vectors", "Vectors", "number", "How many bring it out"),
    ("which", "IDs", "word", "Numbers of the vectors"),
    ("example", "Example", "text", "The most fluent of its completions"),
)


def described(columns: Sequence[Column]) -> list[dict[str, str]]:
    """Columns as the template wants them."""
    names = ("name", "label", "kind", "hint")
    return [dict(zip(names, column, strict=True)) for column in columns]


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
    measure = measure_shown(found)
    numbers = {} if measure is None else {measure["column"]: found.columns[measure["column"]]}
    costs = {}
    if side_effects is not None:
        costs = {
            name: side_effects[name].astype(float) for name in ("specificity", "loss_increase")
        }
    rows = []
    for prompt, kl in divergences.items():
        for vector, index in enumerate(found.columns["index"].tolist()):
            row = {"index": index, "prompt": prompt}
            row |= {name: column[vector].item() for name, column in numbers.items()}
            row |= {"kl": kl[vector]}
            row |= {name: column.iloc[vector] for name, column in costs.items()}
            row |= {
                "behaviour": names.get((prompt, vector)),
                "completion": written.get((prompt, vector, 1.0)),
                "negated_completion": written.get((prompt, vector, -1.0)),
            }
            rows.append(row)
    return Table(rows)


def vectors_columns(table: pd.DataFrame, measure: dict[str, Any] | None) -> list[dict[str, str]]:
    """The columns of `vectors_table` that hold something."""
    columns: list[Column] = [("index", "Vector", "number", "found[0], found[1], ...")]
    if len(set(table["prompt"])) > 1:
        columns.append(PROMPT)
    if measure is not None:
        label = measure["label"][:1].upper() + measure["label"][1:]
        hint = f"What the search measured of it, in {measure['unit']}"
        columns.append((measure["column"], label, "number", hint))
    columns.append(("kl", "KL", "number", "Divergence of the next token from unsteered, in nats"))
    if "specificity" in table.columns:
        columns += [
            ("specificity", "Specificity", "number", "1: acts on the prompt alone; 0.5: anywhere"),
            ("loss_increase", "Loss", "number", "What it costs on prose, in nats a token"),
        ]
    texts: tuple[Column, ...] = (
        ("behaviour", "Behaviour", "text", "The group of its completion"),
        ("completion", "+v", "text", "The completion with the vector added"),
        ("negated_completion", "−v", "text", "The completion with the vector subtracted"),
    )
    columns += [
        column for column in texts if any(isinstance(text, str) for text in table[column[0]])
    ]
    return described(columns)


def groups_columns(many_prompts: bool) -> list[dict[str, str]]:
    """The columns of `groups_rows`."""
    return described([PROMPT, *_GROUPS] if many_prompts else _GROUPS)


def groups_rows(groups: Behaviours, found: SteeringVectors) -> list[dict[str, Any]]:
    """The table of behaviours, vectors called by their numbers in the library.

    What was filtered out comes last, for whoever reads what a machine would not.
    """
    rows = groups.groups.to_dict("records")
    aside: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in groups.texts.to_dict("records"):
        if row["vector"] >= 0 and not row["coherent"]:
            aside.setdefault((row["prompt"], row["filtered_out"]), []).append(row)
    for (prompt, reason), some in aside.items():
        best = min(some, key=lambda row: row["perplexity"])
        vectors = sorted({row["vector"] for row in some})
        about = {"name": f"filtered out: {reason}", "prompt": prompt, "example": best["completion"]}
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


def _behaviour_names(groups: Behaviours) -> dict[tuple[str, int], str]:
    """What each prompt and vector's completion was grouped with."""
    names = dict(zip(groups.groups["behaviour"], groups.groups["name"], strict=True))
    return {
        (row["prompt"], row["vector"]): names.get(
            row["behaviour"], f"filtered out: {row['filtered_out']}"
        )
        for row in groups.texts.to_dict("records")
    }
