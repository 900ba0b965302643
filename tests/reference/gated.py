"""Gated factors, slowly: one factor and one prompt at a time, by the model's own hooks.

From the description of the method: attention's output projection W of each block gives
W z + R (z . a) b, with z the outputs of its heads, one after the other. The effect is what that
changes in the residual stream after the target layer, at the last three tokens of each prompt.
"""

import math

import torch

from tests.reference.dct import weights


def hooks(a, b, layers, radius):
    """For `run_with_hooks`: `a` and `b` are [layer, width]."""
    made, seen = [], {}

    def read(place):
        def hook(z, hook):
            seen[place] = z.reshape(*z.shape[:2], -1)

        return hook

    def add(place):
        def hook(out, hook):
            added = torch.zeros_like(out)
            for row in range(out.shape[0]):
                for pos in range(out.shape[1]):
                    gate = sum(seen[place][row, pos] * a[place])
                    added[row, pos] = radius * gate * b[place]
            return out + added

        return hook

    for place, layer in enumerate(layers):
        made.append((f"blocks.{layer}.attn.hook_z", read(place)))
        made.append((f"blocks.{layer}.attn.hook_out", add(place)))
    return made


def residual(model, tokens, target, made=()):
    kept = []
    keep = (f"blocks.{target}.hook_resid_post", lambda h, hook: kept.append(h))
    model.run_with_hooks(tokens, fwd_hooks=[*made, keep])
    return kept[0]


def mean_effect(model, prompts, a, b, layers, radius, target):
    """Over the last three tokens of all prompts, [d_model]."""
    effects = []
    for tokens in prompts:
        with torch.no_grad():
            plain = residual(model, tokens, target)
        steered = residual(model, tokens, target, hooks(a, b, layers, radius))
        effects += list((steered - plain)[0, -3:])
    return torch.stack(effects).mean(0)


def normed(a, b):
    """Every row at norm 1."""
    return a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)


def flat(a, b):
    return torch.cat([torch.cat([a[place], b[place]]) for place in range(len(a))])


def pushed_apart(factors, strengths):
    """Ten times, take from each the mean of all, weighted by likeness and strength."""
    blocks, d_z = factors[0][0].shape
    for _ in range(10):
        flats = torch.stack([flat(*factor) for factor in factors]) / (2 * blocks) ** 0.5
        shares = (flats @ flats.T).exp() * torch.tensor(strengths, dtype=flats.dtype)
        left = flats - shares / shares.sum(1, keepdim=True) @ flats
        rows = [row.reshape(blocks, -1) for row in left]
        factors = [normed(row[:, :d_z], row[:, d_z:]) for row in rows]
    return factors


def step(model, prompts, factors, layers, radius, target):
    """Effects, gradients of their norms for a and b, outputs, alpha and the objective."""
    effects, gradients = [], []
    for a, b in factors:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        effect = mean_effect(model, prompts, a, b, layers, radius, target)
        gradients.append(torch.autograd.grad(effect.norm(), [a, b]))
        effects.append(effect.detach())
    effects = torch.stack(effects)
    outputs = effects / effects.norm(dim=-1, keepdim=True)
    flats = torch.stack([flat(*factor) for factor in factors]) / (2 * len(layers)) ** 0.5
    alpha, objective = weights(flats, outputs, effects, math.expm1)
    return effects, gradients, outputs, alpha, objective


def search(model, prompts, factors, layers, radius, target, steps):
    """Soft steps, and one more without the push, from the best: factors, effects, alpha, values."""
    strengths, objectives, highest = [1.0] * len(factors), [], -float("inf")
    for _ in range(steps):
        factors = pushed_apart(factors, strengths)
        _, gradients, _, _, objective = step(model, prompts, factors, layers, radius, target)
        strengths = [float(flat(*pair).norm()) for pair in gradients]
        factors = [normed(*pair) for pair in gradients]
        objectives.append(objective)
        if objective > highest:
            highest, following = objective, factors
    effects, _, _, alpha, objective = step(model, prompts, following, layers, radius, target)
    return following, effects, alpha, [*objectives, objective]
