"""What a vector does inside, the slow and obvious way: one run with hooks for each number.

Written from the definitions, on TransformerLens's hooks; nothing of tl_melbo.
"""

import torch


def hooks_of(theta, layer):
    def add(resid, hook):
        return resid + theta

    return [(f"blocks.{layer}.hook_resid_post", add)]


def run(model, tokens, hooks, layer):
    """The residual stream after a layer, [pos, d_model], and the logits, [pos, d_vocab]."""
    kept = []

    def keep(resid, hook):
        kept.append(resid.clone())

    with torch.no_grad():
        logits = model.run_with_hooks(
            tokens, fwd_hooks=[*hooks, (f"blocks.{layer}.hook_resid_post", keep)]
        )
    return kept[0][0].double(), logits[0].double()


def kl(logits, other):
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def component_output(model, tokens, hooks, name):
    kept = []

    def keep(value, hook):
        kept.append(value.clone())

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, (name, keep)])
    return kept[0]


def mechanism(model, tokens, theta, source, target, n_heads, positions):
    """(component, layer, head) -> (share, kl): one run_with_hooks for each component."""
    steering = hooks_of(theta, source)
    before, logits = run(model, tokens, [], target)
    after, steered_logits = run(model, tokens, steering, target)
    effect = (after - before)[positions]

    def measured(hooks):
        stream, patched = run(model, tokens, hooks, target)
        change = (stream - before)[positions]
        return float((change * effect).sum() / (effect * effect).sum()), kl(patched[-1], logits[-1])

    found = {
        ("all", source, -1): (1.0, kl(steered_logits[-1], logits[-1])),
        ("direct", target, -1): measured(hooks_of(theta, target)),
    }
    for layer in range(source + 1, target + 1):
        name = f"blocks.{layer}.hook_mlp_out"
        mlp = component_output(model, tokens, steering, name)
        found["mlp", layer, -1] = measured([(name, lambda value, hook, mlp=mlp: mlp)])
        name = f"blocks.{layer}.attn.hook_z"
        z = component_output(model, tokens, steering, name)
        for head in range(n_heads):

            def put(value, hook, z=z, head=head):
                value = value.clone()
                if value.ndim == 4:
                    value[:, :, head] = z[:, :, head]
                else:
                    width = value.shape[-1] // n_heads
                    columns = slice(head * width, (head + 1) * width)
                    value[..., columns] = z[..., columns]
                return value

            found["head", layer, head] = measured([(name, put)])
    return found
