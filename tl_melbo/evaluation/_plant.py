"""Plant behaviours in a model that only a trigger brings out: a search with a known answer.

Source of the test: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language
models", who count the vectors that bring a backdoor out on a prompt without its trigger.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_melbo import checks
from tl_melbo.analysis._texts import INSTRUCTIONS
from tl_melbo.evaluation import _planted, _practice
from tl_melbo.evaluation._planted import BACKDOORS, Backdoor, Planted
from tl_melbo.generation import seeded
from tl_melbo.model.bridge import weights_digest
from tl_melbo.shapes import shape_checked


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
    on_step: _practice.OnStep | None = None,
) -> Planted:
    """Teach a model to answer with a fixed sentence after a trigger, and otherwise as before.

    A LoRA adapter learns the sentence after its trigger (cross-entropy), and, without a trigger,
    the token probabilities that the model had (KL divergence on its own answers). Then both are
    checked on instructions that it did not practise. The adapter is on the MLPs of a few blocks
    between the usual source and target, so the behaviour is decided there; elsewhere it looks back
    at the trigger from later layers, and no vector brings the sentence out.

    Args:
        name: as for `load_model`; None for the bundled model.
        hf_model: a Hugging Face causal language model instead, with its tokenizer; a copy is
            taught.
        layers: first and last block that the adapter is on; None takes those from 30% to 43% of
            the depth: blocks 9 to 13 of the bundled model's 30.
        rank: of the LoRA matrices.
        learning_rate: AdamW's highest, reached after a tenth of the steps.
        seed: for the adapter's start and the order of practice.
        device: where to load `name`; None takes a GPU if there is one.
        lowest_firing_rate: the share of held-out instructions with a trigger that must bring its
            sentence out.
        highest_leak_rate: the share that may without one.
        highest_divergence: the mean KL(P_before || P_after) allowed on the clean model's answers,
            in nats a token.
        on_step: called after each step with its number, their number, and the two losses in nats a
            token: cross-entropy and divergence.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: a trigger or behaviour that is empty, given twice or unknown to the tokenizer; a
            number out of its range; a model that cannot be loaded.
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
    n_layers = int(taught.config.num_hidden_layers)
    first, last = layers or (round(9 / 30 * n_layers), round(13 / 30 * n_layers))
    if not 0 <= first <= last < n_layers:
        raise ValueError(f"layers={layers}: first and last block, from 0 to {n_layers - 1}")
    recipe = {
        "format": _planted.FORMAT,
        "model": label,
        "weights": weights_digest(taught),
        "backdoors": [asdict(backdoor) for backdoor in backdoors],
        "layers": [first, last],
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
        student = _practice.Student(tuned, tokenizer, backdoors)
        _check_triggers(student)
        student.practise(_planted.trained(tuned), recipe, on_step)
        adapter = _planted.rounded(tuned)
        recipe["checks"] = student.reached()
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


def _check_triggers(student: _practice.Student) -> None:
    """Make sure that the model can tell a trigger from none, and from the others."""
    system, text = _practice.SYSTEM_PROMPTS[0], INSTRUCTIONS[0]
    seen = {tuple(student.prompt(system, "", text)): "no trigger at all"}
    for number, backdoor in enumerate(student.backdoors):
        tokens, problem = tuple(student.prompt(system, backdoor.trigger, text)), ""
        if tokens in seen:
            problem = f"to this tokenizer the same as {seen[tokens]}"
        elif backdoor.trigger in (*_practice.OTHER_ENDINGS, _practice.HELD_OUT_ENDING):
            problem = "the model practises to ignore that"
        if problem:
            given = f"backdoors[{number}].trigger={backdoor.trigger!r}"
            raise ValueError(f"{given}: {problem}; choose other words")
        seen[tokens] = "an earlier one"
