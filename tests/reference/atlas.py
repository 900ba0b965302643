"""The Jacobian between two layers, by the whole model with hooks, one output at a time."""

import torch


def jacobian(model, prompts, source, target, positions):
    """[prompts x positions x d_model, d_model]: the residual stream at the target by the vector."""

    def effect(tokens, theta):
        kept = {}
        hooks = [
            (f"blocks.{source}.hook_resid_post", lambda residual, hook: residual + theta),
            (f"blocks.{target}.hook_resid_post", lambda residual, hook: kept.update(y=residual)),
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return kept["y"][0, positions].flatten()

    def of_prompt(prompt):
        tokens, zero = model.to_tokens(prompt), torch.zeros(model.cfg.d_model, dtype=torch.float64)
        return torch.autograd.functional.jacobian(lambda theta: effect(tokens, theta), zero)

    return torch.cat([of_prompt(prompt) for prompt in prompts])
