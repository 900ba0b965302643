"""Distributions over tokens, and how far they are apart; intervals of shares."""

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.shapes import Float, Int, shape_checked

LogProbs = Float[Tensor, "vector d_vocab"]

# Log-probabilities in float32 sum to one this closely; logits do not.
_NORMALISED_TOLERANCE = 1e-2
DEFAULT_CONFIDENCE = 0.95


@shape_checked
def kl_from_log_probs(log_p: LogProbs, log_q: LogProbs) -> Float[Tensor, "vector"]:
    """KL(P || Q), row by row, in nats: sum of p (log p - log q), summed in float64.

    Infinite where Q gives zero to what P does not; NaN for a row that is NaN throughout.

    Args:
        log_p: natural logarithms of probabilities; -inf is a probability of zero.

    Raises:
        ValueError: the probabilities of a row do not sum to one.
    """
    for name, rows in (("log_p", log_p), ("log_q", log_q)):
        total = rows.double().logsumexp(-1)
        if not ((total.abs() < _NORMALISED_TOLERANCE) | rows.isnan().all(-1)).all():
            raise ValueError(
                f"{name}: the probabilities of some rows do not sum to one; pass "
                "logits.log_softmax(-1), in natural logarithms"
            )
    # Normalised again: float32's rounding alone can make a divergence negative.
    p, q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    dtype = torch.promote_types(torch.promote_types(log_p.dtype, log_q.dtype), torch.float32)
    return terms.sum(-1).clamp_min(0.0).to(dtype)


def mean_losses(
    logits: Float[Tensor, "row pos d_vocab"], targets: Int[Tensor, "row pos"]
) -> Float[Tensor, "row"]:
    """Each row's mean cross-entropy, in nats a token: float64, on the CPU; -100 is no target."""
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    # Where there is no target, the loss is 0.
    return (losses.view_as(targets).double().sum(-1) / (targets != -100).sum(-1)).cpu()


@shape_checked
def wilson_interval(
    hits: int, n: int, confidence: float = DEFAULT_CONFIDENCE
) -> tuple[float, float]:
    """The interval that Wilson's score test leaves of a share, from so many hits in n trials.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"hits={hits}, n={n}: n is at least 1, and hits are from 0 to n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: between 0 and 1, for example 0.95")
    test = checks.installed("scipy.stats", "wilson_interval").binomtest(hits, n)
    interval = test.proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
