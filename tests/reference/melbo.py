"""MELBO the slow and obvious way: one vector, one prompt, one position at a time.

Written from the published description; hooks on the whole model, nothing of tl_melbo.
"""

import torch


def residuals(model, tokens, theta, source, target):
    """resid(target) [pos, d_model], with theta added to resid(source) at every position."""
    kept = []

    def add(resid, hook):
        return resid + theta

    def keep(resid, hook):
        kept.append(resid)

    model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (f"blocks.{source}.hook_resid_post", add),
            (f"blocks.{target}.hook_resid_post", keep),
        ],
    )
    return kept[0][0]


def objective(changes, positions, p, q, norm):
    """changes: for each prompt, [pos, d_model]; the equation, written out."""
    total = 0.0
    for change in changes:
        inner = 0.0
        for position in range(len(change))[positions]:
            entry = change[position]
            if norm == "l2":
                inner = inner + (entry * entry).sum().sqrt() ** p
            else:
                inner = inner + (entry.abs() ** p).sum()
        total = total + inner ** (1 / q)
    return total


def value_and_gradient(model, prompts, theta, source, target, positions, p, q, norm):
    theta = theta.detach().clone().requires_grad_()
    zero = torch.zeros_like(theta)
    changes = []
    for tokens in prompts:
        with torch.no_grad():
            plain = residuals(model, tokens, zero, source, target)
        changes.append(residuals(model, tokens, theta, source, target) - plain)
    value = objective(changes, positions, p, q, norm)
    (gradient,) = torch.autograd.grad(value, theta)
    return value.detach(), gradient


def adamw(model, prompts, start, earlier, radius, steps, source, target, positions, p, q, norm):
    """The published ascent of one vector, orthogonal to `earlier`; AdamW written out.

    Returns the objective before each step and after the last, and the last theta.
    """

    def project(vector):
        for other in earlier:
            other = other / other.norm()
            vector = vector - (vector @ other) * other
        return vector

    theta = project(start)
    theta = theta / theta.norm() * radius
    mean, square, most = (torch.zeros_like(theta) for _ in range(3))
    history = []
    for step in range(1, steps + 1):
        value, gradient = value_and_gradient(
            model, prompts, theta, source, target, positions, p, q, norm
        )
        history.append(value)
        unit = theta / theta.norm()
        gradient = -project(gradient - (gradient @ unit) * unit)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.98 * square + 0.02 * gradient**2
        most = torch.maximum(most, square)
        denominator = (most / (1 - 0.98**step)).sqrt() + 1e-8
        theta = theta - 1e-3 * (mean / (1 - 0.9**step)) / denominator
        theta = project(theta)
        theta = theta / theta.norm() * radius
    value, _ = value_and_gradient(model, prompts, theta, source, target, positions, p, q, norm)
    return torch.stack([*history, value]), theta
