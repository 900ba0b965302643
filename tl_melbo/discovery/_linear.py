"""The derivative of the effect where no vector is added, as products with directions."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tl_melbo.discovery._protocol import EffectMap


def jacobian_times(f: EffectMap, effect: Callable[[Tensor], Tensor], directions: Tensor) -> Tensor:
    """J v for each direction v, with J the Jacobian of `effect` at zero, [vector, output].

    One forward-mode product a direction, in batches that fit in memory.
    """

    def of_batch(batch: Tensor) -> Tensor:
        # Not torch.func.jvp, in which a model's own modules cannot be frozen.
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.zeros_like(batch), batch)
            tangent = forward_ad.unpack_dual(effect(dual)).tangent
        return torch.zeros_like(effect(batch)) if tangent is None else tangent

    return torch.cat([of_batch(batch) for batch in directions.split(f.vectors_at_once())]).flatten(
        1
    )


def transpose_times(f: EffectMap, effect: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """J' w for each output w, [vector, output] -> [vector, d_model]: one backward product each."""
    parts = []
    for batch in outputs.split(f.vectors_at_once()):
        theta = outputs.new_zeros(len(batch), f.x.shape[-1]).requires_grad_()
        along = (effect(theta).flatten(1) * batch).sum()
        parts += torch.autograd.grad(along, theta)
    return torch.cat(parts)
