"""The check of `05_other_ways`: a difference of means."""

from typing import Any

import torch
from torch import Tensor

import tl_melbo as tm
from tl_melbo.course._note import Note, Wrong, unfinished, vector

_CLOSE = 1e-3


def mean_difference(
    answer: Any, one: tm.ActivationMap, other: tm.ActivationMap, radius: float
) -> Note:
    """Compare a difference of means at the source layer with one made text by text.

    The mean is over all tokens but the first, of each text first and then of all texts.
    """
    if note := unfinished(answer):
        return note
    wanted = _mean(one) - _mean(other)
    found = vector(answer, len(wanted))
    cosine = float(torch.cosine_similarity(found, wanted, dim=0))
    if cosine < -0.9:
        raise Wrong("It points the wrong way: from the behaviour to the texts without it.")
    if cosine < 1 - _CLOSE:
        raise Wrong(
            f"Its cosine with the difference of means is {cosine:.3f}. Do padding and the first "
            "token of each text stay out, and does each text count once?"
        )
    if abs(float(found.norm()) - radius) > _CLOSE * radius:
        raise Wrong(f"The direction is right. Its norm is {float(found.norm()):.3f}.")
    return Note("Right: the direction from the one kind of text to the other, at the radius.")


def _mean(f: tm.ActivationMap) -> Tensor:
    """Over prompts, of each prompt's mean over its own tokens but the first."""
    rows = [x[own][1:].double().mean(0) for x, own in zip(f.x, f.mask, strict=True)]
    return torch.stack(rows).mean(0).cpu()
