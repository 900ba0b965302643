"""MELBO: vectors at an early layer that change a later layer as much as possible.

Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_melbo.concatenation import pad_histories
from tl_melbo.discovery._calibration import DEFAULT_CRITERION, DEFAULT_LEVELS, calibrate_radius
from tl_melbo.discovery._protocol import EffectMap, effect_at, own_arithmetic
from tl_melbo.errors import place, told, warn_user
from tl_melbo.geometry import complement, extended, normalise, random_sphere, tangent
from tl_melbo.memory import map_batches
from tl_melbo.shapes import Delta, Theta, shape_checked
from tl_melbo.story import make as make_story
from tl_melbo.vectors import SteeringVectors

Norm = Literal["l2", "lp"]
Optimiser = Literal["ascent", "adamw"]
Radius = float | Literal["auto"]

DEFAULT_STEPS = {"ascent": 10, "adamw": 300}
_LARGEST_COSINE = 1e-5
# Above this share of the objective, one position drowns all others.
_DOMINATED = 0.9
# A vector is done when the direction of steepest ascent is within this angle (radians) of it.
_CONVERGED_ANGLE = 0.02
# No single step of the ascent turns a vector by more than this angle (radians).
_LARGEST_ANGLE = 1.4
# How fast a step that had to be shortened grows back, with each step that climbs.
_RECOVERY = 1.5
# Independent vectors that are searched together; a search is taken up again after a group.
_GROUP = 32
# Starts are drawn one after another, so that this many take seconds.
_MOST_VECTORS = 100_000
# A search whose first so many starts all fail is given up.
_MOST_LOST = 3


class Step(NamedTuple):
    """What a search reports after each step."""

    first_vector: int
    n_at_once: int
    step: int
    n_steps: int
    objective: Float[Tensor, "vector"]


OnStep = Callable[[Step], None]


@shape_checked
def melbo_objective(
    delta: Delta, p: float = 2, q: float | None = None, norm: Norm = "l2"
) -> Float[Tensor, "vector"]:
    """Size of each vector's effect: sum over prompts of (sum over pos of ||delta||^p)^(1/q).

    Args:
        delta: effects; positions that are not to count hold zeros.
        p: power of the norm, at least 1. Published: 2 and 4.
        q: root of each prompt's sum, at least 1; None takes p. Published: p and 1.
        norm: over d_model, "l2" (the original post) or "lp", the p-norm (a textbook chapter).
            They agree at p = 2.

    Returns:
        One number a vector, in the dtype of delta.

    Raises:
        ValueError: p or q is below 1 or not finite.

    Source: Mack & Turner 2024. Their code takes the norm of a [1, pos, d_model] tensor over
    dim=1, which is positions; that slip is not copied.
    """
    _check_powers(p, q)
    q = p if q is None else q
    if norm == "l2":
        squares = delta.square().sum(-1)
        powers = squares if p == 2 else _safe_power(squares, p / 2)
    else:
        powers = _safe_power(delta.abs(), p).sum(-1)
    return _safe_power(powers.sum(-1), 1 / q).sum(-1)


def _check_powers(p: float, q: float | None) -> None:
    for name, value in (("p", p), ("q", p if q is None else q)):
        if not (1 <= value < math.inf):
            raise ValueError(
                f"{name}={value}: allowed are finite numbers from 1; published are p = 2 or 4, "
                "and q = p or 1"
            )


def check_settings(
    n_vectors: int,
    radius: Radius,
    p: float,
    q: float | None,
    steps: int | None,
    seed: int,
    typical_norm: float | None = None,
) -> None:
    """Check what can be checked of a search without a model, so before one is loaded.

    The arguments are those of `melbo`, and the typical norm of a residual at the source layer, for
    the error to name.

    Raises:
        ValueError: a number is out of its range.
    """
    if radius != "auto" and not 0 < radius < math.inf:
        here = "" if typical_norm is None else f" (that of a token here is {typical_norm:.3g})"
        raise ValueError(
            f"radius={radius}: must be a positive finite number, or 'auto'; useful ones were 0.05 "
            f"to 0.4 of a token's norm at the source layer{here}; try 'auto', and read the texts"
        )
    if not 1 <= n_vectors <= _MOST_VECTORS:
        raise ValueError(f"n_vectors={n_vectors}: must be from 1 to {_MOST_VECTORS:,}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: from 0 to 2**63 - 1")
    _check_powers(p, q)


def _safe_power(base: Tensor, exponent: float) -> Tensor:
    """Base ** exponent for base >= 0, with gradient 0 instead of NaN where base is 0."""
    if exponent >= 1:
        return base**exponent
    zero = base == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, base) ** exponent)


@shape_checked
def melbo(
    f: EffectMap,
    n_vectors: int = 32,
    radius: Radius = 12.0,
    p: float = 2,
    q: float | None = None,
    positions: slice = slice(-3, None),
    orthogonal: bool = True,
    seed: int = 0,
    optimiser: Optimiser = "ascent",
    steps: int | None = None,
    *,
    norm: Norm = "l2",
    progress: bool = False,
    on_step: OnStep | None = None,
) -> SteeringVectors:
    """Find vectors of a given length that change the target layer as much as possible.

    Args:
        f: the activation map, see `ActivationMap.from_prompts`.
        n_vectors: how many; at most d_model if orthogonal.
        radius: their L2 norm, in the units of the residual stream. The critical choice: too small
            changes nothing, too large gives gibberish. "auto" takes `calibrate_radius`, which
            costs some seconds.
        p: power of the norm in `melbo_objective`.
        q: root of each prompt's sum in `melbo_objective`; None takes p.
        positions: where the effect is measured, counted on each prompt's own tokens. The default
            is the last three, where the next tokens are made. With all positions the first token
            takes over in most models: its residual is hundreds of times longer than the others',
            and every vector ends up rescaling it (a warning says so).
        orthogonal: find them one after another, each orthogonal to all before it; the order is
            that of the search: vector k is what climbs highest in what vectors 0 to k-1 leave.
            Otherwise optimise all at once, each from its own start; several may then coincide.
        seed: of the random starts, which are uniform on the sphere. Start k depends on the
            seed and k alone.
        optimiser: "ascent", fast, its objective never falls; or "adamw", as published.
        steps: gradient evaluations for each vector at most, the start's included ("ascent",
            10 by default), or gradient steps ("adamw", 300 by default).
        norm: over d_model, "l2" or "lp".
        progress: show a progress bar.
        on_step: called after every step of the search.

    Returns:
        The vectors in the order above, each with its objective and how many gradients it took;
        `history[:, i]` is the objective after i steps, and `story` tells everything set here.

    Raises:
        ValueError: a number out of its range, more orthogonal vectors than d_model, positions
            that some prompt does not have, a radius too small to have any effect.
        FloatingPointError: the objective or its gradient is not finite for any vector.

    Warns:
        UserWarning: one position makes nearly all of the objective; or some vectors were lost to
            numbers that are not finite.

    Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
    """
    search = _Search(
        f, radius, p, q, positions, norm, optimiser, steps, n_vectors, orthogonal, seed, None
    )
    with tqdm(total=n_vectors, desc="MELBO", unit="vector", disable=not progress) as bar:
        parts = []
        for part in search.parts(on_step):
            parts.append(part)
            bar.update(len(part))
    _warn_if_dominated(search, parts[0].vectors[:1])
    return join_library(parts)


@shape_checked
def iter_melbo(
    f: EffectMap,
    n_vectors: int = 32,
    radius: Radius = 12.0,
    p: float = 2,
    q: float | None = None,
    positions: slice = slice(-3, None),
    orthogonal: bool = True,
    seed: int = 0,
    optimiser: Optimiser = "ascent",
    steps: int | None = None,
    *,
    norm: Norm = "l2",
    previous: SteeringVectors | None = None,
    on_step: OnStep | None = None,
) -> Iterator[SteeringVectors]:
    """Yield the vectors of `melbo` as they are found, so that each can be kept as it comes.

        parts = []
        for part in tm.iter_melbo(f, 32, radius=12.0):
            parts.append(part)
            tm.join_library(parts).save("vectors.safetensors")

    One by one if orthogonal, else 32 at a time. `tm.Run` does that for a folder. The arguments are
    those of `melbo`; with `previous`, vectors 0 to k-1 of the same search, whole, the search goes
    on at vector k, and finds what it would have found without a break (`n_vectors` counts from
    there).

    Raises:
        ValueError, FloatingPointError: as `melbo`; and where `previous` is of another search.
            Arguments are checked at the call, not at the first vector.
    """
    search = _Search(
        f, radius, p, q, positions, norm, optimiser, steps, n_vectors, orthogonal, seed, previous
    )

    def parts() -> Iterator[SteeringVectors]:
        for number, part in enumerate(search.parts(on_step)):
            if number == 0:
                _warn_if_dominated(search, part.vectors[:1])
            yield part

    return parts()


@shape_checked
def join_library(parts: Sequence[SteeringVectors]) -> SteeringVectors:
    """Join consecutive parts of one MELBO search; every vector keeps its number.

    Args:
        parts: what `iter_melbo` yields, in order; the first may be what was kept before.

    Returns:
        One library with the story of the first part, and the number of vectors of the last.

    Raises:
        ValueError: none given; or something that is not the next part of the same search.
    """
    if not parts:
        raise ValueError("parts: none given; pass at least one")
    first, last = parts[0], -1
    for number, part in enumerate(parts):
        differing = _differing(part.story, first.story)
        if differing:
            raise ValueError(
                f"parts[{number}]: differs in {', '.join(differing)}; pass parts of one search, or "
                "join others with concatenate"
            )
        indices = part.columns["index"].tolist()
        if indices != sorted(set(indices)) or (indices and indices[0] <= last):
            raise ValueError(
                f"parts[{number}]: holds vectors {indices[:3]}... after vector {last}; pass the "
                "parts in their order, and none twice"
            )
        last = indices[-1] if indices else last
    chosen = {**first.story["hyperparameters"]}
    chosen["n_vectors"] = parts[-1].story["hyperparameters"]["n_vectors"]
    return SteeringVectors(
        torch.cat([part.vectors for part in parts]),
        {**first.story, "hyperparameters": chosen},
        {name: torch.cat([part.columns[name] for part in parts]) for name in first.columns},
        pad_histories([part.history for part in parts], [len(part) for part in parts]),
    )


# What two parts of one search have in common.
_FACTS = (
    "method", "model", "weights", "prompts", "chat", "dtype", "precision", "n_hooks",
    "source_layer", "target_layer", "seed",
)  # fmt: skip


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What tells two searches apart, but for how many vectors they were to find."""
    # Stories of earlier versions do not tell all of that.
    pairs = {fact: (ours[fact], theirs[fact]) for fact in _FACTS if fact in ours and fact in theirs}
    chosen = [story.get("hyperparameters") or {} for story in (ours, theirs)]
    for name in dict.fromkeys((*chosen[0], *chosen[1])):
        if name != "n_vectors":
            pairs[name] = chosen[0].get(name), chosen[1].get(name)
    return [
        f"{name}={one!r} (here {other!r})" for name, (one, other) in pairs.items() if one != other
    ]


