"""Checks of `04_orthogonal_families`: one orthogonal follower, found by hand."""

from typing import Any

import torch

import tl_melbo as tm
from tl_melbo.course._note import Note, Wrong, unfinished, vector

# The largest share that may be left of the distance of no vector.
_MOST = 0.5


def follower(answer: Any, f: tm.ActivationMap, theta0: tm.SteeringVectors) -> Note:
    """Is a vector orthogonal to theta0, and how much of the distance to its effect is left?"""
    if note := unfinished(answer):
        return note
    start = theta0.vectors[0]
    theta = vector(answer, len(start)).detach().cpu().float()
    if not theta.isfinite().all() or not theta.any():
        raise Wrong("The vector is zero or not finite. Did the optimiser move the right tensor?")
    cosine = float(torch.cosine_similarity(theta, start, dim=0))
    if abs(cosine) > 1e-4:
        again = "Is what you hand in projected, too, and not only what you put into the loss?"
        same = "That is θ₀ itself, or nearly. Where is it kept out?"
        raise Wrong(f"Its cosine with θ₀ is {cosine:.2g}. {same if cosine > 0.5 else again}")
    rows = torch.stack([theta, torch.zeros_like(theta)])
    own, nothing = tm.analysis.effect_distance(f, rows, theta0).tolist()
    share = own / nothing
    if share > _MOST:
        worse = "Does the loss compare with the effect of θ₀, and does it fall?"
        slow = (
            "The direction is right; does it still fall at the end? Try more steps, or larger ones."
        )
        raise Wrong(
            f"It is orthogonal, but {share:.0%} of the distance is left, and at most {_MOST:.0%} "
            f"should be. {worse if share > 0.9 else slow}"
        )
    return Note(
        f"Right: orthogonal to θ₀, and {share:.0%} of the distance is left. Its norm is "
        f"{float(theta.norm()):.1f}; that of θ₀ is {float(start.norm()):.1f}."
    )
