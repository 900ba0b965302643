"""The loss of a divergence adapter on sampled tokens, and its gradient, a few texts at a time."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_melbo.adapters._adapter import AdapterAdditions
from tl_melbo.adapters._sampling import Sampled, running
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model, at_rest
from tl_melbo.reading import rows_at_once


class Measured(NamedTuple):
    """Means over the sampled tokens, in nats; entropies of the model with the adapter, without."""

    loss: float
    kl: float
    nll: float
    entropy: float
    entropy_without: float


def loss_of_tokens(
    log_p: Tensor, log_q: Tensor, targets: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """`-alpha KL(P || Q) + beta NLL_P` of each token; and KL, NLL, both entropies, [4, token]."""
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    nll = -log_p.gather(-1, targets[:, None])[:, 0]
    entropies = [-(some.exp() * some).sum(-1) for some in (log_p, log_q)]
    return beta * nll - alpha * kl, torch.stack([kl, nll, *entropies]).detach()


def loss_and_gradients(
    model: Model, plain: Any, rows: AdapterAdditions, drawn: Sampled, alpha: float, beta: float
) -> tuple[Measured, list[Tensor]]:
    """The mean loss over the sampled tokens, and its gradients for A and B of one adapter.

    The tokens are fixed: gradients flow through the probabilities P of the adapted model alone.
    """
    count = int(drawn.sampled.sum())
    # The logits before the first sampled token of any text, and all that follow.
    first = int(drawn.sampled.any(0).to(torch.uint8).argmax()) - 1
    wanted = drawn.tokens.shape[1] - first

    def logits(runs: Any, some: Tensor) -> Tensor:
        tokens, sampled = drawn.tokens[some], drawn.sampled[some]
        out = runs(tokens, use_cache=False, logits_to_keep=wanted).logits[:, :-1]
        out = out[sampled[:, first + 1 :]]
        return out.to(torch.promote_types(out.dtype, torch.float32)).log_softmax(-1)

    def of_batch(some: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        targets = drawn.tokens[some][drawn.sampled[some]]
        with at_rest(model):
            log_q = logits(model.original_model if plain is None else plain, some)
        with torch.enable_grad(), running(model, plain, rows) as runs:
            log_p = logits(runs, some)
            each, others = loss_of_tokens(log_p, log_q, targets, alpha, beta)
            total = each.sum() / count
            gradients = torch.autograd.grad(total, [rows.A, rows.B])
        return total.detach(), others.sum(1) / count, list(gradients)

    at_once = rows_at_once(model, wanted, len(drawn.tokens))
    parts, _ = map_batches(of_batch, torch.arange(len(drawn.tokens)), at_once)
    totals, others, gradients = zip(*parts, strict=True)
    means = torch.stack(others).sum(0).tolist()
    measured = Measured(float(torch.stack(totals).sum()), *means)
    return measured, [torch.stack(each).sum(0) for each in zip(*gradients, strict=True)]
