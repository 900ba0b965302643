"""Checks of `05_other_ways`: a difference of means, and a vector's share in a span."""

from typing import Any

import torch
from torch import Tensor

import tl_melbo as tm
from tl_melbo.course._note import Note, Wrong, number, unfinished

_CLOSE = 1e-3
_SEED = 0


def mean_difference(
    answer: Any, one: tm.ActivationMap, other: tm.ActivationMap, radius: float
) -> Note:
    """Compare a difference of means at the source layer with one made text by text.

    The mean is over all tokens but the first, of each text first and then of all texts.
    """
    if note := unfinished(answer):
        return note
    wanted = _mean(one) - _mean(other)
    if not isinstance(answer, Tensor) or answer.shape != wanted.shape:
        got = f"shape {(*answer.shape,)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise Wrong(f"Expected one vector, a tensor of shape {(*wanted.shape,)}, got {got}.")
    if not answer.isfinite().all() or not answer.any():
        raise Wrong("The vector is zero or not finite. Was a mean taken over no token?")
    found = answer.detach().double().cpu()
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


def share(answer: Any) -> Note:
    """Try a function (vector, library) -> share in the span on spans that are known."""
    if note := unfinished(answer):
        return note
    random = torch.Generator().manual_seed(_SEED)
    rows = torch.randn(4, 20, generator=random)
    rows[1] = rows[0] + 0.3 * rows[1]  # not orthogonal, as libraries need not be
    inside = torch.randn(4, generator=random) @ rows
    some = torch.randn(20, generator=random)
    solved = torch.linalg.lstsq(rows.T.double(), some[:, None].double()).solution
    wanted = float((rows.T.double() @ solved).square().sum() / some.double().square().sum())
    units = torch.nn.functional.normalize(rows, dim=-1)
    naive = float((units @ (some / some.norm())).square().sum())
    found = number(answer(some, rows), "the share")
    if abs(found - wanted) > _CLOSE:
        if abs(found - wanted**0.5) < _CLOSE:
            raise Wrong("That is a share of the norm; the shares of a norm do not add up to 1.")
        if abs(found - naive) < _CLOSE:
            raise Wrong("That counts what two vectors of the library have in common twice.")
        raise Wrong(f"For four vectors in 20 dimensions you get {found:.3f}, not the share.")
    for vector, expected, what in (
        (7 * some, wanted, "the same vector, seven times as long,"),
        (inside, 1.0, "a combination of the library"),
    ):
        found = number(answer(vector, rows), "the share")
        if abs(found - expected) > _CLOSE:
            raise Wrong(f"For {what} the share should be {expected:.3f}, but is {found:.3f}.")
    return Note("Right: 1 inside the span, 0 across it, whatever the lengths.")
