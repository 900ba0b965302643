"""Which way is a token? Directions of the unembedding, as the final norm lets them through."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.model.bridge import Model, at_rest, check_model, model_device, model_name
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.text import printable

# A no-break space looks like none.
_BREAKS = {ord("\n"): "⏎", ord("\t"): "⇥", 0xA0: "⍽"}


@shape_checked
def token_direction(model: Model, token: str, other: str | None = None) -> Float[Tensor, "d_model"]:
    """The direction of the residual stream that makes one token more likely than another.

        tm.ranked(found, by=tm.analysis.token_direction(model, " Yes", " No"))

    It is w (W_U[token] - W_U[other]), with w the weight of the final norm, centred where that norm
    subtracts the mean. The final residual stream's product with it, divided by the norm's scale, is
    the difference of the two logits, but for the biases. At an earlier layer this leaves out what
    later blocks do, as the logit lens does.

    Args:
        token: a text that is exactly one token; with most tokenizers a word begins with a space.
        other: another one; None takes the mean over the vocabulary.

    Returns:
        Not of norm 1: in logits for a unit of the normalised residual stream. Float32, on the CPU.

    Raises:
        ValueError: a text that is not exactly one token, or the same token twice; no tokenizer.

    Source: the ranking by a target of Mack & Turner 2024, "Deep causal transcoding".
    """
    check_model(model)
    number = _number(model, token, "token")
    numbers = [number] if other is None else [number, _number(model, other, "other")]
    if len({*numbers}) < len(numbers):
        raise ValueError(f"other={other!r}: the same token as token={token!r}; pass another one")
    d_model, weight = int(model.cfg.d_model), next(model.unembed.parameters())
    with at_rest(model):
        zeros = torch.zeros(1, 1, d_model, dtype=weight.dtype, device=model_device(model))
        # The gradient, whichever way round a model keeps its matrix.
        with torch.enable_grad():
            zeros.requires_grad_()
            logits = model.unembed(zeros)[0, 0].float()
            difference = logits[number] - (logits.mean() if other is None else logits[numbers[1]])
            (direction,) = torch.autograd.grad(difference, zeros)
        return _through_norm(model, direction[0, 0].float()).cpu()


def shown_tokens(model: Model, numbers: Iterable[int]) -> dict[int, str]:
    """Each token as a text that shows whole: control characters and line breaks are visible."""
    return {
        number: printable(model.tokenizer.decode([number])).translate(_BREAKS)
        for number in dict.fromkeys(numbers)
    }


def _through_norm(model: Model, direction: Tensor) -> Tensor:
    """The direction before the final norm, whose scale is left out, that is `direction` after it.

    The norm is asked, since architectures keep its weight in different ways: of a vector of mean
    zero and size one it makes its weight times that vector, and its bias.
    """
    dtype = next(model.parameters()).dtype

    def linear(x: Tensor) -> Tensor:
        ahead, behind = model.ln_final(torch.stack([x, -x])[:, None].to(dtype))[:, 0].float()
        return (ahead - behind).to(direction.device) / 2

    signs = torch.ones_like(direction)
    signs[1::2] = -1.0
    signs -= signs.mean()
    signs /= signs.square().mean().sqrt()
    through = linear(signs) / signs * direction
    # A constant vector has no size to a norm that subtracts the mean.
    subtracts_mean = not linear(torch.ones_like(direction)).any()
    return through - through.mean() if subtracts_mean else through


def _number(model: Model, text: str, argument: str) -> int:
    """The number of the token that a text is."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"model: {model_name(model)} has no tokenizer; load it with one")
    if not text:
        raise ValueError(f"{argument}='': an empty text; pass exactly one token, such as ' Yes'")
    if text.strip():  # white space may be a token
        checks.as_text(text, argument)

    def tokens(some: str) -> list[int]:
        return tokenizer(some, add_special_tokens=False)["input_ids"]

    numbers = tokens(text)
    if len(numbers) != 1:
        parts = [tokenizer.decode([number]) for number in numbers]
        variant = text.lstrip() if text[:1].isspace() else f" {text}"
        near = f", such as {variant!r}" if len(tokens(variant)) == 1 else ""
        near = near or ", such as the first of these; a word often begins with a space"
        raise ValueError(
            f"{argument}={text!r}: {len(numbers)} tokens, {parts}; pass exactly one{near}"
        )
    return int(numbers[0])
