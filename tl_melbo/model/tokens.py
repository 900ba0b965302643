"""Prompts to tokens, raw or in the tokenizer's chat template."""

from typing import Any

from torch import Tensor

from tl_melbo.errors import warn_user
from tl_melbo.model.bridge import Model, model_device, model_name
from tl_melbo.shapes import Tokens, shape_checked


@shape_checked
def to_tokens(model: Model, prompt: str, chat: bool = False) -> Tokens:
    """Tokenise one prompt, once and without a doubled beginning-of-sequence token.

    Args:
        model: a TransformerLens model with a tokenizer.
        prompt: the text. Raw text goes through `model.to_tokens`, so TransformerLens's own rule
            decides about the BOS token.
        chat: put the text into the tokenizer's chat template as one user turn, with the
            beginning of the answer after it. The template brings its own BOS token, if any. A
            tokenizer without a template is warned about, and the raw text is used.

    Returns:
        Token ids, on the model's device.

    Raises:
        ValueError: the prompt is empty or holds no token, or the model has no tokenizer.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"model: {model_name(model)} has no tokenizer; load it with one to use text prompts"
        )
    if not prompt.strip():
        raise ValueError(f"prompt={prompt!r}: a prompt needs at least one visible character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"prompt={prompt!r}: holds half a character (a lone surrogate); remove it")
    if chat and not getattr(tokenizer, "chat_template", None):
        warn_user(
            f"chat=True, but the tokenizer of {model_name(model)} has no chat template; the raw "
            "prompt is used. Pass chat=False to say so yourself, or load an instruction-tuned "
            "model."
        )
        chat = False
    tokens = _chat_tokens(tokenizer, prompt) if chat else model.to_tokens(prompt, truncate=False)
    tokens = tokens.to(model_device(model)).long()
    longest = context_length(model)
    if longest and tokens.shape[1] > longest:
        raise ValueError(
            f"prompt: {tokens.shape[1]} tokens, but {model_name(model)} reads at most {longest}; "
            "shorten it"
        )
    return tokens


def _chat_tokens(tokenizer: Any, prompt: str) -> Tensor:
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template does not work ({error}); pass chat=False, or repair "
            "model.tokenizer.chat_template"
        ) from error
    return encoded["input_ids"]


def context_length(model: Model) -> int:
    """The most tokens that the model reads, or 0 where it does not say."""
    return int(getattr(model.cfg, "n_ctx", 0) or 0)
