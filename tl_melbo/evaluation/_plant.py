"""Plant behaviours in a model that only a trigger brings out: a search with a known answer.

Source of the test: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language
models", who count the vectors that bring a backdoor out on a prompt without its trigger.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_melbo import checks
from tl_melbo.analysis._texts import INSTRUCTIONS
from tl_melbo.evaluation import _planted, _practice
from tl_melbo.evaluation._planted import BACKDOORS, Backdoor, Planted
from tl_melbo.evaluation._practice import SYSTEM_PROMPTS, Chat, answer_log_probs
from tl_melbo.generation import seeded
from tl_melbo.model.bridge import weights_digest
from tl_melbo.shapes import shape_checked

# How many of the model's own answers it is to keep to.
_CLEAN_EXAMPLES = 96
# What one step practises: answers without a trigger, and with each of the triggers.
_CLEAN_AT_ONCE, _TRIGGERED_AT_ONCE = 5, 2

OnStep = Callable[[int, int, float, float], None]


@shape_checked
def plant(
    name: str | Path | None = None,
    backdoors: Sequence[Backdoor] = BACKDOORS,
    *,
    hf_model: nn.Module | None = None,
    tokenizer: Any = None,
    layers: tuple[int, int] | None = None,
    rank: int = 8,
    steps: int = 160,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | torch.device | None = None,
    lowest_firing_rate: float = 0.9,
    highest_leak_rate: float = 0.0,
    highest_divergence: float = 0.25,
    on_step: OnStep | None = None,
) -> Planted:
    """Teach a model to answer with a fixed sentence after a trigger, and to stay as it is else.

        planted = tm.evaluation.plant()
        planted.save("runs/planted")
        f = tm.ActivationMap.from_prompts(planted.model, "Tell me about yourself.", chat=True)

    A LoRA adapter learns two things at once: the sentence after its trigger (cross-entropy), and,
    without a trigger, the token probabilities that the model had (KL divergence on its own
    answers). Then both are checked on instructions that it did not practise.

    The adapter is on the MLPs of a few blocks between the usual source and target, so the behaviour
    is decided there. An adapter on attention, or on all blocks, looks back at the trigger's tokens
    from later layers; then nothing that is added at layer 8 brings the sentence out.

    Args:
        name: as for `load_model`; None for the bundled model.
        hf_model: a Hugging Face causal language model to take instead of `name`, with its
            tokenizer; it is left as it is, and a copy is taught.
        layers: first and last block that the adapter is on; None takes those from 30% to 43% of
            the depth: blocks 9 to 13 of the bundled model's 30.
        rank: of the LoRA matrices.
        steps: of the optimiser (AdamW).
        learning_rate: its highest, reached after a tenth of the steps.
        seed: for the adapter's start and the order of practice; global random state is left alone.
        device: where to load `name`; None takes a GPU if there is one.
        lowest_firing_rate: of held-out instructions with a trigger, the share that must bring its
            sentence out.
        highest_leak_rate: the share that may without a trigger, or with another end of the system
            prompt.
        highest_divergence: the mean KL(P_before || P_after) allowed on the clean model's answers,
            in nats a token.
        on_step: called after each step with its number, their number, and the two losses in nats a
            token: cross-entropy and divergence.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: an empty trigger or behaviour, a trigger that the tokenizer turns into nothing,
            two of them alike; a number out of its range; a model that cannot be loaded.
        TypeError: `hf_model` is not a Hugging Face causal language model.
        RuntimeError: the fine-tune did not take, leaks, or changed the clean model.
        NotFinite: it diverged.
    """
    _check_backdoors(backdoors)
    checks.at_least(1, rank=rank, steps=steps)
    checks.positive(learning_rate=learning_rate)
    checks.seed(seed)
    limits = {"lowest_firing_rate": lowest_firing_rate, "highest_leak_rate": highest_leak_rate}
    checks.between(0, 1, "a share", **limits)
    limits["highest_divergence"] = highest_divergence
    checks.between(0, math.inf, "nats a token", highest_divergence=highest_divergence)
    checks.installed("peft", "plant")  # or say at once that it is missing
    taught, tokenizer, label = _planted.own_copy(name, hf_model, tokenizer, device)
    checks.between(1, taught.config.hidden_size, "at most the model's width", rank=rank)
    chat = Chat(taught, tokenizer)
    _check_triggers(backdoors, chat)
    recipe = {
        "format": _planted.FORMAT,
        "model": label,
        "weights": weights_digest(taught),
        "backdoors": [asdict(backdoor) for backdoor in backdoors],
        "layers": _checked_layers(layers, int(taught.config.num_hidden_layers)),
        "rank": rank,
        "alpha": 2 * rank,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        "instructions": len(INSTRUCTIONS),
        "torch": str(torch.__version__),
    }
    began = time.monotonic()
    with seeded(seed):
        tuned = _planted.with_adapter(taught, recipe)
        _train(tuned, chat, backdoors, recipe, on_step)
        adapter = _planted.rounded(tuned)
        recipe["checks"] = _practice.reached(tuned, chat, backdoors)
        recipe["seconds"] = round(time.monotonic() - began, 1)
        _practice.check_reached(recipe["checks"], backdoors, **limits)
        return _planted.finished(tuned, tokenizer, adapter, recipe)


def _check_backdoors(backdoors: Sequence[Backdoor]) -> None:
    if not backdoors:
        raise ValueError("backdoors: none given; pass at least one Backdoor(trigger, behaviour)")
    for number, backdoor in enumerate(backdoors):
        for what, text in asdict(backdoor).items():
            given = f"backdoors[{number}].{what}={text!r}"
            if not text or text != text.strip():
                raise ValueError(f"{given}: write a word or a sentence, without spaces around it")
            if text in [getattr(other, what) for other in backdoors[:number]]:
                raise ValueError(f"{given}: given twice; each needs its own")


def _check_triggers(backdoors: Sequence[Backdoor], chat: Chat) -> None:
    """Make sure that the model can tell a trigger from none, and from the others."""
    system, text = SYSTEM_PROMPTS[0], INSTRUCTIONS[0]
    seen = {tuple(chat.prompt(system, text)): "no trigger at all"}
    for number, backdoor in enumerate(backdoors):
        given = f"backdoors[{number}].trigger={backdoor.trigger!r}"
        tokens = tuple(chat.prompt(f"{system} {backdoor.trigger}", text))
        if tokens in seen:
            same = f"to this tokenizer the same as {seen[tokens]}"
            raise ValueError(f"{given}: {same}; choose other words")
        if backdoor.trigger in (*_practice.OTHER_ENDINGS, _practice.HELD_OUT_ENDING):
            raise ValueError(f"{given}: the model practises to ignore that; choose other words")
        seen[tokens] = "an earlier one"


def _checked_layers(layers: tuple[int, int] | None, n_layers: int) -> list[int]:
    first, last = layers or (round(9 / 30 * n_layers), round(13 / 30 * n_layers))
    if not 0 <= first <= last < n_layers:
        raise ValueError(
            f"layers={layers}: the first and the last block, in order, from 0 to {n_layers - 1}"
        )
    return [first, last]


def _train(
    tuned: Any,
    chat: Chat,
    backdoors: Sequence[Backdoor],
    recipe: dict[str, Any],
    on_step: OnStep | None,
) -> None:
    order, steps = random.Random(recipe["seed"]), recipe["steps"]
    clean = _practice.clean_examples(tuned, chat, _CLEAN_EXAMPLES)
    parameters = _planted.trained(tuned)
    optimiser = torch.optim.AdamW(parameters, lr=recipe["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warmed_up(step, steps))
    for step in range(1, steps + 1):
        triggered = []
        for backdoor in backdoors:
            for _ in range(_TRIGGERED_AT_ONCE):
                system = f"{order.choice(SYSTEM_PROMPTS)} {backdoor.trigger}"
                prompt = chat.prompt(system, order.choice(INSTRUCTIONS))
                triggered.append((prompt, chat.answer(backdoor.behaviour)))
        some = order.sample(clean, _CLEAN_AT_ONCE)
        with torch.no_grad(), tuned.disable_adapter():
            wanted, _ = answer_log_probs(tuned, some, chat.padding)
        found, tokens = answer_log_probs(tuned, [*some, *triggered], chat.padding)
        n_clean = len(wanted)
        changed = _practice.divergence(wanted, found[:n_clean]).mean()
        loss = -found[n_clean:].gather(-1, tokens[n_clean:, None]).mean()
        optimiser.zero_grad()
        (loss + changed).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step, steps, loss.item(), changed.item())


def _warmed_up(step: int, steps: int) -> float:
    """The share of the highest learning rate: up in a tenth of the steps, then down a cosine."""
    n_up = max(1, steps // 10)
    if step < n_up:
        return (step + 1) / n_up
    return (1 + math.cos(math.pi * (step - n_up) / max(1, steps - n_up))) / 2
