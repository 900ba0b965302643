"""Which next tokens does a vector promote and suppress, and after which layer does that show?"""

from collections.abc import Callable

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.additions import Additions, VectorAdditions
from tl_melbo.analysis._similarity import kl_to
from tl_melbo.analysis._tokens import shown_tokens
from tl_melbo.errors import warn_of_rows
from tl_melbo.model.bridge import Model, check_model, model_name
from tl_melbo.model.tokens import to_tokens
from tl_melbo.probability import LogProbs
from tl_melbo.reading import map_next_token, map_residuals, next_token_log_probs
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.steering import Steerable, as_chat, steering_rows
from tl_melbo.tables import Table

DEFAULT_PROBABILITY = 0.01
# How far the lens after the last layer may be from the model's own log-probabilities, in nats.
_LENS_TOLERANCE = 0.1


@shape_checked
def top_tokens(
    model: Model,
    prompt: str,
    vectors: Steerable,
    n: int = 10,
    *,
    least_probability: float = DEFAULT_PROBABILITY,
    by_layer: bool = False,
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
) -> Table:
    """The next tokens after a prompt that each vector promotes and suppresses most.

    By the change of their log-probability against the unsteered model.

    Args:
        n: tokens of each kind; fewer where no more are likely enough.
        least_probability: only tokens that have it, steered or unsteered. The rarest tokens change
            most, and are never written; 0 keeps them.
        by_layer: after every layer from the vectors' own on, by the logit lens: the final norm,
            with the stream's own scale and mean, and the unembedding.

    Returns:
        A row for each vector, layer (with `by_layer`) and token: vector, its position; layer;
        direction, "promoted" or "suppressed"; rank, from 1, by the change; token, printable;
        token_id; log_prob_change, in nats; probability and unsteered_probability. Vectors under
        which the logits are not finite are left out, with a warning.

    Raises:
        ValueError: a final norm and unembedding that do not give the model's own logits, with
            `by_layer`; numbers out of their range; as `next_token_log_probs` does.

    Source of the lens: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    check_model(model)
    checks.between(1, int(model.cfg.d_vocab), "a number of tokens", n=n)
    checks.between(0, 1, "a probability", least_probability=least_probability)
    checks.at_least(1, batch_size=batch_size)
    if not by_layer:
        options = {"layer": layer, "chat": chat, "batch_size": batch_size}
        return top_tokens_and_kl(model, prompt, vectors, n, least_probability, **options)[0]
    rows, chat = steering_rows(model, vectors, layer, [1.0]), as_chat(vectors, chat)
    unsteered = next_token_log_probs(model, prompt, chat=chat)[0]
    layers = list(range(min(rows.layers), int(model.cfg.n_layers)))
    tokens = to_tokens(model, prompt, chat)
    nothing = VectorAdditions.of(torch.zeros(1, int(model.cfg.d_model)), layers[0])

    def lens(residuals: Tensor) -> LogProbs:
        logits = model.unembed(model.ln_final(residuals))
        return logits[:, -1].float().log_softmax(-1).cpu()

    def at_last(some: Additions, measure: Callable[[Tensor], Tensor]) -> Tensor:
        return map_residuals(model, tokens, some, layers, measure, batch_size, slice(-1, None))

    (before,) = at_last(nothing, lambda streams: torch.stack([*map(lens, streams.unbind(1))], 1))
    # After the last layer the lens must say what the model says.
    off = float((before[-1] - unsteered).abs()[unsteered > unsteered.max() - 20].max())
    if not off <= _LENS_TOLERANCE:
        raise ValueError(
            f"by_layer=True: the final norm and unembedding of {model_name(model)} are {off:.3g} "
            "nats off its own next token (it may softcap its logits); pass by_layer=False"
        )

    def measure(streams: Tensor) -> Tensor:
        pairs = zip(streams.unbind(1), before, strict=True)
        return torch.stack([_ends(lens(x), own, n, least_probability) for x, own in pairs], 1)

    return _frame(model, at_last(rows, measure), layers)


def top_tokens_and_kl(
    model: Model,
    prompt: str,
    vectors: Steerable,
    n: int,
    least_probability: float = DEFAULT_PROBABILITY,
    *,
    layer: int | None,
    chat: bool | None,
    batch_size: int,
) -> tuple[Table, Float[Tensor, "vector"]]:
    """What `top_tokens` and `kl_divergence` give, from one pass through the model."""
    rows, chat = steering_rows(model, vectors, layer, [1.0]), as_chat(vectors, chat)
    unsteered = next_token_log_probs(model, prompt, chat=chat)
    kl_of = kl_to(unsteered)

    def measure(log_probs: LogProbs) -> Tensor:
        ends = _ends(log_probs, unsteered[0], n, least_probability)
        return torch.cat([kl_of(log_probs).double(), ends.flatten(1)], 1)

    found = map_next_token(model, prompt, rows, measure, chat=chat, batch_size=batch_size)
    kl, ends = found[:, 0].float(), found[:, 1:].unflatten(1, (1, 2, n, -1))
    return Table(_frame(model, ends, [0]).drop(columns="layer")), kl


def _ends(
    log_probs: LogProbs, unsteered: Float[Tensor, "d_vocab"], n: int, least: float
) -> Float[Tensor, "vector direction rank number"]:
    """Token, change and both probabilities of the tokens that change most, both ways.

    The token is -1 where no more are likely enough, NaN where the row is.
    """
    change = (log_probs - unsteered).double()
    likely = torch.maximum(log_probs, unsteered).exp() >= least
    kinds = []
    for sign in (1.0, -1.0):
        # What does not change that way is neither promoted nor suppressed.
        score = (sign * change).masked_fill(~likely | ~(sign * change > 0), -torch.inf)
        best = score.topk(n)
        found = best.values > -torch.inf
        token = best.indices.double().masked_fill(~found, -1.0)
        token = token.masked_fill(log_probs.isnan().any(-1, keepdim=True), torch.nan)
        own = log_probs.double().gather(-1, best.indices).exp()
        other = unsteered.double()[best.indices].exp()
        kinds.append(torch.stack([token, sign * best.values, own, other], -1))
    return torch.stack(kinds, 1)


def _frame(model: Model, found: Tensor, layers: list[int]) -> Table:
    bad = found[:, :, 0, 0, 0].isnan().any(-1).tolist()
    warn_of_rows(bad, f"what {model_name(model)} makes of the prompt", "they are left out")
    rows = []
    numbers = found[..., 0].nan_to_num(-1).long()
    text = shown_tokens(model, numbers[numbers >= 0].tolist())
    for vector in (i for i, is_bad in enumerate(bad) if not is_bad):
        for place, layer in enumerate(layers):
            for kind, direction in enumerate(("promoted", "suppressed")):
                some = found[vector, place, kind].tolist()
                for rank, (token, change, own, other) in enumerate(some, 1):
                    if token >= 0:
                        told = (text[int(token)], int(token), change)
                        rows.append((vector, layer, direction, rank, *told, own, other))
    columns = ["vector", "layer", "direction", "rank", "token", "token_id", "log_prob_change"]
    return Table(rows, columns=[*columns, "probability", "unsteered_probability"])
