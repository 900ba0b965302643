"""What an engine is: requests of tokens and a vector, answered with tokens or log-probabilities."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_melbo.additions import Additions, VectorAdditions
from tl_melbo.model.bridge import Model, model_device, model_name, weights_digest
from tl_melbo.model.tokens import end_tokens
from tl_melbo.reading import map_rows
from tl_melbo.shapes import Float, Tokens

# Requests that an engine gets at once, between two calls of `on_batch`.
_AT_ONCE = 1024
# How much a vector has to change the next token for a test of whether it is there, in nats.
_CLEAR = 0.5
_LONGER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, and what is added after some blocks at every position; a seed and temperature."""

    tokens: tuple[int, ...]
    theta: Float[Tensor, "layer d_model"] | None = None  # None for the unsteered model
    layers: tuple[int, ...] = ()
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    salt: str = field(init=False)

    def __post_init__(self) -> None:
        if self.theta is not None and not self.theta.any():
            object.__setattr__(self, "theta", None)
        told = json.dumps(self.layers).encode()
        held = b"" if self.theta is None else told + self.theta.numpy().tobytes()
        # Keys and values under one vector must never be read under another.
        object.__setattr__(self, "salt", hashlib.sha256(b"tl_melbo" + held).hexdigest())


@runtime_checkable
class Engine(Protocol):
    """What writes with vectors. Each request has one of its own, or none."""

    tolerance: float
    agreed: set[tuple[str, tuple[int, ...]]]

    def write(
        self, requests: Sequence[Request], max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """The new tokens of each; a text ends at any of `ends`."""
        ...

    def log_probs(self, requests: Sequence[Request]) -> list[dict[int, float]]:
        """Of each request, the log-probabilities of the likeliest next tokens."""
        ...


def texts_by(
    engine: Engine,
    model: Model,
    prompts: Sequence[Tokens],
    rows: Additions,
    labels: Sequence[tuple[int, float, int]],
    temperature: float,
    seed: int,
    max_new_tokens: int,
    on_batch: Callable[[int, int], None] | None,
) -> list[str]:
    """What an engine writes after each prompt, for each label: vector, scale and sample."""
    if not isinstance(rows, VectorAdditions) or rows.place != "block":
        what = "an engine adds vectors after blocks, and no adapters or gated factors"
        raise ValueError(f"vectors: {what}; pass their .vectors(), or leave engine= out")
    layers, added = tuple(rows.layers), rows.theta.cpu()
    requests = []
    for number, tokens in enumerate(prompts):
        prompt = tuple(tokens[0].tolist())
        for place, label in enumerate(labels):
            digest = hashlib.sha256(json.dumps([seed, number, *label]).encode()).digest()
            warm = temperature if label[-1] else 0.0
            theta = added[place % len(rows)]
            own = int.from_bytes(digest[:4], "big") >> 1
            requests.append(Request(prompt, theta, layers, warm, own))
    steered = max(requests, key=lambda r: 0.0 if r.theta is None else float(r.theta.norm()))
    _check_agreement(engine, model, steered)
    hf_model = getattr(model, "original_model", None)
    ends = end_tokens(model.tokenizer, hf_model, int(model.cfg.d_vocab))
    texts = []
    for start in range(0, len(requests), _AT_ONCE):
        for new in engine.write(requests[start : start + _AT_ONCE], max_new_tokens, ends):
            kept = list(itertools.takewhile(lambda token: token not in ends, new))
            texts.append(str(model.tokenizer.decode(kept, skip_special_tokens=True)))
        if on_batch is not None:
            on_batch(len(texts), len(requests))
    return texts


def _check_agreement(engine: Engine, model: Model, request: Request) -> None:
    """Once for each model and block: the engine's distributions are the model's, with and without.

    Steered is asked for before and after unsteered, since a cache that they share would show there.
    """
    steers = request.theta is not None
    key = (weights_digest(model), request.layers if steers else ())
    if key in engine.agreed:
        return
    plain = replace(request, theta=None)
    theta = torch.zeros(1, int(model.cfg.d_model)) if request.theta is None else request.theta
    # As long as it takes: a vector that does nothing here would not show that it is left out.
    scales = torch.tensor([0.0, *(_LONGER if steers else ())])
    rows = VectorAdditions(scales[:, None, None] * theta, request.layers if steers else (0,))
    tokens = torch.tensor([request.tokens], device=model_device(model))
    ours = map_rows(model, tokens, rows, lambda x: x[:, -1].double().log_softmax(-1).cpu(), 8, 1)
    asked = [plain]
    expected = [ours[0]]
    if steers:
        kl = (ours.exp() * (ours - ours[0])).sum(-1)
        clear = [place for place, each in enumerate(kl.tolist()) if each >= _CLEAR]
        if not clear:
            raise ValueError(
                "engine: the longest of the vectors does so little after the first prompt that it "
                "cannot be seen whether the engine adds it; leave engine= out"
            )
        # Steered first: what it leaves in a cache is there for the unsteered one to read.
        steered = replace(request, theta=rows.theta[clear[0]])
        asked, expected = [steered, plain, steered], [ours[clear[0]], ours[0], ours[clear[0]]]
    for number, (each, own) in enumerate(zip(asked, expected, strict=True)):
        (theirs,) = engine.log_probs([each])
        # A wide tolerance is no reason to take what is not steered for what is.
        apart, unsteered = _apart(own, theirs), _apart(ours[0], theirs)
        if apart > engine.tolerance or unsteered < apart:
            if number:
                why = "one request changes the next; do requests with other salts share a cache?"
            elif steers and unsteered <= engine.tolerance:
                why = "it leaves the vector out; is its plugin, vllm-lens, installed there?"
            else:
                what = "with a vector" if steers else "without a vector"
                why = f"its log-probabilities {what} are others; is it the same model, unquantised?"
            raise ValueError(
                f"engine: {engine!r} does not do what {model_name(model)} does: {why} They are "
                f"{apart:.3g} nats apart, allowed are tolerance={engine.tolerance:g}"
            )
    engine.agreed.add(key)


def _apart(ours: Tensor, theirs: dict[int, float]) -> float:
    """The mean difference of log-probabilities, weighted by ours; infinite where none came."""
    if not theirs or not all(0 <= token < len(ours) for token in theirs):
        return float("inf")
    own = ours[torch.tensor([*theirs])]
    other = torch.tensor([*theirs.values()], dtype=torch.float64)
    apart = (own.softmax(-1) * (own - other).abs()).sum()
    # The likeliest tokens are there: the log of what is left of ours is no part of the mean.
    return float(apart) if ours.argmax().item() in theirs and apart.isfinite() else float("inf")
