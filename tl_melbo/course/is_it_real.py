"""Checks of the notebook 02_is_it_real."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo.activation_map import ActivationMap
from tl_melbo.course._note import Note, Wrong, number, unfinished
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
        if _near((low, high), _wald(rate, n)):
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
    if not isinstance(answer, Tensor):
        raise Wrong(f"Expected a tensor, got {type(answer).__name__}.")
    answer = answer.detach().double().cpu()
    if answer.shape != (shows.d_model,):
        raise Wrong(f"Its shape is {tuple(answer.shape)}; expected ({shows.d_model},).")
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
    """Exercise 4: the share of a vector's square that is in the span of some others."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(d_model, generator=generator, dtype=torch.float64)
    rows = torch.randn(max(2, d_model // 8), d_model, generator=generator, dtype=torch.float64)
    rows[1] += 3 * rows[0]  # not orthogonal, and not of norm 1
    told = answer(vector, rows)
    if note := unfinished(told):
        return note
    told = number(told, "the share")
    basis = torch.linalg.qr(rows.T).Q
    expected = float((basis.T @ vector).square().sum() / vector.square().sum())
    units = torch.nn.functional.normalize(rows, dim=-1)
    mistakes = {
        "That is its root: a share of the norm, not of the square.": math.sqrt(expected),
        "These are squared cosines, added up. That is the share only if the rows are orthogonal; "
        "yours should work for others, too.": float(
            (units @ vector).square().sum() / vector.square().sum()
        ),
        "Rows that are not of norm 1 count more here. Make a basis of them first.": float(
            (rows @ vector).square().sum() / vector.square().sum()
        ),
        "That is the largest squared cosine with one row, not the share in their span.": float(
            ((units @ vector).square() / vector.square().sum()).max()
        ),
        "It is not divided by the vector's own square.": expected * float(vector.square().sum()),
    }
    if abs(told - expected) < 1e-4:
        return Note(
            f"Right. A random vector has on average {len(rows)}/{d_model} of its square in the "
            f"span of {len(rows)} others: hold every share against that."
        )
    for message, value in mistakes.items():
        if abs(told - value) < 1e-4 * max(1.0, abs(value)):
            raise Wrong(message)
    raise Wrong(f"For a test case it is {told:.4g}, which is another number.")


def _wald(rate: float, n: int) -> tuple[float, float]:
    half = _Z * math.sqrt(rate * (1 - rate) / n)
    return rate - half, rate + half


def _near(told: tuple[float, float], expected: tuple[float, float]) -> bool:
    return all(abs(one - other) < 2e-3 for one, other in zip(told, expected, strict=True))
