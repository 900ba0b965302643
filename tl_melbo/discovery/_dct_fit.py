"""Fitting rank-one factors to the mean effect: the mathematics of `dct`.

Source: Mack & Turner 2024, "Deep causal transcoding: a framework for mechanistically eliciting
latent behaviors in language models".
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from tl_melbo.discovery._jacobian import top_directions
from tl_melbo.discovery._map import EffectMap, effects_at, jacobian_times, theta_like
from tl_melbo.geometry import numbered_sphere
from tl_melbo.memory import map_batches

Order = Literal["linear", "quadratic", "exponential"]
Start = Literal["random", "jacobian"]
OnStep = Callable[[int, float], None]

_SOFT_PASSES = 10
# A step whose objective is below this share of the highest is not taken.
_WORSE = 0.999


class Factors(NamedTuple):
    """Directions at the source [factor, d_model], at the target, and how much each matters."""

    inputs: Tensor
    outputs: Tensor
    importance: Tensor
    effect: Tensor


class Images(NamedTuple):
    """Mean effects of vectors, [vector, d_model], and the gradients of their norms."""

    effects: Tensor
    gradients: Tensor


class Fit:
    """What the factors are fitted to: the mean effect over prompts and positions."""

    def __init__(
        self, f: EffectMap, positions: slice, radius: float, on_step: OnStep | None = None
    ) -> None:
        effects, count = effects_at(f, positions), int(f.position_mask(positions).sum())
        self.f, self.radius, self.on_step = f, radius, on_step
        self.mean_effect = lambda theta: effects(theta).sum((1, 2)) / count

    def start(self, start: Start, count: int, seed: int) -> Tensor:
        """Unit vectors, [factor, d_model]."""
        d_model = int(self.f.x.shape[-1])
        if start == "jacobian":
            known, _ = top_directions(self.f, self.mean_effect, min(count, d_model))
            return torch.cat([known, numbered_sphere(count - len(known), d_model, seed)])
        return numbered_sphere(count, d_model, seed)

    def linear(self, count: int) -> tuple[Factors, Tensor]:
        """The singular vectors of the mean effect's Jacobian."""
        inputs, values = top_directions(self.f, self.mean_effect, count)
        images = jacobian_times(self.f, self.mean_effect, theta_like(self.f, inputs))
        outputs = _unit(images.double().cpu())
        importance = values * self.radius
        effect = (outputs * self.first_order(inputs).effects).sum(-1)
        return Factors(inputs, outputs, importance, effect), importance[:, None].square() / 2

    def iterated(
        self, order: Order, vectors: Tensor, steps: int, soft: bool
    ) -> tuple[Factors, Tensor]:
        """Turn each v to where its own output's response grows; the best step's factors."""
        moments = self.first_order if order == "exponential" else self.second_order
        best, highest, parts = None, -math.inf, []
        strengths = torch.ones(len(vectors), dtype=torch.float64)
        for step in range(steps):
            # Sharing recovers more factors; in turn, at the end, unmixes those of a linear map.
            spread = _soft if soft else _together if 3 * step < 2 * steps else _in_turn
            vectors = spread(vectors, strengths)
            images = moments(vectors)
            outputs = _unit(images.effects)
            alpha, response = _weights(order, vectors, outputs, images.effects)
            parts.append(alpha * response / 2)
            objective = float(parts[-1].sum())
            if self.on_step is not None:
                self.on_step(step + 1, objective)
            if not objective < highest * _WORSE:
                best = vectors, outputs, alpha, images.gradients
            highest = max(highest, objective)
            strengths = images.gradients.norm(dim=-1)
            vectors = _unit(images.gradients)
        vectors, outputs, alpha, gradients = cast(tuple[Tensor, ...], best)
        if soft:
            # Pushing apart biases each a little; where it wants to go is the factor.
            vectors = _unit(gradients)
            images = moments(vectors)
            outputs = _unit(images.effects)
            alpha, _ = _weights(order, vectors, outputs, images.effects)
        effect = (outputs * self.first_order(vectors).effects).sum(-1)
        return Factors(vectors, outputs, alpha, effect), torch.stack(parts, 1)

    def first_order(self, vectors: Tensor) -> Images:
        """Delta(R v), and the gradient of its norm: J(R v)' u."""

        def of_batch(batch: Tensor) -> Images:
            theta = (batch * self.radius).requires_grad_()
            effects = self.mean_effect(theta)
            (gradients,) = torch.autograd.grad(effects.norm(dim=-1).sum(), theta)
            return Images(effects.detach().double().cpu(), gradients.double().cpu())

        return self.in_batches(of_batch, vectors, 1)

    def second_order(self, vectors: Tensor) -> Images:
        """R²/2 T2(., v, v) and T2(u, v, .), from the second derivative at zero."""

        # Reverse mode throughout: with torch 2.13, dual numbers in the second backward pass of
        # LayerNorm came out wrong by a fifth.
        def of_batch(batch: Tensor) -> Images:
            theta = torch.zeros_like(batch).requires_grad_()
            effects = self.mean_effect(theta)
            # <w, d²/dt² Delta(t v)> is linear in w: its gradient there is T2(., v, v).
            w = torch.zeros_like(effects).requires_grad_()
            (once,) = torch.autograd.grad((effects * w).sum(), theta, create_graph=True)
            (twice,) = torch.autograd.grad((once * batch).sum(), theta, create_graph=True)
            (curvature,) = torch.autograd.grad((twice * batch).sum(), w, retain_graph=True)
            along = (effects * _unit(curvature.detach())).sum()
            (slope,) = torch.autograd.grad(along, theta, create_graph=True)
            (gradients,) = torch.autograd.grad((slope * batch).sum(), theta)
            weight = self.radius**2 / 2
            return Images(weight * curvature.double().cpu(), gradients.double().cpu())

        return self.in_batches(of_batch, vectors, 3)

    def in_batches(
        self, of_batch: Callable[[Tensor], Images], vectors: Tensor, cost: int
    ) -> Images:
        size = max(1, self.f.vectors_at_once() // cost)
        parts, _ = map_batches(of_batch, theta_like(self.f, vectors), size)
        effects, gradients = zip(*parts, strict=True)
        return Images(torch.cat(effects), torch.cat(gradients))


def _weights(
    order: Order, vectors: Tensor, outputs: Tensor, effects: Tensor
) -> tuple[Tensor, Tensor]:
    """Alpha, which solves the normal equations, and each factor's own response."""
    overlap = vectors @ vectors.T
    overlap = overlap.expm1() if order == "exponential" else overlap.square()
    response = (outputs * effects).sum(-1)
    kernel = (outputs @ outputs.T) * overlap
    if not (kernel.isfinite().all() and response.isfinite().all()):
        return torch.full_like(response, torch.nan), response
    # Two equal factors make it singular: they share the weight.
    return torch.linalg.pinv(kernel, hermitian=True, rtol=1e-10) @ response, response


def _together(vectors: Tensor, strengths: Tensor) -> Tensor:
    """The nearest orthonormal vectors. QR would turn some around, and the effect is not odd."""
    if not vectors.isfinite().all():
        return vectors
    left, _, right = torch.linalg.svd(vectors, full_matrices=False)
    return left @ right


def _in_turn(vectors: Tensor, strengths: Tensor) -> Tensor:
    """Orthonormal vectors, the weaker giving way to the stronger; none is turned around."""
    order = strengths.argsort(descending=True)
    q, r = torch.linalg.qr(vectors[order].T)
    spread = torch.empty_like(vectors)
    spread[order] = (q * r.diagonal().sign()).T
    return spread


def _soft(vectors: Tensor, strengths: Tensor) -> Tensor:
    """Push vectors away from strong ones that they resemble."""
    for _ in range(_SOFT_PASSES):
        shares = torch.softmax(vectors @ vectors.T + strengths.log(), dim=-1)
        vectors = _unit(vectors - shares @ vectors)
    return vectors


def _unit(vectors: Tensor) -> Tensor:
    """Of norm 1; zero stays zero."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms == 0, vectors, vectors / norms)
