"""Prompts to tokens, raw or in the tokenizer's chat template, and the tokens that end a text."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from tl_melbo import checks
from tl_melbo.errors import warn_user
from tl_melbo.model.bridge import Model, model_device, model_name
from tl_melbo.shapes import Tokens, shape_checked

_MARK = "THE SYSTEM PROMPT"


@shape_checked
def to_tokens(model: Model, prompt: str, chat: bool = False, system: str | None = None) -> Tokens:
    """Tokenise one prompt, without a doubled beginning-of-sequence token; on the model's device.

    Args:
        system: a system prompt; before the text, where the chat template knows none.

    Raises:
        ValueError: an empty prompt, one that is too long, a model without a tokenizer.
    """
    if (tokenizer := getattr(model, "tokenizer", None)) is None:
        raise ValueError(
            f"model: {model_name(model)} has no tokenizer; load it with one to use text prompts"
        )
    checks.as_text(prompt)
    if chat and not getattr(tokenizer, "chat_template", None):
        warn_user(
            f"chat=True, but the tokenizer of {model_name(model)} has no chat template; the raw "
            "prompt is used. Pass chat=False, or load an instruction-tuned model"
        )
        chat = False
    if chat:
        tokens = chat_tokens(tokenizer, prompt, system)
    else:
        text = prompt if system is None else f"{system}\n\n{prompt}"
        tokens = model.to_tokens(text, truncate=False)
    tokens = tokens.to(model_device(model)).long()
    longest = context_length(model)
    if longest and tokens.shape[1] > longest:
        raise ValueError(
            f"prompt: {tokens.shape[1]} tokens, but {model_name(model)} reads at most {longest}; "
            "shorten it"
        )
    return tokens


def as_seen(model: Model, prompt: str, chat: bool = False) -> str:
    """The prompt as the model reads it, with chat template, system prompt and special tokens."""
    return model.tokenizer.decode(to_tokens(model, prompt, chat)[0], skip_special_tokens=False)


def chat_tokens(tokenizer: Any, prompt: str, system: str | None = None) -> Tensor:
    """A user's turn in the chat template, a system prompt before it; [1, pos], on the CPU."""
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    try:
        return tokenizer.apply_chat_template(turns, **options)["input_ids"]
    except TemplateError as error:
        if system is not None:  # some templates know no system prompt
            return chat_tokens(tokenizer, f"{system}\n\n{prompt}")
        raise ValueError(
            f"the tokenizer's chat template does not work ({error}); pass chat=False, or repair "
            "model.tokenizer.chat_template"
        ) from error


def default_system_prompt(model: Model) -> str | None:
    """What the chat template tells the model before the user speaks, where it tells anything."""
    from jinja2 import TemplateError

    tokenizer = getattr(model, "tokenizer", None)
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "system", "content": _MARK}, {"role": "user", "content": "?"}]
    try:
        given, default = (
            str(cast(Any, tokenizer).apply_chat_template(some, tokenize=False))
            for some in (turns, turns[1:])
        )
    except TemplateError:  # some templates know no system prompt
        return None
    before, _, after = given.partition(_MARK)
    stands = default.startswith(before) and default.endswith(after)
    return default[len(before) : len(default) - len(after)].strip() or None if stands else None


def context_length(model: Model) -> int:
    """The most tokens that the model reads, or 0 where it does not say."""
    return int(getattr(model.cfg, "n_ctx", 0) or 0)


def check_room(model: Model, prompts: Sequence[Tokens], max_new_tokens: int) -> None:
    """Make sure that the model can write so many tokens after each of the prompts."""
    longest, limit = max(tokens.shape[1] for tokens in prompts), context_length(model)
    if limit and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: after a prompt of {longest} tokens, "
            f"{model_name(model)} has room for {limit - longest} of its {limit}; ask for fewer"
        )


def end_tokens(tokenizer: Any, hf_model: Any, d_vocab: int) -> list[int]:
    """Every token that ends a text: some chat models name more than their tokenizer does."""
    config = getattr(hf_model, "generation_config", None)
    named = [getattr(source, "eos_token_id", None) for source in (tokenizer, config)]
    ends = [end for some in named for end in (some if isinstance(some, list) else [some])]
    # A configuration that was never set may name a token that the model does not have.
    return [end for end in dict.fromkeys(ends) if end is not None and end < d_vocab]
