"""The map that a method searches: its effects, their gradients, products with its Jacobian."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tl_melbo.memory import map_batches
from tl_melbo.shapes import shape_checked

# Rounding moves an effect by at most so many times the type's precision times the residual stream.
_ROUNDING = 32


@runtime_checkable
class EffectMap(Protocol):
    """A differentiable map from vectors to their effects; `ActivationMap` is one.

    `delta` takes vectors and, optionally, `positions`, outside which effects are zero. The map may
    have `resolution(positions)`, a bound on the norm of an effect that is rounding alone, and
    `gram(positions, mean=..., on_share=...)`, a faster way to J'J: see `ActivationMap.gram`.
    """

    @property
    def x(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def delta(self) -> Callable[..., Tensor]: ...
    def position_mask(self, positions: slice) -> Tensor: ...
    def vectors_at_once(self, with_gradient: bool = True) -> int: ...
    def story(self) -> dict[str, Any]: ...


OnShare = Callable[[float], None]
Effects = Callable[[Tensor], Tensor]
# To the values and gradients of a measure, float64 on the CPU.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


@contextmanager
def own_arithmetic(f: EffectMap) -> Iterator[None]:
    """With gradients, and in the map's own types, whatever the caller has switched on or off."""
    device = f.x.device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        yield


def effects_at(f: EffectMap, positions: slice) -> Effects:
    """The function from vectors to their effects at some positions, and zeros at all others."""
    if "positions" in inspect.signature(f.delta).parameters:
        return functools.partial(f.delta, positions=positions)
    counted = f.position_mask(positions)[:, :, None]
    return lambda theta: f.delta(theta) * counted


def rounding(f: EffectMap, positions: slice) -> float:
    """A bound on the norm of an effect, over all these positions, that is rounding alone."""
    resolution = getattr(f, "resolution", None)
    if resolution is not None:
        return float(resolution(positions))
    x = f.x[f.position_mask(positions)].double()
    return _ROUNDING * torch.finfo(f.x.dtype).eps * float(x.norm())


def refuse_no_effect(
    has_none: bool | Tensor, which: str, advice: str = "use a larger radius"
) -> None:
    """Raise where rounding alone explains the effects of `which` vectors."""
    if has_none:
        raise ValueError(
            f"radius: {which} of this norm changes nothing at the positions that count, as far as "
            f"the model's type can tell; {advice}"
        )


def theta_like(f: EffectMap, theta: Tensor) -> Tensor:
    """Vectors on the map's device, and in float32 at least."""
    return theta.to(f.x.device, torch.promote_types(f.x.dtype, torch.float32))


@shape_checked
def value_and_gradient(
    f: EffectMap, measure: Callable[[Tensor], Tensor], positions: slice
) -> Evaluate:
    """From vectors to a measure of their effects at some positions, and its gradients.

    `measure` is from effects, [vector, prompt, pos, d_model], to one number each.
    """
    effects, fits = effects_at(f, positions), sys.maxsize

    def of_batch(batch: Tensor) -> tuple[Tensor, Tensor]:
        with own_arithmetic(f):
            theta = batch.detach().clone().requires_grad_()
            value = measure(effects(theta))
            (gradient,) = torch.autograd.grad(value.sum(), theta)
        return value.detach().double().cpu(), gradient.double().cpu()

    def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal fits
        parts, fits = map_batches(of_batch, theta_like(f, theta), min(fits, f.vectors_at_once()))
        values, gradients = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(gradients)

    return evaluate


def jacobian_times(
    f: EffectMap, effect: Effects, directions: Tensor, on_share: OnShare | None = None
) -> Tensor:
    """J v for each direction v, with J the Jacobian of `effect` at zero, [vector, output].

    `on_share` is called with the share of the directions that is done.
    """

    def of_batch(batch: Tensor) -> Tensor:
        # Not torch.func.jvp, in which a model's own modules cannot be frozen.
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.zeros_like(batch), batch)
            value, tangent = forward_ad.unpack_dual(effect(dual))
        return (torch.zeros_like(value) if tangent is None else tangent).flatten(1)

    return torch.cat(map_batches(of_batch, directions, f.vectors_at_once(), on_share)[0])


def gram(
    f: EffectMap,
    effect: Effects,
    positions: slice,
    *,
    mean: bool = False,
    on_share: OnShare | None = None,
) -> Tensor:
    """J'J of `effect` at zero, float64 on the CPU: by the map's own `gram` where it has one.

    `effect` is that at these positions, or with `mean` its mean over each prompt's.
    """
    own = getattr(f, "gram", None)
    with own_arithmetic(f):
        if own is not None:
            return own(positions, mean=mean, on_share=on_share)
        return gram_of(f, effect, on_share)


def gram_of(f: EffectMap, effect: Effects, on_share: OnShare | None = None) -> Tensor:
    """J'J of any effect at zero, float64 on the CPU."""
    axes = torch.eye(int(f.x.shape[-1]), dtype=torch.float32)
    images = jacobian_times(f, effect, theta_like(f, axes), on_share).double().cpu()
    return images @ images.T  # one row an axis of theta


def transpose_times(f: EffectMap, effect: Effects, outputs: Tensor) -> Tensor:
    """J' w for each output w, [vector, output] -> [vector, d_model]."""

    def of_batch(batch: Tensor) -> Tensor:
        theta = batch.new_zeros(len(batch), f.x.shape[-1]).requires_grad_()
        return torch.autograd.grad((effect(theta).flatten(1) * batch).sum(), theta)[0]

    return torch.cat(map_batches(of_batch, outputs, f.vectors_at_once())[0])
