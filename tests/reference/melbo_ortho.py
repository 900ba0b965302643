"""MELBO-ortho the slow and obvious way: hooks on the whole model, Adam written out, projection.

Written from the published description; nothing of tl_melbo.
"""

import torch

from tests.reference.melbo import residuals


def mean_residual(model, tokens, theta, source, target):
    return residuals(model, tokens, theta, source, target).mean(0)


def adam(model, tokens, theta0, earlier, steps, source, target, norm_penalty=0.0):
    """One vector: the distance before each step, and the last theta."""
    with torch.no_grad():
        goal = mean_residual(model, tokens, theta0, source, target)
    theta = theta0.clone()
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    history = []
    for step in range(1, steps + 1):
        leaf = theta.clone().requires_grad_()
        distance = (mean_residual(model, tokens, leaf, source, target) - goal).norm()
        loss = distance + norm_penalty * leaf.square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        history.append(distance.detach())
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        theta = theta - 0.01 * (mean / (1 - 0.9**step)) / (
            (square / (1 - 0.999**step)).sqrt() + 1e-8
        )
        for other in [theta0, *earlier]:
            other = other / other.norm()
            theta = theta - (theta @ other) * other
    return torch.stack(history), theta
