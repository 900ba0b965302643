"""Gradients of what is measured of effects."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tl_melbo.discovery._arithmetic import own_arithmetic
from tl_melbo.discovery._protocol import EffectMap, effects_at, theta_like
from tl_melbo.memory import map_batches


class Evaluation(NamedTuple):
    """Values and gradients of a measure, float64 on the CPU; `broken` prompts are not finite."""

    value: Tensor
    gradient: Tensor
    broken: frozenset[int]


def value_and_gradient(
    f: EffectMap, measure: Callable[[Tensor], Tensor], positions: slice
) -> Callable[[Tensor], Evaluation]:
    """The function from vectors to a measure of their effects, and to its gradients.

    In batches that fit in memory: a batch that does not is halved, and so are those after it.

    Args:
        f: the activation map.
        measure: effects [vector, prompt, pos, d_model] -> one number each.
        positions: where effects count; they are zero elsewhere.
    """
    effects, fits = effects_at(f, positions), sys.maxsize

    def of_batch(batch: Tensor) -> Evaluation:
        with own_arithmetic(f):
            theta = batch.detach().clone().requires_grad_()
            effect = effects(theta)
            value = measure(effect)
            (gradient,) = torch.autograd.grad(value.sum(), theta)
        broken = frozenset()
        if not (value.isfinite().all() and gradient.isfinite().all()):
            rows = ~effect.detach().isfinite().flatten(2).all(-1).all(0)
            # Where no effect is, its size or its gradient is: of any prompt, for all we know.
            broken = frozenset((rows | ~rows.any()).nonzero().flatten().tolist())
        return Evaluation(value.detach().double().cpu(), gradient.double().cpu(), broken)

    def evaluate(theta: Tensor) -> Evaluation:
        nonlocal fits
        size = min(fits, f.vectors_at_once())
        parts, fits = map_batches(of_batch, theta_like(f, theta), size)
        if len(parts) == 1:
            return parts[0]
        values, gradients, broken = zip(*parts, strict=True)
        return Evaluation(torch.cat(values), torch.cat(gradients), frozenset().union(*broken))

    return evaluate
