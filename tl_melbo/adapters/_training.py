"""Train adapters that make a model say something else, without saying what."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_melbo import checks, story
from tl_melbo.adapters import _sampling, _situations
from tl_melbo.adapters._adapter import Adapter, AdapterAdditions, check_rank, facts_of
from tl_melbo.adapters._loss import Measured, loss_and_gradients
from tl_melbo.analysis._coherence import DEFAULT_REPETITION, repetition
from tl_melbo.discovery._search import Parts, collecting
from tl_melbo.errors import NotFinite, warn_user
from tl_melbo.model.bridge import Model, check_layer, check_model, model_device, plain_model
from tl_melbo.model.tokens import check_room, to_tokens

_COLUMNS = (*Measured._fields, "repetition")
# A model whose next token is this uncertain, as a share of the most there can be, writes gibberish.
_LARGEST_ENTROPY, _MOST_ABOVE = 0.5, 1.5
# Nor does a model write sense whose tokens are this unlikely to the model without the adapter. Of
# the bundled model's adapters, one of slogans had 3.9 nats a token, one of gibberish 8.3.
_LARGEST_SURPRISE = 0.65
# The last quarter of the steps tells how a training ended.
_END = 4

OnStep = Callable[[int, int, Measured], None]


class Training(Parts[Adapter]):
    """A training that yields adapters, one after another."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        numbers: range,
        layers: Sequence[int],
        chat: bool,
        progress: bool,
        on_step: OnStep | None,
        seed: int,
        **settings: Any,
    ) -> None:
        self.model, self.numbers, self.seed = model, numbers, seed
        self.progress, self.on_step, self.settings = progress, on_step, settings
        self.prompts = [to_tokens(model, prompt, chat) for prompt in prompts]
        check_room(model, self.prompts, settings["max_new_tokens"])
        self.n_steps = settings["steps"] or math.ceil(len(prompts) / settings["batch_size"])
        made = story.make(
            "divergence_adapter",
            **facts_of(model),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            prompts=list(prompts),
            chat=chat,
            layers=list(layers),
            seed=seed,
            hyperparameters={**settings, "steps": self.n_steps, "layers": list(layers)},
            measure=story.measure("loss", "loss", "nats a token", "step"),
            about="The adapter was trained to make the model write something else, whatever it is: "
            "its texts are unlike those of the model without it, and the adapted model is sure of "
            "them.",
        )
        super().__init__(made, self._run())

    def _run(self) -> Iterator[Adapter]:
        total = len(self.numbers) * self.n_steps
        with tqdm(total=total, desc="adapters", unit="step", disable=not self.progress) as bar:
            for number in self.numbers:
                with torch.inference_mode(False), torch.enable_grad():
                    adapter = self._train(number, bar)
                yield adapter

    def _train(self, number: int, bar: Any) -> Adapter:
        random = _sampling.generator(self.seed, number)
        rows, plain = self._begin(random), plain_model(self.model)
        optimiser = torch.optim.AdamW([rows.A, rows.B], lr=self.settings["learning_rate"])
        alpha, beta = self.settings["alpha"], self.settings["beta"]
        measured, order = [], []
        for step in range(self.n_steps):
            if not order:
                order = torch.randperm(len(self.prompts), generator=random).tolist()
            size = self.settings["batch_size"]
            batch, order = [self.prompts[i] for i in order[:size]], order[size:]
            length = self.settings["max_new_tokens"]
            drawn = _sampling.sample(self.model, plain, rows, batch, length, random)
            told, gradients = loss_and_gradients(self.model, plain, rows, drawn, alpha, beta)
            rows.A.grad, rows.B.grad = gradients
            if not math.isfinite(told.loss) or not all(g.isfinite().all() for g in gradients):
                what = f"adapter {number}: its loss or gradient at step {step + 1} is not finite"
                advice = "use a smaller length or learning rate, or load the model in a wider type"
                raise NotFinite(f"{what}; {advice}", [number])
            optimiser.step()
            pairs = zip(drawn.tokens, drawn.sampled, strict=True)
            repeated = [repetition(row[own].tolist()) for row, own in pairs]
            measured.append([*told, sum(repeated) / len(repeated)])
            bar.update()
            if self.on_step is not None:
                self.on_step(number, step + 1, told)
        return self._finished(number, rows, torch.tensor(measured))

    def _begin(self, random: torch.Generator) -> AdapterAdditions:
        """A normal, B zero: what is added is zero."""
        chosen, weight = self.settings, next(self.model.parameters())
        pairs = 1 if chosen["shared"] else len(self.story["layers"])
        A = torch.randn(1, pairs, int(self.model.cfg.d_model), chosen["rank"], generator=random)
        wide = torch.promote_types(weight.dtype, torch.float32)
        A = A.to(model_device(self.model), wide).requires_grad_()
        B = torch.zeros_like(A.detach().mT).requires_grad_()
        size = torch.full((1,), chosen["length"], dtype=wide, device=A.device)
        return AdapterAdditions(A, B, size, self.story["layers"])

    def _finished(self, number: int, rows: AdapterAdditions, measured: Tensor) -> Adapter:
        end = measured[-math.ceil(len(measured) / _END) :].mean(0)
        columns = {name: end[[place]] for place, name in enumerate(_COLUMNS)}
        means = dict(zip(_COLUMNS, end.tolist(), strict=True))
        why = _collapse(means, int(self.model.cfg.d_vocab))
        if why:
            warn_user(
                f"adapter {number} has collapsed: {why}. Use fewer steps, a smaller learning_rate "
                "or length, or a smaller alpha beside beta"
            )
        columns |= {"collapsed": torch.tensor([int(bool(why))]), "index": torch.tensor([number])}
        history = measured[None, :, 0]
        return Adapter(rows.A, rows.B, story=self.story, columns=columns, history=history)


