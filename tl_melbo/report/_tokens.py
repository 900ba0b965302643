"""What tokens tell of the rows: those that a vector promotes, and where its text diverges."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tl_melbo.analysis._top_tokens import top_tokens_and_kl
from tl_melbo.concatenation import concatenate
from tl_melbo.generation import Tell
from tl_melbo.model.bridge import Model
from tl_melbo.plots._tokens import likeliest
from tl_melbo.report._render import number, shown
from tl_melbo.vectors import SteeringVectors

DIVERGENCE = ("vector", "scale", "prompt", "position", "token", "kl", "top", "unsteered_top")
_MOST_TOKENS = 8
# The rows of the page, by prompt, vector and sign.
Keys = Mapping[tuple[str, int, int], str]
# By prompt and sign, one a vector.
Divergences = dict[tuple[str, int], list[float]]


def measured_after(
    model: Model, found: SteeringVectors, prompts: Sequence[str], on_batch: Tell, **options: Any
) -> tuple[pd.DataFrame, Divergences]:
    """After each prompt, of vectors and negatives: the top tokens, and the KL from unsteered."""
    frames, kl, n_found = [], {}, len(found)
    # Both signs at once: the unsteered model, with which they are compared, reads the prompt once.
    both = concatenate([found, -found])
    for prompt in prompts:
        frame, far = top_tokens_and_kl(model, prompt, both, _MOST_TOKENS, **options)
        signs = [1 if vector < n_found else -1 for vector in frame["vector"]]
        frames.append(frame.assign(prompt=prompt, sign=signs, vector=frame["vector"] % n_found))
        kl[prompt, 1], kl[prompt, -1] = far[:n_found].tolist(), far[n_found:].tolist()
        on_batch(len(frames), len(prompts))
    return pd.concat(frames, ignore_index=True), kl


def told(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    top_tokens: pd.DataFrame,
    divergence: pd.DataFrame | None,
) -> dict[str, Any]:
    """The tokens of each row of the page: those that change most, and where its text parts."""
    keys = {(prompts[row["prompt"]], row["vector"], row["sign"]): row["key"] for row in rows}
    changed: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in top_tokens.to_dict("records"):
        key = keys.get((row["prompt"], row["vector"], row["sign"]))
        if key is not None:
            some = changed.setdefault(key, {"promoted": [], "suppressed": []})[row["direction"]]
            change = number(float(row["log_prob_change"]))
            some.append({"token": shown(row["token"]), "change": change})
    return {"tokens": changed, "divergence": _divergence(divergence, keys)}


def _divergence(frame: pd.DataFrame | None, keys: Keys) -> dict[str, list[dict[str, Any]]]:
    """By row, the tokens of its greedy completion with their KL from unsteered, and what else."""
    if frame is None:
        return {}
    shown_here = frame["scale"].abs() == 1
    if "sample" in frame:
        shown_here &= frame["sample"] == 0
    frame = pd.DataFrame(frame[shown_here])
    told: dict[str, list[dict[str, Any]]] = {}
    for row in frame.sort_values("position", kind="stable").to_dict("records"):
        key = keys.get((row["prompt"], int(row["vector"]), 1 if row["scale"] > 0 else -1))
        if key is not None:
            tops = likeliest(row["top"]), likeliest(row["unsteered_top"])
            words = f"KL {row['kl']:.2g} nats; steered: {tops[0]}; unsteered: {tops[1]}"
            told.setdefault(key, []).append(
                {"token": shown(row["token"]), "value": number(float(row["kl"])), "told": words}
            )
    return told
