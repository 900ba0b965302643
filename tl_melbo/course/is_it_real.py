"""Checks of the notebook 02_is_it_real."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo.activation_map import ActivationMap
from tl_melbo.course._note import Note, Wrong, look_up, number, unfinished, vector
from tl_melbo.probability import wilson_interval

# 97.5% of a normal distribution lie below it.
_Z = 1.959963984540054
_COUNTS = ((0, 16), (3, 16), (11, 16), (24, 24), (120, 400))


def chosen(number: Any, table: pd.DataFrame) -> Note:
    """Exercise 1: the vector of the highest rate in the first set of samples."""
    if note := unfinished(number):
        return note
    steered = table[table["steering"] == "vector"].set_index("vector")
    if number not in steered.index:
        raise Wrong(f"{number!r} is none of the vectors {', '.join(map(str, steered.index))}.")
    if steered.loc[number, "rate"] < steered["rate"].max():
        raise Wrong(f"Vector {number} has not the highest rate of the table.")
    return Note(
        f"Right. But this rate, {steered.loc[number, 'rate']:.0%}, is not what to report: among "
        f"{len(steered)} rates the highest is high by luck, too."
    )


def wilson(interval: Callable[[int, int], Any]) -> Note:
    """Exercise 2 (9 of the course): Wilson's 95% interval of `hits` out of `n`."""
    for hits, n in _COUNTS:
        told = interval(hits, n)
        if note := unfinished(told):
            return note
        try:
            low, high = map(float, told)
        except (TypeError, ValueError):
            raise Wrong("Return two numbers: the lower and the upper end.") from None
        rate, case = hits / n, f"For {hits} of {n}"
        expected = wilson_interval(hits, n)
        if _near((low, high), expected):
            continue
        half = _Z * math.sqrt(rate * (1 - rate) / n)
        if _near((low, high), (rate - half, rate + half)):
            raise Wrong(
                f"{case}: the rate, plus and minus its standard error. That is the normal "
                "approximation: look at what it gives for 0 of 16."
            )
        if low > high:
            raise Wrong(f"{case}: the lower end, {low:.3f}, is above the upper one, {high:.3f}.")
        if low < -1e-9 or high > 1 + 1e-9:
            raise Wrong(f"{case}: from {low:.3f} to {high:.3f}. A rate is never outside 0 to 1.")
        if not low - 1e-9 <= rate <= high + 1e-9:
            raise Wrong(f"{case}: the rate itself is not within {low:.3f} to {high:.3f}.")
        size = "narrow" if high - low < expected[1] - expected[0] else "wide"
        raise Wrong(
            f"{case}: from {low:.3f} to {high:.3f}; too {size}, or shifted. What are z, and the "
            "centre of the interval?"
        )
    return Note("Right: it never leaves 0 to 1, and 0 of 16 does not mean never.")


def direction(answer: Any, shows: ActivationMap, shows_not: ActivationMap) -> Note:
    """Exercise 3 (10 of the course): difference of the mean residuals at the last tokens."""
    if note := unfinished(answer):
        return note
    answer = vector(answer, shows.d_model)
    here, there = (f.x[:, -1].double().cpu().mean(0) for f in (shows, shows_not))
    cosine = float(torch.cosine_similarity(answer, here - there, 0))
    if cosine > 0.999:
        return Note(f"Right. Its norm is {float(answer.norm()):.3g}.")
    if cosine < -0.999:
        raise Wrong("It points from the prompts that show the behaviour to those that do not.")
    for f, which in ((shows, "show the behaviour"), (shows_not, "do not")):
        if float(torch.cosine_similarity(answer, f.x[:, -1].double().cpu().mean(0), 0)) > 0.999:
            raise Wrong(f"That is the mean of the prompts that {which}. What have both in common?")
    everywhere = [
        (f.x * f.mask[..., None]).double().cpu().sum((0, 1)) / int(f.mask.sum())
        for f in (shows, shows_not)
    ]
    if float(torch.cosine_similarity(answer, everywhere[0] - everywhere[1], 0)) > 0.98:
        raise Wrong("All tokens are in it, and the template's. Take the last token of each prompt.")
    raise Wrong(f"Its cosine with the difference of the means is {cosine:.2f}.")


def share(answer: Callable[[Tensor, Tensor], Any], d_model: int) -> Note:
    """Exercise 4: the share of a vector's square in a span."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(d_model, generator=generator, dtype=torch.float64)
    rows = torch.randn(max(2, d_model // 8), d_model, generator=generator, dtype=torch.float64)
    rows[1] += 3 * rows[0]  # not orthogonal, and not of norm 1
    told = answer(theta, rows)
    if note := unfinished(told):
        return note
    told = number(told, "the share")
    basis = torch.linalg.qr(rows.T).Q
    whole = float(theta.square().sum())
    expected = float((basis.T @ theta).square().sum()) / whole
    squares = (torch.nn.functional.normalize(rows, dim=-1) @ theta).square() / whole
    mistakes = {
        "That is its root: a share of the norm, not of the square.": math.sqrt(expected),
        "These are squared cosines, added up: what two rows have in common counts twice. The rows "
        "need not be orthogonal.": float(squares.sum()),
        "Rows that are not of norm 1 count more here. Make a basis of them first.": float(
            (rows @ theta).square().sum() / whole
        ),
        "That is the largest squared cosine with one row, not the share in their span.": float(
            squares.max()
        ),
        "It is not divided by the vector's own square.": expected * whole,
    }
    if abs(told - expected) > 1e-4:
        look_up(mistakes, lambda value: abs(told - value) < 1e-4 * max(1.0, abs(value)))
        raise Wrong(f"For a test case it is {told:.4g}, which is another number, not the share.")
    for tried, wanted, what in (
        (7 * theta, expected, "the same vector, seven times as long,"),
        (rows.sum(0), 1.0, "a sum of the rows"),
    ):
        told = number(answer(tried, rows), "the share")
        if abs(told - wanted) > 1e-4:
            raise Wrong(f"For {what} the share should be {wanted:.3f}, but is {told:.3f}.")
    return Note(
        f"Right. A random vector has on average {len(rows)}/{d_model} of its square in the "
        f"span of {len(rows)} others: hold every share against that."
    )


def _near(told: tuple[float, float], expected: tuple[float, float]) -> bool:
    return all(abs(one - other) < 2e-3 for one, other in zip(told, expected, strict=True))
