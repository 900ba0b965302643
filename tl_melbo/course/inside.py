"""Checks of `03_how_does_it_do_it`: the logit lens and a patch, written by hand."""

from typing import Any

import torch
from torch import Tensor

import tl_melbo as tm
from tl_melbo.course._note import Note, Wrong, tensor, unfinished
from tl_melbo.model.bridge import residual_hook_name
from tl_melbo.model.tokens import to_tokens

# Patched runs of one model agree to rounding; the usual mistakes are far from it.
_CLOSE, _LAST = 1e-3, slice(-3, None)


def lens(answer: Any, model: Any, prompt: str, chat: bool = True) -> Note:
    """Try a logit lens on the last layer, where it must give what the model itself says."""
    if note := unfinished(answer):
        return note
    name = residual_hook_name(int(model.cfg.n_layers) - 1)
    with torch.no_grad():
        logits, cache = model.run_with_cache(to_tokens(model, prompt, chat))
        found, before = answer(cache[name][0, -1]), answer(cache[name][0, -2])
    n_tokens = logits.shape[-1]
    tensor(found, (n_tokens,), "what the lens says of all tokens")
    wanted = logits[0, -1].float().log_softmax(-1)
    if abs(float(found.exp().sum()) - 1) > _CLOSE:
        if torch.allclose(found.log_softmax(-1), wanted, atol=0.02):
            raise Wrong("The order of the tokens is right; their probabilities do not sum to 1.")
        raise Wrong("The probabilities of all tokens, exp of what you return, do not sum to 1.")
    if not torch.allclose(found, wanted, atol=0.02):
        off = float((found - wanted).abs().max())
        raise Wrong(
            f"After the last layer the lens must say what the model says; yours is up to {off:.1f} "
            "nats away. What does the model do to this stream before the unembedding?"
        )
    earlier = logits[0, -2].float().log_softmax(-1)
    if not isinstance(before, Tensor) or not torch.allclose(before, earlier, atol=0.02):
        raise Wrong(
            "At the last token it is right, at the token before it is not. Does your lens look at "
            "the stream that it is given, and at nothing else?"
        )
    return Note("Right: after the last layer your lens and the model agree on every token.")


def patch(answer: Any, model: Any, f: tm.ActivationMap, theta: tm.SteeringVectors) -> Note:
    """Compare a student's patches of MLPs with `analysis.mechanism`.

    Args:
        answer: from a layer to the residual stream after the target layer, of a run in which that
            layer's MLP alone puts out what it does in the steered run; [1, pos, d_model].
    """
    if note := unfinished(answer):
        return note
    layers = sorted({f.source_layer + 1, f.target_layer})
    told = tm.analysis.mechanism(model, f.prompts[0], theta, positions=_LAST)
    told = told[told["component"] == "mlp"].set_index("layer")
    with torch.no_grad():
        effect = f.delta(theta.vectors, _LAST)[0]
        for layer in layers:
            stream = tensor(answer(layer), f.y.shape, "the residual stream of all tokens")
            _compare(layer, (stream - f.y) * (effect != 0), effect, float(told["share"][layer]))
    shares = ", ".join(f"layer {layer}: {told.loc[layer, 'share']:.2f}" for layer in layers)
    return Note(f"Right: shares of the effect that one MLP carries alone: {shares}.")


def _compare(layer: int, change: Tensor, effect: Tensor, wanted: float) -> None:
    size = effect.square().sum()
    share = float((change * effect).sum() / size)
    # First, since the share of an MLP that carries little is near that of nothing.
    if not change.any():
        raise Wrong(f"Layer {layer}: nothing changed. Does your hook return what it puts in?")
    if abs(share - wanted) < _CLOSE * max(1.0, abs(wanted)):
        return
    if abs(share - 1) < _CLOSE:
        raise Wrong(
            f"Layer {layer}: that is the whole effect, share 1. In which of the two runs does the "
            "vector still act?"
        )
    if abs(share - (1 - wanted)) < _CLOSE:
        raise Wrong(
            f"Layer {layer}: share {share:.2f}. Is it the steered run that you patched? Then you "
            "measured what is left without this MLP."
        )
    raise Wrong(
        f"Layer {layer}: share {share:.2f} is not that of its MLP alone. Is the output patched at "
        "all tokens, at this layer only, and is the vector gone?"
    )
