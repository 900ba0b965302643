"""Checks of `04_orthogonal_families`: one orthogonal follower, by a search of one's own."""

from collections.abc import Callable
from typing import Any

import torch

import tl_melbo as tm
from tl_melbo.course._note import Note, Wrong, unfinished, vector

# The largest share that may be left of the distance of no vector. In a model where `melbo_ortho`
# leaves nearly as much: so many times what it leaves, but never nearly all.
_MOST, _TIMES, _NEARLY_ALL = 0.5, 1.25, 0.9


def follower(answer: Callable[..., Any], f: tm.ActivationMap, theta0: tm.SteeringVectors) -> Note:
    """Try a search (effect, start) -> follower on an effect that has a known one, and on f's."""
    start, generator = theta0.vectors[0].to(f.x.device), torch.Generator().manual_seed(0)
    others = torch.randn(8, len(start), generator=generator).to(start)
    basis = torch.linalg.qr(torch.stack([start, *others]).T).Q
    # What start does, the others do, too: together, at four times its norm.
    known = basis[:, 1:] / 4 + basis[:, :1] / 8**0.5
    theta, share = start, 1.0
    effects = (lambda vectors: vectors @ known, lambda vectors: f.delta(vectors).mean((1, 2)))
    for effect in effects:
        found = answer(effect, start.clone())
        if note := unfinished(found):
            return note
        theta = vector(found, len(start)).to(start)
        cosine = float(torch.cosine_similarity(theta, start, dim=0))
        if abs(cosine) > 1e-4:
            same = "That is θ₀ itself, or nearly. Where is it kept out?"
            again = "Is what you return projected, too, and not only what you put into the loss?"
            raise Wrong(f"Its cosine with θ₀ is {cosine:.2g}. {same if cosine > 0.5 else again}")
        with torch.no_grad():
            own, wanted = effect(torch.stack([theta, start]))
        share = float((own - wanted).norm() / wanted.norm())
        most = _MOST
        if share > _MOST and effect is effects[1]:
            left = tm.melbo_ortho(f, theta0, 1).columns["distance"][0] / wanted.norm()
            most = min(max(_MOST, _TIMES * float(left)), _NEARLY_ALL)
        if share > most:
            worse = "Does your loss compare with what `effect` gives for θ₀, and does it fall?"
            slow = "Does the loss still fall at the end? Try more steps, or larger ones."
            raise Wrong(
                f"It is orthogonal, but {share:.0%} of the distance is left, and at most "
                f"{most:.0%} should be. {worse if share > 0.9 else slow}"
            )
    return Note(
        f"Right: orthogonal to θ₀, and {share:.0%} of the distance is left. Its norm is "
        f"{float(theta.norm()):.1f}; that of θ₀ is {float(start.norm()):.1f}."
    )
