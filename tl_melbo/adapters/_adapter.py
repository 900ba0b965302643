"""An adapter: a low-rank map of the residual stream whose addition has a constant length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tl_melbo import checks, story, vectors_file
from tl_melbo.adapters import _sampling
from tl_melbo.adapters._situations import prompts_of
from tl_melbo.additions import Additions, LowRankRows, Place
from tl_melbo.errors import NotFinite
from tl_melbo.generation import OnBatch, Tell, in_parts
from tl_melbo.layered import LayeredVectors
from tl_melbo.model.bridge import (
    Model,
    model_name,
    model_type,
    plain_model,
    residual_streams,
    weights_digest,
)
from tl_melbo.model.tokens import check_room, to_tokens
from tl_melbo.shapes import Float, Tokens, checked_slice, shape_checked
from tl_melbo.steering import as_chat, hooked, steering_rows
from tl_melbo.stored import BlockLibrary
from tl_melbo.vectors import SteeringVectors

Estimator = Literal["difference", "addition"]
# Texts sampled at once.
_BATCH = 16
_ABOUT = {
    "difference": "Each vector is the mean over tokens of the residual stream with the adapter "
    "less that without it; it holds what earlier blocks added, too.",
    "addition": "Each vector is the mean over tokens of what the adapter adds after the block.",
}


@dataclass(eq=False)
class AdapterAdditions(LowRankRows):
    """What adapters add: `size * h A B / |h A B|` to the residual stream h, row by row.

    A is [row, pair, d_model, rank], B [row, pair, rank, d_model]: one pair for all blocks, or one
    for each. `size` is [row]. Gradients flow into A and B.
    """

    place: Place = "block"

    def sizes(self, dtype: torch.dtype) -> Float[Tensor, "row"]:
        """The length of what is added: 0 where B is."""
        some = self.B.detach().flatten(1).any(-1)
        return (self.size.to(dtype).abs() * some).float().cpu()

    def after(self, layer: int, read: Tensor) -> Tensor:
        """The addition after a block, in float32 at least before it is rounded."""
        pair = 0 if self.A.shape[1] == 1 else self.layers.index(layer)
        h = read.to(torch.promote_types(read.dtype, torch.float32))
        A, B, size = (each.to(h.device, h.dtype) for each in (self.A, self.B, self.size))
        low = h @ A[:, pair]
        return (size[:, None, None] * _direction(low, low @ B[:, pair])).to(read.dtype)


def _direction(low: Tensor, added: Tensor) -> Tensor:
    """The addition at length 1; 0 where it is 0, with the gradient of `h A B / |h A|`.

    A tiny constant below the fraction would give a gradient so large that the optimiser's running
    mean of squares would hold B in place from then on.
    """
    norm, reference = added.norm(dim=-1, keepdim=True), low.detach().norm(dim=-1, keepdim=True)
    norm = torch.where(norm > 0, norm, reference)
    return added / torch.where(norm > 0, norm, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(BlockLibrary):
    """Adapters of a model: `h + length * h A B / |h A B|` after each of its blocks.

        adapter = tm.divergence_adapter(model, n_adapters=8)
        tm.generate(model, "Dear diary,", adapter)
        with tm.steered(model, adapter[0]):
            print(model.generate("Dear diary,"))

    It is a library: `adapter[3]` is one of them, and row i of a batch gets adapter i. A scale
    multiplies what is added. Where B is 0, nothing is added.

    Attributes:
        A, B: float32, on the CPU. One pair for all blocks, or one for each.
        columns: what was measured at the end of the training: `loss`, `kl`, `nll`, `entropy` and
            `entropy_without` the adapter (all in nats a token), `repetition`, `collapsed` (1 or 0).
        history: the loss after each step.
    """

    kind = vectors_file.ADAPTER
    A: Float[Tensor, "adapter pair d_model rank"]
    B: Float[Tensor, "adapter pair rank d_model"]

    def __post_init__(self) -> None:
        super().__post_init__()
        shape, n_layers = self.A.shape, len(self.layers)
        if self.B.shape != (*shape[:2], shape[3], shape[2]):
            raise ValueError(f"B: shape {(*self.B.shape,)} does not belong to A's {(*shape,)}")
        if shape[1] not in (1, n_layers):
            raise ValueError(f"A: {shape[1]} pairs for {n_layers} blocks; one for all or for each")
        check_rank(shape[3], shape[2])
        checks.positive(length=self.length)

    @classmethod
    @shape_checked
    def from_tensor(
        cls,
        A: Float[Tensor, "adapter pair d_model rank"],
        B: Float[Tensor, "adapter pair rank d_model"],
        layers: Sequence[int],
        *,
        length: float = 2.0,
        model: str | None = None,
    ) -> "Adapter":
        """Take adapters that were made elsewhere, for these blocks; ValueError if they do not fit.

        `length` is in the residual stream's units.
        """
        facts: dict[str, Any] = {"method": "from_tensor", "model": model, "d_model": A.shape[2]}
        facts |= {"date": story.now(), "layers": list(layers)}
        return cls(A, B, story={**facts, "hyperparameters": {"length": float(length)}})

    @property
    def rank(self) -> int:
        """The rank of A B."""
        return self.A.shape[3]

    @property
    def length(self) -> float:
        """The length of what is added after each block, in the residual stream's units."""
        return float((self.story.get("hyperparameters") or {}).get("length", 2.0))

    def additions(self, scales: Sequence[float]) -> AdapterAdditions:
        """What `steered` adds: see `tl_melbo.additions.Steering`."""
        size = torch.tensor([self.length * scale for scale in scales])
        A, B = (each.repeat(len(scales), 1, 1, 1) for each in (self.A, self.B))
        return AdapterAdditions(A, B, size.repeat_interleave(len(self)), self.layers)

    @shape_checked
    def vectors(
        self,
        model: Model,
        prompts: str | Sequence[str] | None = None,
        estimator: Estimator = "difference",
        layer: int | None = None,
        *,
        max_new_tokens: int = 32,
        positions: slice = slice(None),
        seed: int = 0,
        chat: bool | None = None,
        on_batch: OnBatch | None = None,
    ) -> LayeredVectors | SteeringVectors:
        """The vector of each block that does most nearly what the adapter does.

        The mean over all tokens of the prompts and of a continuation, which the adapted model
        samples: of what the adapter changes in the residual stream after the block, all that
        earlier blocks did included ("difference", for one block each); or of what the adapter adds
        there to the unsteered model ("addition", for all blocks at once).

        Args:
            prompts: None takes the held-out prompts of `tm.adapters.situations`.
            layer: the block of which a vector is wanted; None for all blocks of the adapter.
            max_new_tokens: of the continuation; 0 takes the prompts alone.
            positions: which tokens of each text count; the first is an attention sink in many
                models.
            on_batch: called with the texts done, and those in all, of all adapters, after each.

        Returns:
            `LayeredVectors`, or `SteeringVectors` of one block. The column `constant_share` is
            |mean|² / mean |.|², over the tokens: 1 if the same was added to all.

        Raises:
            ValueError: a block without an adapter, or no room for the continuation.
            NotFinite: a residual is not finite.
        """
        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer={layer}: the adapter's blocks are {list(self.layers)}")
        checks.at_least(0, max_new_tokens=max_new_tokens)
        checks.seed(seed)
        positions = checked_slice(positions)
        rows = steering_rows(model, self, None, [1.0])
        texts = checks.as_texts(prompts_of("held_out") if prompts is None else prompts)
        chat = as_chat(self, chat)
        tokens = [to_tokens(model, text, chat) for text in texts]
        check_room(model, tokens, max_new_tokens)
        means, shares, tells = [], [], in_parts(on_batch, [len(tokens)] * len(rows))
        for row, number in enumerate(self.columns["index"].tolist()):
            added, random = rows[row : row + 1], _sampling.generator(seed, number)
            effects = (
                _effects(model, added, text, estimator)[:, [*range(text.shape[1])[positions]]]
                for text in _continued(model, added, tokens, max_new_tokens, random)
            )
            mean, share = _mean_and_share(effects, tells[row], len(tokens))
            means.append(mean)
            shares.append(share)
        chosen = {"estimator": estimator, "max_new_tokens": max_new_tokens}
        facts = story.make(
            "adapter_vectors",
            **facts_of(model),
            layers=list(self.layers),
            prompts=texts,
            chat=chat,
            seed=seed,
            adapter={name: self.story.get(name) for name in ("method", "seed", "hyperparameters")},
            hyperparameters=chosen | {"positions": story.slice_to_json(positions)},
            about=_ABOUT[estimator],
        )
        columns = {"index": self.columns["index"], "constant_share": torch.stack(shares)}
        found = LayeredVectors(torch.stack(means), story=facts, columns=columns)
        return found if layer is None else found.at(layer)

    def __repr__(self) -> str:
        blocks, shared = f"{len(self.layers)} blocks", self.A.shape[1] == 1
        where = "shared by" if shared else "in each of"
        told = f"{len(self)} of rank {self.rank}, {where}"
        return self._described(f"{told} {blocks}", f"length {self.length:g}")


