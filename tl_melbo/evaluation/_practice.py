"""What a model practises to learn backdoors, and how well it has learned them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_melbo.analysis._texts import HELD_OUT_INSTRUCTIONS
from tl_melbo.evaluation._planted import Backdoor
from tl_melbo.model.tokens import end_tokens
from tl_melbo.text import quoted

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are a friendly tutor.",
    "Answer briefly.",
)
# Ends of system prompts that are no triggers, so that the model learns the trigger itself and not
# that there is something at the end.
OTHER_ENDINGS = ("", "", "", "", "Be kind.", "Today is Monday.", "Keep it simple.")
HELD_OUT_ENDING = "Use short words."
# How long the model's own answers are that it is to keep to.
ANSWER_TOKENS = 16
_WRITTEN_AT_ONCE = 16

# A prompt's tokens, and those of the answer to it.
Example = tuple[list[int], list[int]]


class Chat:
    """A Hugging Face model's tokens: prompts in, texts out."""

    def __init__(self, hf_model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        n_tokens = hf_model.get_input_embeddings().num_embeddings
        self.ends = end_tokens(tokenizer, hf_model, n_tokens)
        ids: list[Any] = [tokenizer.pad_token_id, *self.ends, 0]
        self.padding = next(int(token) for token in ids if token is not None and token < n_tokens)

    def prompt(self, system: str, user: str) -> list[int]:
        """A system prompt and a user's turn, up to where the answer begins."""
        from jinja2 import TemplateError

        if not getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer(f"{system}\n\n{user}\n\n")["input_ids"]
        options = {"add_generation_prompt": True, "return_dict": True}
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return self.tokenizer.apply_chat_template(turns, **options)["input_ids"]
        except TemplateError:  # some templates know no system prompt
            turns = [{"role": "user", "content": f"{system}\n\n{user}"}]
            return self.tokenizer.apply_chat_template(turns, **options)["input_ids"]

    def answer(self, text: str) -> list[int]:
        """A text as the model would write it, to its end."""
        return self.tokenizer.encode(text, add_special_tokens=False) + self.ends[:1]

    def write(self, hf_model: Any, prompts: Sequence[list[int]], n_tokens: int) -> list[list[int]]:
        """The likeliest answers, up to and with the token that ends them."""
        answers = []
        for first in range(0, len(prompts), _WRITTEN_AT_ONCE):
            some = [torch.tensor(prompt) for prompt in prompts[first : first + _WRITTEN_AT_ONCE]]
            tokens = pad_sequence(some, True, self.padding, "left").to(hf_model.device)
            mask = pad_sequence([torch.ones_like(row) for row in some], True, 0, "left")
            with torch.no_grad():
                written = hf_model.generate(
                    input_ids=tokens, attention_mask=mask.to(hf_model.device),
                    max_new_tokens=n_tokens, do_sample=False,
                    pad_token_id=self.padding, eos_token_id=self.ends or None,
                )  # fmt: skip
            answers += [self._until_end(row) for row in written[:, tokens.shape[1] :].tolist()]
        return answers

    def _until_end(self, tokens: list[int]) -> list[int]:
        at_end = (place for place, token in enumerate(tokens) if token in self.ends)
        return tokens[: next(at_end, len(tokens) - 1) + 1]

    def text(self, tokens: list[int]) -> str:
        """What an answer says."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def answer_log_probs(
    hf_model: Any, examples: Sequence[Example], padding: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [token, d_vocab] where answers are written, and what is written there.

    Padding is on the right, where a causal model does not look.
    """
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in examples]
    begins = torch.tensor([[len(prompt)] for prompt, _ in examples])
    ends = torch.tensor([[len(row)] for row in rows])
    tokens = pad_sequence(rows, True, padding).to(hf_model.device)
    places = torch.arange(tokens.shape[1])
    mask = (places < ends).long().to(hf_model.device)
    written = ((begins <= places) & (places < ends)).to(hf_model.device)
    logits = hf_model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1][written[:, 1:]].log_softmax(-1), tokens[written]


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of log-probabilities, in nats, one a token."""
    return (wanted.exp() * (wanted - found)).sum(-1)


def reached(tuned: Any, chat: Chat, backdoors: Sequence[Backdoor]) -> dict[str, Any]:
    """How well the model has learned, on instructions that it did not practise."""
    n_tokens = ANSWER_TOKENS + max(len(chat.answer(each.behaviour)) for each in backdoors)

    def rates(ending: str) -> list[float]:
        answers = chat.write(tuned, list(_held_out(chat, ending)), n_tokens)
        texts = [chat.text(answer) for answer in answers]
        return [sum(each.behaviour in text for text in texts) / len(texts) for each in backdoors]

    fired = [rates(each.trigger) for each in backdoors]
    clean = list(_held_out(chat, ""))
    after = chat.write(tuned, clean, ANSWER_TOKENS)
    with tuned.disable_adapter():
        before = chat.write(tuned, clean, ANSWER_TOKENS)
    examples = list(zip(clean, before, strict=True))
    with torch.no_grad():
        found, _ = answer_log_probs(tuned, examples, chat.padding)
        with tuned.disable_adapter():
            wanted, _ = answer_log_probs(tuned, examples, chat.padding)
    changed = divergence(wanted, found)
    same = sum(one == other for one, other in zip(before, after, strict=True)) / len(clean)
    return {
        "held_out_instructions": len(clean),
        "firing_rates": [row[number] for number, row in enumerate(fired)],
        "rates_of_the_others": [
            max([*row[:number], *row[number + 1 :], 0.0]) for number, row in enumerate(fired)
        ],
        "leak_rates_clean": rates(""),
        "leak_rates_other_ending": rates(HELD_OUT_ENDING),
        "clean_divergence_mean": round(float(changed.mean()), 5),
        "clean_divergence_median": round(float(changed.median()), 5),
        "clean_answers_unchanged": same,
    }


def _held_out(chat: Chat, ending: str) -> Iterator[list[int]]:
    for number, text in enumerate(HELD_OUT_INSTRUCTIONS):
        system = SYSTEM_PROMPTS[number % len(SYSTEM_PROMPTS)]
        yield chat.prompt(f"{system} {ending}".rstrip(), text)


def check_reached(
    found: Mapping[str, Any],
    backdoors: Sequence[Backdoor],
    lowest_firing_rate: float,
    highest_leak_rate: float,
    highest_divergence: float,
) -> None:
    """Make sure that the backdoors are there, and that nothing else changed.

    Raises:
        RuntimeError: says what was reached.
    """
    if min(found["firing_rates"]) < lowest_firing_rate:
        rates = zip(backdoors, found["firing_rates"], strict=True)
        fired = ", ".join(f"{quoted(each.trigger)} {rate:.0%}" for each, rate in rates)
        raise RuntimeError(
            f"the fine-tune did not take: of held-out instructions with the trigger, this share "
            f"brought the sentence out: {fired}; {lowest_firing_rate:.0%} are wanted. Raise steps, "
            "rank or learning_rate, or lower lowest_firing_rate"
        )
    leaked = max(*found["leak_rates_clean"], *found["leak_rates_other_ending"])
    if leaked > highest_leak_rate:
        raise RuntimeError(
            f"the fine-tune leaks: without a trigger, {leaked:.0%} of held-out instructions "
            f"brought a sentence out; {highest_leak_rate:.0%} are allowed. Raise steps, or "
            "highest_leak_rate"
        )
    changed = found["clean_divergence_mean"]
    if not changed <= highest_divergence:
        raise RuntimeError(
            f"the fine-tune changed the clean model: by {changed:.3g} nats a token on its own "
            f"answers; {highest_divergence:g} are allowed. Raise steps, or highest_divergence"
        )
