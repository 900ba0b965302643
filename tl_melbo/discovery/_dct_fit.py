"""Fitting rank-one factors to the mean effect: the mathematics of `dct`."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tl_melbo.discovery import _map
from tl_melbo.discovery._jacobian import top_directions
from tl_melbo.discovery._map import EffectMap, OnShare, theta_like
from tl_melbo.errors import warn_user
from tl_melbo.geometry import numbered_sphere
from tl_melbo.memory import map_batches
from tl_melbo.story import measure

Order = Literal["linear", "quadratic", "exponential"]
Start = Literal["random", "jacobian"]
OnStep = Callable[[int, float], Any]
# Mean effects of vectors, [vector, d_model], and the gradients of their norms.
Images = tuple[Tensor, Tensor]

MEASURE = measure(
    "importance",
    "importance α",
    counts="steps",
    history="part of the objective (residual-stream units, squared)",
)
_SOFT_PASSES = 10
# The last step whose objective is this share of the highest is the best: what unmixes factors
# hardly raises it.
_NEAR = 0.999


class Factors(NamedTuple):
    """Directions v and u [factor, d_model], alpha, and the mean effects of R v."""

    inputs: Tensor
    outputs: Tensor
    importance: Tensor
    mean_effect: Tensor

    def ordered(self, history: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The inputs, float32, the most important first; their columns and history."""
        by_size = self.importance.argsort(descending=True)
        inputs, output, importance, mean_effect = (part[by_size].float() for part in self)
        columns = {"importance": importance, "effect": (output * mean_effect).sum(-1)}
        columns |= {"output": output, "mean_effect": mean_effect}
        return inputs, columns, history[by_size]


class Stage(NamedTuple):
    """A search after a step: all that it goes on from.

    The best factors so far, and where each v of theirs wants to go; where each v of the last step
    does; the parts of the objective, [factor, step].
    """

    factors: Factors
    towards: Tensor
    gradients: Tensor
    history: Tensor