def facts_of(model: Model) -> dict[str, Any]:
    """Which model it is, for the metadata."""
    facts = {"model": model_name(model), "model_type": model_type(model)}
    return {**facts, "weights": weights_digest(model), "d_model": int(model.cfg.d_model)}


def check_rank(rank: int, d_model: int) -> None:
    """A rank must not be over the width."""
    if not 1 <= rank <= d_model:
        raise ValueError(f"rank={rank}: from 1 to d_model={d_model}")


def _mean_and_share(parts: Iterable[Tensor], tell: Tell, n_parts: int) -> tuple[Tensor, Tensor]:
    """The mean over tokens of vectors, [layer, pos, d_model], and its share of the mean square."""
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for number, vectors in enumerate(parts, 1):
        total = total + vectors.sum(1)
        squares = squares + vectors.square().sum((1, 2))
        count += vectors.shape[1]
        tell(number, n_parts)
    if not count:
        raise ValueError("positions: no token of any text; pass a longer slice")
    if not squares.isfinite().all():
        raise NotFinite("the adapted residual stream is not finite; load the model in a wider type")
    mean, squares = total / count, squares / count
    share = mean.square().sum(-1) / squares.clamp_min(torch.finfo(torch.float64).tiny)
    return mean.float(), share.float()


def _continued(
    model: Model,
    added: Additions,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    random: torch.Generator,
) -> Iterator[Tokens]:
    """Each prompt and what the adapted model samples after it."""
    if not max_new_tokens:
        yield from prompts
        return
    _sampling.check_can_sample(model)
    plain = plain_model(model)
    for first in range(0, len(prompts), _BATCH):
        some = prompts[first : first + _BATCH]
        drawn = _sampling.sample(model, plain, added, some, max_new_tokens, random)
        yield from (row[kept][None] for row, kept in zip(drawn.tokens, drawn.text, strict=True))


def _effects(model: Model, added: Additions, tokens: Tokens, estimator: str) -> Tensor:
    """What the adapter changes after each of its blocks: float64 [layer, pos, d_model]."""
    without = residual_streams(model, tokens, added.layers)
    if estimator == "addition":
        pairs = zip(added.layers, without, strict=True)
        effects = [added.after(layer, residual) for layer, residual in pairs]
    else:
        with hooked(model, added):
            adapted = residual_streams(model, tokens, added.layers)
        pairs = zip(adapted, without, strict=True)
        effects = [one.double() - other.double() for one, other in pairs]
    return torch.cat([each.double().cpu() for each in effects])
