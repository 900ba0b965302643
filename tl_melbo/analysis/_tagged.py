"""The tags of completions, each beside what the unsteered model writes after the same prompt."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from tl_melbo.analysis._tags import tags
from tl_melbo.tables import Table


def tagged(
    pairs: Sequence[tuple[str, str]],
    unsteered: Mapping[str, Sequence[str]],
    system: str | None = None,
) -> Table:
    """The tags of each text after its prompt, in the order of the pairs, by rule."""
    parts = []
    for prompt in dict.fromkeys(prompt for prompt, _ in pairs):
        places = [place for place, pair in enumerate(pairs) if pair[0] == prompt]
        texts = [pairs[place][1] for place in places]
        parts.append(tags(prompt, texts, system, unsteered.get(prompt)).set_axis(places))
    return Table(pd.concat(parts).sort_index())


def unsteered_of(completions: pd.DataFrame, texts: Sequence[str]) -> dict[str, list[str]]:
    """What is written after each prompt without a vector: the greedy text, or else all samples."""
    found: dict[str, list[str]] = {}
    for prompt, text, first in zip(
        completions["prompt"], texts, is_first(completions), strict=True
    ):
        if first:
            found.setdefault(prompt, []).append(text)
    return found


def is_unsteered(completions: pd.DataFrame) -> np.ndarray:
    """A vector times zero is none."""
    return (completions["vector"].to_numpy() < 0) | (completions["scale"].to_numpy() == 0)


def is_first(completions: pd.DataFrame) -> np.ndarray:
    """The unsteered completions that tell what the baseline is: the greedy ones, or else all."""
    unsteered = is_unsteered(completions)
    if "sample" not in completions:
        return unsteered
    greedy = unsteered & (completions["sample"].to_numpy() == 0)
    has_greedy = completions["prompt"].isin([*completions["prompt"][greedy]]).to_numpy()
    return np.where(has_greedy, greedy, unsteered)