class Fit:
    """What the factors are fitted to: the mean effect over prompts and positions.

    `unit` is from vectors to the nearest ones of the set that is searched: None for the sphere.
    """

    def __init__(
        self,
        f: EffectMap,
        positions: slice,
        radius: float,
        on_step: OnStep | None = None,
        on_share: OnShare | None = None,
        unit: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        effects, count = _map.effects_at(f, positions), int(f.position_mask(positions).sum())
        self.f, self.radius, self.on_share = f, radius, on_share
        self.tell, self.unit = on_step or (lambda *_: None), unit or _unit
        self.mean_effect = lambda theta: effects(theta).sum((1, 2)) / count
        self.of_rounding = _map.rounding(f, positions) / math.sqrt(count)
        self.fits = sys.maxsize

    def start(self, start: Start, count: int, seed: int) -> Tensor:
        """Unit vectors, [factor, d_model]."""
        d_model = int(self.f.x.shape[-1])
        if start == "jacobian":
            known, _ = self.linear_directions(min(count, d_model))
            return torch.cat([known, numbered_sphere(count - len(known), d_model, seed)])
        return numbered_sphere(count, d_model, seed)

    def linear_directions(self, count: int) -> tuple[Tensor, Tensor]:
        """The right singular vectors of the mean effect's Jacobian, and the values."""
        inputs, values = top_directions(self.f, self.mean_effect, count, self.on_share)
        is_none = float(values[0]) * self.radius <= self.of_rounding
        _map.refuse_no_effect(is_none, "to first order, every vector")
        return inputs, values

    def linear(self, count: int) -> tuple[Factors, Tensor]:
        """The singular vectors of the mean effect's Jacobian."""
        inputs, values = self.linear_directions(count)
        images = _map.jacobian_times(self.f, self.mean_effect, theta_like(self.f, inputs))
        outputs = _unit(images.double().cpu())
        importance = values * self.radius
        history = importance[:, None].square() / 2
        self.tell(1, float(history.sum()))
        return Factors(inputs, outputs, importance, self.mean_effects(inputs)), history

    def iterated(
        self, order: Order, start: Tensor, steps: int, soft: bool
    ) -> tuple[Factors, Tensor]:
        """The factors that so many steps find, and all steps' parts of the objective."""
        last = deque(self.stages(order, start, steps, soft), maxlen=1).pop()
        return self.finished(order, last, soft)

    def stages(
        self,
        order: Order,
        start: Tensor,
        steps: int,
        soft: bool,
        together: float = 2 / 3,
        stage: Stage | None = None,
    ) -> Iterator[Stage]:
        """Turn each v to where its own output's response grows; goes on after a stage.

        For the share `together` of the steps, the v are the nearest orthonormal ones. The best step
        of soft factors is a later one.
        """
        n_early = math.ceil(together * steps)
        if soft:  # the push has one step at least
            n_early = min(n_early, steps - 1)
        for step in range(0 if stage is None else stage.history.shape[1], steps):
            vectors, strengths = start, torch.ones(len(start), dtype=torch.float64)
            if stage is not None:
                vectors, strengths = self.unit(stage.gradients), stage.gradients.norm(dim=-1)
            # Sharing recovers more factors; in turn, at the end, unmixes those of a linear map.
            early = step < n_early
            spread = _together if early else self.soft if soft else _in_turn
            vectors = spread(vectors, strengths)
            if soft and early:  # more than there are dimensions are not of norm 1 yet
                vectors = self.unit(vectors)
            factors, part, gradients = self.fitted(order, vectors)
            objective = float(part.sum())
            if stage is None:
                self.refuse_no_effect(order, factors)
                stage = Stage(factors, gradients, gradients, part[:, None])
            elif not math.isfinite(objective):
                _warn_not_finite(f"step {step + 1} of {steps}")
                return
            else:
                # Near the highest, the later: a rotation of a linear map's factors changes nothing.
                rivals = stage.history[:, n_early if soft else 0 :].sum(0)
                is_best = not len(rivals) or objective >= float(rivals.max()) * _NEAR
                best = (factors, gradients) if is_best else stage[:2]
                stage = Stage(*best, gradients, torch.cat([stage.history, part[:, None]], 1))
            self.tell(step + 1, objective)
            yield stage
            if not math.isfinite(objective):
                return

    def finished(self, order: Order, stage: Stage, soft: bool) -> tuple[Factors, Tensor]:
        """The factors of the best step, and all steps' parts of the objective.

        Soft factors make one more step, which is taken whatever its objective, and is the last in
        the history.
        """
        factors, towards, _, history = stage
        if soft and history[:, 0].isfinite().all():
            # Pushing apart biases each a little; where it wants to go is the factor.
            polished, part, _ = self.fitted(order, self.unit(towards))
            if part.isfinite().all():
                factors, history = polished, torch.cat([history, part[:, None]], 1)
                self.tell(history.shape[1], float(part.sum()))
            else:
                _warn_not_finite("the last step")
        if order != "exponential":
            factors = factors._replace(mean_effect=self.mean_effects(factors.inputs))
        return factors, history

    def soft(self, vectors: Tensor, strengths: Tensor) -> Tensor:
        """Push vectors away from strong ones that they resemble."""
        if len(vectors) == 1:  # it would be taken from itself
            return vectors
        for _ in range(_SOFT_PASSES):
            shares = torch.softmax(vectors @ vectors.T + strengths.log(), dim=-1)
            vectors = self.unit(vectors - shares @ vectors)
        return vectors

    def fitted(self, order: Order, vectors: Tensor) -> tuple[Factors, Tensor, Tensor]:
        """The factors with these v, their parts of the objective, and where each v wants to go."""
        moments = self.first_order if order == "exponential" else self.second_order
        with _map.own_arithmetic(self.f):
            effects, gradients = moments(vectors)
        outputs = _unit(effects)
        alpha, response = _weights(order, vectors, outputs, effects)
        return Factors(vectors, outputs, alpha, effects), alpha * response / 2, gradients

    def refuse_no_effect(self, order: Order, factors: Factors) -> None:
        is_none = (factors.mean_effect.norm(dim=-1) <= self.of_rounding).all()
        if order == "exponential":
            _map.refuse_no_effect(is_none, "every vector")
        advice = 'use a larger radius, or order="exponential" if the map has no second derivative'
        _map.refuse_no_effect(is_none, "to second order, every vector", advice)

    def mean_effects(self, vectors: Tensor) -> Tensor:
        """Delta(R v)."""
        theta = theta_like(self.f, vectors) * self.radius
        with torch.no_grad():
            parts, _ = map_batches(self.mean_effect, theta, self.f.vectors_at_once(False))
        return torch.cat(parts).double().cpu()

    def first_order(self, vectors: Tensor) -> Images:
        """Delta(R v), and the gradient of its norm: J(R v)' u."""

        def of_batch(batch: Tensor) -> Images:
            theta = (batch * self.radius).requires_grad_()
            effects = self.mean_effect(theta)
            gradients = _grad(effects.double().norm(dim=-1).sum(), theta)
            return effects.detach().double().cpu(), gradients.double().cpu()

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
            once = _grad((effects * w).sum(), theta, create_graph=True)
            twice = _grad((once * batch).sum(), theta, create_graph=True)
            curvature = _grad((twice * batch).sum(), w, retain_graph=True)
            along = (effects * _unit(curvature.detach())).sum()
            slope = _grad(along, theta, create_graph=True)
            gradients = _grad((slope * batch).sum(), theta)
            weight = self.radius**2 / 2
            return weight * curvature.double().cpu(), gradients.double().cpu()

        return self.in_batches(of_batch, vectors, 3)

    def in_batches(
        self, of_batch: Callable[[Tensor], Images], vectors: Tensor, cost: int
    ) -> Images:
        size = min(self.fits, max(1, self.f.vectors_at_once() // cost))
        parts, self.fits = map_batches(of_batch, theta_like(self.f, vectors), size)
        effects, gradients = zip(*parts, strict=True)
        return torch.cat(effects), torch.cat(gradients)


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
    spread[order] = (q * torch.where(r.diagonal() < 0, -1, 1)).T
    return spread


def _warn_not_finite(step: str) -> None:
    warn_user(
        f"{step}: the effect or its derivative is not finite; the search ends with the best step "
        "before it. Use a smaller radius"
    )


def _grad(value: Tensor, of: Tensor, **how: Any) -> Tensor:
    """The gradient; zero where the value does not depend on `of`, as in an affine map."""
    if not value.requires_grad:
        return torch.zeros_like(of)
    return torch.autograd.grad(value, of, materialize_grads=True, **how)[0]


def _unit(vectors: Tensor) -> Tensor:
    """Of norm 1; zero stays zero."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms == 0, vectors, vectors / norms)