def _collapse(means: Mapping[str, float], d_vocab: int) -> str:
    """Why what an adapter writes is gibberish, or nothing."""
    # A model that is as uncertain without the adapter has not collapsed.
    usual = _MOST_ABOVE * means["entropy_without"]
    most = max(_LARGEST_ENTROPY * math.log(d_vocab), usual)
    surprise = means["kl"] + means["entropy"]
    reasons = []
    if means["repetition"] > DEFAULT_REPETITION:
        reasons.append(f"a share of {means['repetition']:.2f} of what it writes repeats itself")
    if means["entropy"] > most:
        reasons.append(f"its next token has an entropy of {means['entropy']:.1f} nats")
    if surprise > max(_LARGEST_SURPRISE * math.log(d_vocab), usual):
        reasons.append(f"the model without it is surprised by {surprise:.1f} nats a token")
    return " and ".join(reasons)


@functools.partial(collecting, kind=Adapter)
def divergence_adapter(
    model: Model,
    prompts: str | Sequence[str] | None = None,
    n_adapters: int = 1,
    seed: int = 0,
    rank: int = 2,
    shared: bool = True,
    alpha: float = 1.1,
    beta: float = 0.3,
    learning_rate: float = 0.1,
    batch_size: int = 12,
    max_new_tokens: int = 128,
    *,
    steps: int | None = None,
    length: float = 2.0,
    layers: Sequence[int] | None = None,
    chat: bool = False,
    first: int = 0,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> Training:
    """Train adapters under which the model writes something else, without saying what.

    Each step samples continuations of a batch of prompts from the adapted model P. Then AdamW
    lowers the mean over the sampled tokens of `-alpha KL(P || Q) + beta NLL_P(token)`, where Q is
    the model without the adapter. A warning tells of an adapter that has collapsed into gibberish.

    Args:
        prompts: what is continued; None takes those for training of `tm.adapters.situations`.
        n_adapters: each from a start of its own; adapter k is the same whatever their number.
        shared: one pair of matrices for all blocks, or one for each.
        steps: of the optimiser; None goes through the prompts once.
        length: of what is added after each block, in the residual stream's units.
        layers: the blocks with an adapter; None takes all.
        first: the number of the first adapter, to go on where an earlier call ended.
        on_step: called after each step with the numbers of adapter and step, and what was measured.

    Returns:
        The adapters, with the loss after each step, and the columns that `Adapter` names: means
        over the last quarter of the steps.

    Raises:
        ValueError: a rank over the width, an unknown block, a number out of its range, prompts that
            leave no room for the tokens.
        NotFinite: logits, loss or gradient are not finite.

    Source: the divergence objective of "steer-clear" (2025).
    """
    check_model(model)
    _sampling.check_can_sample(model)
    checks.at_least(
        1, n_adapters=n_adapters, batch_size=batch_size, max_new_tokens=max_new_tokens, steps=steps
    )
    checks.at_least(0, first=first)
    checks.seed(seed)
    check_rank(rank, int(model.cfg.d_model))
    checks.positive(learning_rate=learning_rate, length=length)
    checks.between(0, math.inf, "a weight", alpha=alpha, beta=beta)
    blocks = range(int(model.cfg.n_layers)) if layers is None else layers
    for layer in blocks:
        check_layer(model, layer, "layers")
    if not blocks or len({*blocks}) < len(blocks):
        raise ValueError(f"layers={list(blocks)}: numbers of blocks, each once")
    settings: dict[str, Any] = {"rank": rank, "shared": shared, "length": length, "steps": steps}
    settings |= {"alpha": alpha, "beta": beta, "learning_rate": learning_rate}
    settings |= {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    texts = checks.as_texts(_situations.prompts_of("train") if prompts is None else prompts)
    numbers = range(first, first + n_adapters)
    return Training(model, texts, numbers, blocks, chat, progress, on_step, seed, **settings)
