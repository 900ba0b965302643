"""Checks of `07_your_question`: a permutation test."""

import math
from typing import Any

import torch

from tl_melbo.course._note import Note, Wrong, number, unfinished

_SEED = 0


def permutation_p(answer: Any) -> Note:
    """Try a function (a, b) -> p on lists whose p-value is known exactly."""
    if note := unfinished(answer):
        return note
    # Of the 252 ways to cut ten numbers in two, two are as far apart as these.
    apart, n_ways = ([1.0, 2.0, 3.0, 4.0, 5.0], [11.0, 12.0, 13.0, 14.0, 15.0]), math.comb(10, 5)
    wanted, found = 2 / n_ways, _p(answer, *apart)
    # Farther apart than any relabelling that a student draws.
    if 0 in (found, _p(answer, [*map(float, range(12))], [*map(float, range(100, 112))])):
        raise Wrong("A p-value of 0: the observed labels are one of the relabellings, too.")
    if abs(_p(answer, *apart[::-1]) - found) > 0.01:
        raise Wrong("It depends on which list comes first. Is it two-sided?")
    if not abs(found - wanted) < 0.01:
        raise Wrong(f"For lists that are far apart p is {found:.3f}, which is not right.")
    same = _p(answer, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    if same < 0.95:
        raise Wrong(f"For two equal lists no relabelling can be nearer, but p is {same:.3f}.")
    # All 20 ways to relabel are as far apart in their means, though not in their ranks.
    outlier = _p(answer, [1.0, 2.0, 30.0], [3.0, 4.0, 5.0])
    if outlier < 0.95:
        raise Wrong(
            f"One of two lists holds a number that is far out, and p is {outlier:.3f}. Is it the "
            "difference of the means that each relabelling is compared by?"
        )
    # Of the 15 ways to choose two of six, two are as far apart as these, one to each side.
    uneven = _p(answer, [18.0, 19.0], [1.0, 2.0, 9.0, 11.0])
    if abs(uneven - 1 / 15) < 0.03:
        raise Wrong("Only one of the two directions is counted. Is it two-sided?")
    if not abs(uneven - 2 / 15) < 0.04:
        raise Wrong(
            f"For a list of two and one of four p is {uneven:.3f}, which is not right. Do the "
            "relabelled lists keep their lengths, and are their means compared?"
        )
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.randn(12, 2, 6, generator=generator)
    below = sum(_p(answer, *(row.tolist() for row in pair)) < 0.5 for pair in draws)
    if not 2 <= below <= 10:
        raise Wrong(f"Where nothing is there, p < 0.5 should come half of the time; {below} of 12.")
    return Note("Right: exact where the answer is known, and uniform where nothing is there.")


def _p(answer: Any, a: list[float], b: list[float]) -> float:
    found = number(answer([*a], [*b]), "the p-value of two lists")
    if not 0 <= found <= 1:
        raise Wrong(f"A p-value lies between 0 and 1, but yours is {found:.3f}.")
    return found
