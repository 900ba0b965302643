"""The factors of deep causal transcoding, one vector and one output at a time, in plain torch.

Written from the formulas of Mack & Turner 2024, "Deep causal transcoding". `effect` maps one vector
[d_model] to its mean effect [d_model].
"""

import math

import torch


def jacobian(effect, theta):
    """[output, d_model], one backward pass an output."""
    return torch.autograd.functional.jacobian(effect, theta)


def hessian(effect, d_model):
    """The second derivative at zero, [output, d_model, d_model]."""
    zero = torch.zeros(d_model, dtype=torch.float64)
    n_outputs = len(effect(zero))
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda t, o=o: effect(t)[o], zero)
            for o in range(n_outputs)
        ]
    )


def orthonormal(vectors, strengths, step, steps):
    """The polar factor; in the last third of the steps Gram-Schmidt, the strongest first."""
    if step < 2 * steps / 3:
        values, basis = torch.linalg.eigh(vectors @ vectors.T)
        return basis @ torch.diag(values.rsqrt()) @ basis.T @ vectors
    order = sorted(range(len(vectors)), key=lambda i: -strengths[i])
    result = torch.zeros_like(vectors)
    for place, i in enumerate(order):
        left = vectors[i]
        for j in order[:place]:
            left = left - (left @ result[j]) * result[j]
        result[i] = left / left.norm()
    return result


def weights(vectors, outputs, effects, overlap):
    """Alpha of the normal equations, and the objective: importance minus redundancy."""
    count = len(vectors)
    kernel = torch.empty(count, count, dtype=torch.float64)
    response = torch.empty(count, dtype=torch.float64)
    for i in range(count):
        response[i] = outputs[i] @ effects[i]
        for j in range(count):
            kernel[i, j] = (outputs[i] @ outputs[j]) * overlap(float(vectors[i] @ vectors[j]))
    alpha = torch.linalg.solve(kernel, response)
    return alpha, float(alpha @ response - alpha @ kernel @ alpha / 2)


def pushed_apart(vectors, strengths):
    """Ten times, take from each the mean of all, weighted by likeness and strength."""
    for _ in range(10):
        pushed = []
        for v in vectors:
            weighted = zip(vectors, strengths, strict=True)
            shares = [float(s) * math.exp(float(v @ w)) for w, s in weighted]
            left = v - torch.tensor(shares, dtype=torch.float64) @ vectors / sum(shares)
            pushed.append(left / left.norm())
        vectors = torch.stack(pushed)
    return vectors


def exponential_step(effect, vectors, radius):
    """Vectors, outputs, alpha and objective; where each vector is pulled, unit, and how much."""
    effects = torch.stack([effect(radius * v) for v in vectors])
    outputs = torch.stack([e / e.norm() for e in effects])
    alpha, objective = weights(vectors, outputs, effects, math.expm1)
    pulled = [jacobian(effect, radius * v).T @ u for v, u in zip(vectors, outputs, strict=True)]
    following = torch.stack([p / p.norm() for p in pulled])
    return (vectors, outputs, alpha, objective), following, [float(p.norm()) for p in pulled]


def exponential(effect, vectors, radius, steps):
    """Vectors, outputs, alpha of each step, and the objectives."""
    found, strengths = [], [1.0] * len(vectors)
    for step in range(steps):
        vectors = orthonormal(vectors, strengths, step, steps)
        fitted, vectors, strengths = exponential_step(effect, vectors, radius)
        found.append(fitted)
    return found


def soft(effect, vectors, radius, steps):
    """The push in the last third, and one more step without it, from the best of that third."""
    found, strengths, highest = [], [1.0] * len(vectors), -math.inf
    for step in range(steps):
        early = step < min(2 * steps / 3, steps - 1)
        spread = orthonormal(vectors, strengths, step, steps)
        vectors = spread if early else pushed_apart(vectors, strengths)
        fitted, vectors, strengths = exponential_step(effect, vectors, radius)
        found.append(fitted)
        if early or fitted[-1] > highest:
            highest, following = -math.inf if early else fitted[-1], vectors
    return [*found, exponential_step(effect, following, radius)[0]]


def quadratic(effect, vectors, radius, steps):
    """The same, for the second derivative at zero."""
    second = hessian(effect, vectors.shape[1])
    found, strengths = [], [1.0] * len(vectors)
    for step in range(steps):
        vectors = orthonormal(vectors, strengths, step, steps)
        effects = torch.stack(
            [radius**2 / 2 * torch.einsum("oij,i,j", second, v, v) for v in vectors]
        )
        outputs = torch.stack([e / e.norm() for e in effects])
        alpha, objective = weights(vectors, outputs, effects, lambda c: c**2)
        found.append((vectors, outputs, alpha, objective))
        pulled = [
            torch.einsum("oij,o,i", second, u, v) for v, u in zip(vectors, outputs, strict=True)
        ]
        strengths = [float(p.norm()) for p in pulled]
        vectors = torch.stack([p / p.norm() for p in pulled])
    return found