@dataclass(frozen=True)
class _Result:
    theta: Float[Tensor, "vector d_model"]
    objective: Float[Tensor, "vector"]
    evaluations: Float[Tensor, "vector"]
    history: Float[Tensor, "vector step"]


class _Search:
    """The checked arguments of one call of `melbo`, and the loop over its vectors."""

    def __init__(
        self,
        f: EffectMap,
        radius: Radius,
        p: float,
        q: float | None,
        positions: slice,
        norm: Norm,
        optimiser: Optimiser,
        steps: int | None,
        n_vectors: int,
        orthogonal: bool,
        seed: int,
        previous: SteeringVectors | None,
    ) -> None:
        self.d_model = int(f.x.shape[-1])
        self.steps = DEFAULT_STEPS[optimiser] if steps is None else steps
        typical = float(f.x.float().norm(dim=-1)[f.mask].median())
        # A search that is continued may have no vector left to find.
        wanted = n_vectors if previous is None or n_vectors < 0 else 1
        check_settings(wanted, radius, p, q, self.steps, seed, typical)
        calibrated = radius == "auto"
        calibration = {"criterion": DEFAULT_CRITERION, "level": DEFAULT_LEVELS[DEFAULT_CRITERION]}
        known = 0 if previous is None else len(previous)
        if orthogonal and known + n_vectors > self.d_model:
            raise ValueError(
                f"n_vectors={n_vectors}: at most d_model={self.d_model} vectors can be orthogonal "
                f"to each other{f', and {known} are there already' if known else ''}; ask for "
                "fewer, or pass orthogonal=False"
            )
        counted = f.position_mask(positions)
        # The slow check last.
        if not isinstance(radius, int | float):
            radius = _radius_of(previous, calibration) or calibrate_radius(f, positions=positions)
        self.f, self.radius, self.p, self.q = f, radius, p, q
        self.norm: Norm = norm
        self.positions, self.counted = positions, counted
        self.climb = _ascent if optimiser == "ascent" else _adamw
        self.n_vectors, self.orthogonal, self.seed = n_vectors, orthogonal, seed

        self.optimiser, self.lost = optimiser, []
        # Prompts in which something was not finite: in the last evaluation, and for lost vectors.
        self.seen_broken: set[int] = set()
        self.broken_prompts: set[int] = set()
        self.fitting = sys.maxsize  # how many vectors at once have fitted in memory
        self.story = make_story(
            "melbo",
            **f.story(),
            seed=seed,
            **({"calibration": calibration} if calibrated else {}),
            hyperparameters={
                "n_vectors": n_vectors,
                "radius": radius,
                "p": p,
                "q": p if q is None else q,
                "norm": norm,
                "positions": [
                    None if part is None else int(part)
                    for part in (positions.start, positions.stop, positions.step)
                ],
                "orthogonal": orthogonal,
                "optimiser": optimiser,
                "steps": self.steps,
            },
        )
        self.earlier, self.first = torch.empty(0, self.d_model, dtype=torch.float32), 0
        if previous is not None and len(previous):
            self._continue(previous)

    def _continue(self, previous: SteeringVectors) -> None:
        differing = _differing(previous.story, self.story)
        indices = previous.columns["index"].tolist()
        width = previous.vectors.shape[1]
        why = ""
        if differing:
            why = f"found with {', '.join(differing)}"
        elif width != self.d_model:
            why = f"{width} wide, where the residual stream is {self.d_model} wide"
        elif indices != sorted(set(indices)) or indices[-1] >= _MOST_VECTORS:
            why = "not in their order"
        elif not {"objective", "evaluations"} <= {*previous.columns}:
            why = "without the columns objective and evaluations"
        elif self.orthogonal and not _nearly_orthogonal(previous.vectors):
            why = "not orthogonal to each other"
        if why:
            raise ValueError(
                f"previous: {why}; continue with the arguments that it was found with, or begin "
                "anew without it"
            )
        self.earlier, self.first = previous.vectors, indices[-1] + 1
        self.story["hyperparameters"]["n_vectors"] = self.first + self.n_vectors

    def parts(self, on_step: OnStep | None) -> Iterator[SteeringVectors]:
        """What is found, in order: one vector at a time if orthogonal, else a group."""
        found, n_told = len(self.earlier), 0
        for first, result in self.run(on_step):
            finite = result.objective.isfinite() & result.theta.isfinite().all(-1)
            self.lost += (first + (~finite).nonzero().flatten()).tolist()
            found += int(finite.sum())
            if found and self.lost[n_told:]:
                warn_user(
                    f"vectors {told(self.lost[n_told:])}: {self.not_finite()}; they are left out. "
                    "Use a smaller radius or p, or a model in a wider type, such as "
                    "dtype=torch.float32"
                )
                n_told = len(self.lost)
            if finite.any():
                columns = {
                    "index": first + finite.nonzero().flatten(),
                    "objective": result.objective[finite],
                    "evaluations": result.evaluations[finite],
                }
                yield SteeringVectors(
                    result.theta[finite], self.story, columns, result.history[finite]
                )
            elif not found and len(self.lost) >= _MOST_LOST:
                break
        if self.n_vectors and not found:
            raise FloatingPointError(
                f"vectors {told(self.lost)}: {self.not_finite()}; use a smaller radius, a smaller "
                "p, or a model in a wider type, such as dtype=torch.float32"
            )

    def not_finite(self) -> str:
        """What was not finite, and where."""
        where = place(self.story, sorted(self.broken_prompts))
        return f"the effect on {where}, its size or its gradient is not finite under them"

    def lose(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Which rows of the last evaluation have no finite objective or gradient.

        That costs their vector, not the search.
        """
        lost = ~(value.isfinite() & gradient.isfinite().all(-1))
        if lost.any():
            self.broken_prompts |= self.seen_broken
        return lost

    def run(self, on_step: OnStep | None) -> Iterator[tuple[int, "_Result"]]:
        """The number of each result's first vector, and the result; NaN where a start failed."""
        generator = torch.Generator().manual_seed(self.seed)
        last = self.first + self.n_vectors
        if not self.n_vectors:
            return
        # Drawn one by one, so that start k does not depend on how many are drawn.
        starts = torch.cat(
            [random_sphere(1, self.d_model, generator=generator) for _ in range(last)]
        ).double()
        # In float64: after hundreds of float32 projections the cosines would show.
        basis = torch.empty(0, self.d_model, dtype=torch.float64)
        if not self.orthogonal:
            for first in range(self.first, last, _GROUP):
                group = starts[first : min(first + _GROUP, last)]
                yield first, self.climb(self, group, basis, first, on_step)
            return
        for vector in self.earlier:
            basis = extended(basis, vector)
        for k in range(self.first, last):
            result = self.climb(self, starts[k : k + 1], basis, k, on_step)
            if result.objective.isfinite().all():
                # The float32 vector that is handed out is what the next ones are orthogonal to.
                basis = extended(basis, result.theta[0])
            yield k, result

    def value_and_gradient(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and gradient with respect to theta = radius * unit, float64, on the CPU."""
        f = self.f
        self.seen_broken = set()

        def of_batch(batch: Tensor) -> tuple[Tensor, Tensor]:
            with own_arithmetic(f):
                theta = batch.detach().clone().requires_grad_()
                effect = effect_at(f, theta, self.positions)
                value = melbo_objective(effect, self.p, self.q, self.norm)
                (gradient,) = torch.autograd.grad(value.sum(), theta)
            if not (value.isfinite().all() and gradient.isfinite().all()):
                broken = ~effect.detach().isfinite().flatten(2).all(-1).all(0)
                # Where no effect is, its size or its gradient is: of any prompt, for all we know.
                broken |= ~broken.any()
                self.seen_broken |= set(broken.nonzero().flatten().tolist())
            return value.detach().double().cpu(), gradient.double().cpu()

        theta_dtype = torch.promote_types(f.x.dtype, torch.float32)
        theta = (unit * self.radius).to(f.x.device, theta_dtype)
        size = min(self.fitting, f.vectors_at_once())
        parts, self.fitting = map_batches(of_batch, theta, size)
        values, gradients = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(gradients)


def _radius_of(previous: SteeringVectors | None, calibration: Mapping[str, Any]) -> float | None:
    """The radius that earlier vectors were given in the same way.

    Calibrated anew, on another machine, it might come out a digit different.
    """
    if previous is None or previous.story.get("calibration") != calibration:
        return None
    radius = previous.story.get("hyperparameters", {}).get("radius")
    return float(radius) if isinstance(radius, int | float) and 0 < radius < math.inf else None


def _nearly_orthogonal(vectors: Theta) -> bool:
    units = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    cosines = units @ units.T - torch.eye(len(units), dtype=torch.float64)
    return bool((cosines.abs() <= _LARGEST_COSINE).all())


def _ascent(
    search: _Search, starts: Tensor, basis: Tensor, first_vector: int, on_step: OnStep | None
) -> _Result:
    """Safeguarded power iteration on the sphere, for all starts at once.

    The power step jumps to the gradient's direction, theta <- R g / |g|. It climbs where the
    objective is convex on the way, as it nearly is: it is a norm of something smooth. Here the jump
    goes along the great circle, and is taken if the objective is higher at its end. If not, the
    next trial is nearer: at the top of the cubic through both ends' values and slopes; steps stay
    shortened for a while. So the objective never falls, and the last iterate is the best.
    """
    unit = normalise(complement(starts, basis))
    value, gradient = search.value_and_gradient(unit)
    _check_effect(value, first_vector)
    lost = search.lose(value, gradient)
    gradient = complement(gradient, basis)
    value, gradient = value.masked_fill(lost, math.nan), gradient.masked_fill(lost[:, None], 0.0)
    shortening = torch.ones_like(value)
    evaluations = torch.ones(len(unit), dtype=torch.float32)
    history = [value]
    _report(on_step, first_vector, 1, search.steps, value)
    for step in range(2, search.steps + 1):
        heading, power_angle = _power_step(gradient, unit)
        active = (power_angle > _CONVERGED_ANGLE) & ~lost
        if not active.any():
            break
        angle = shortening * power_angle
        cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
        trial = normalise(complement(cosine * unit + sine * heading, basis))
        trial_value, trial_gradient = value.clone(), gradient.clone()
        trial_value[active], raw_gradient = search.value_and_gradient(trial[active])
        trial_gradient[active] = complement(raw_gradient, basis)
        evaluations += active

        climbed = active & (trial_value > value) & trial_gradient.isfinite().all(-1)
        slope = search.radius * _dot(gradient, heading)
        trial_slope = search.radius * _dot(trial_gradient, cosine * heading - sine * unit)
        nearer = _cubic_top(angle, value, slope, trial_value, trial_slope) / power_angle
        recovered = (shortening * _RECOVERY).clamp(max=1.0)
        shortening = torch.where(climbed, recovered, torch.where(active, nearer, shortening))
        unit = torch.where(climbed[:, None], trial, unit)
        gradient = torch.where(climbed[:, None], trial_gradient, gradient)
        value = torch.where(climbed, trial_value, value)
        history.append(value)
        _report(on_step, first_vector, step, search.steps, value)
    return _Result((unit * search.radius).float(), value, evaluations, torch.stack(history, 1))


def _adamw(
    search: _Search, starts: Tensor, basis: Tensor, first_vector: int, on_step: OnStep | None
) -> _Result:
    """The published optimiser: projected AdamW, the last iterate returned.

    AdamW works element by element, so that vectors optimised together are as if alone.
    """
    unit = normalise(complement(starts, basis))
    theta = (unit * search.radius).float().requires_grad_()
    adamw = torch.optim.AdamW([theta], lr=1e-3, betas=(0.9, 0.98), amsgrad=True, weight_decay=0.0)
    history, lost = [], torch.zeros(len(theta), dtype=torch.bool)
    for step in range(search.steps + 1):
        value, gradient = search.value_and_gradient(theta.detach().double() / search.radius)
        if step == 0:
            _check_effect(value, first_vector)
        lost |= search.lose(value.masked_fill(lost, 0.0), gradient)
        value = value.masked_fill(lost, math.nan)
        gradient = gradient.masked_fill(lost[:, None], 0.0)
        history.append(value)
        _report(on_step, first_vector, step, search.steps, value)
        if step == search.steps:
            break
        ascent_direction = complement(tangent(gradient, theta.detach().double()), basis)
        theta.grad = -ascent_direction.float()
        adamw.step()
        with torch.no_grad():
            theta.copy_(normalise(complement(theta.double(), basis), search.radius))
    evaluations = torch.full((len(theta),), float(search.steps + 1), dtype=torch.float32)
    return _Result(theta.detach(), history[-1], evaluations, torch.stack(history, 1))


def _power_step(gradient: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The great circle from `unit` towards the gradient's direction, and the angle to there."""
    slope_direction = tangent(gradient, unit)
    steepness = slope_direction.norm(dim=-1)
    angle = torch.atan2(steepness, _dot(gradient, unit)).clamp(max=_LARGEST_ANGLE)
    tiny = torch.finfo(torch.float64).tiny
    return slope_direction / steepness.clamp_min(tiny)[:, None], angle


def _cubic_top(
    width: Tensor, value0: Tensor, slope0: Tensor, value1: Tensor, slope1: Tensor
) -> Tensor:
    """Where the cubic through two values and slopes, `width` apart, is highest in between.

    Kept to 0.1 to 0.7 of the width; 0.4 of it where the numbers give no top.
    """
    linear = slope0 * width
    rise = value1 - value0
    quadratic = 3 * rise - (2 * slope0 + slope1) * width
    cubic = (slope0 + slope1) * width - 2 * rise
    root = (quadratic.square() - 3 * cubic * linear).clamp_min(0).sqrt()
    # Of the two zeros of the derivative, the form of the maximum that is stable for small cubics.
    top = linear / (root - quadratic)
    return width * torch.where(top.isfinite(), top, 0.4).clamp(0.1, 0.7)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _check_effect(value: Tensor, first_vector: int) -> None:
    if bool((value == 0).any()):
        raise ValueError(
            f"radius: a random vector of this length changes nothing at the positions that count, "
            f"as far as the model's type can tell (vector {first_vector}); use a larger radius, or "
            "a smaller p"
        )


def _report(
    on_step: OnStep | None, first_vector: int, step: int, n_steps: int, value: Tensor
) -> None:
    if on_step is not None:
        on_step(Step(first_vector, len(value), step, n_steps, value.clone()))


def _warn_if_dominated(search: _Search, theta: Theta) -> None:
    """Say so where the first tokens alone make the objective: see `positions` in `melbo`."""
    first = search.f.position_mask(slice(0, 1)) & search.counted
    others = search.counted & ~first
    if not (first.any() and others.any()):
        return
    with torch.no_grad():
        effect = search.f.delta(theta.to(search.f.x.device))[0]
        powers = effect.norm(dim=-1).double() ** search.p
    share = float(powers[first].sum() / powers[search.counted].sum())
    if share > _DOMINATED:
        warn_user(
            f"{share:.0%} of the first vector's objective comes from the first token: the search "
            f"sees little else, and its vectors may all do the same thing, or nothing. "
            f"positions={search.positions} includes that token; leave it out with slice(1, None), "
            "or measure where the next tokens are made with slice(-3, None)"
        )
