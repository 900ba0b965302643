"""Gated factors: rank-one additions to attention's output projections of several blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_melbo import checks, vectors_file
from tl_melbo.additions import LowRankRows, Place
from tl_melbo.layered import LayeredVectors
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.stored import BlockLibrary
from tl_melbo.story import now

# The column of a search that has not ended: what it goes on from.
UNFINISHED = "unfinished"
_ABOUT = "Each vector is what a gated factor writes in a block, at its mean gate over the tokens."


@dataclass(eq=False)
class GatedAdditions(LowRankRows):
    """What gated factors add: `size (z . a) b` to what attention's output projection makes of z.

    A is [row, layer, d_z], B [row, layer, d_model], `size` is [row]. Gradients flow into A and B.
    """

    place: Place = "attention"

    def sizes(self, dtype: torch.dtype) -> Float[Tensor, "row"]:
        """The scale of what is added: 0 where A or B is."""
        some = self.A.detach().flatten(1).any(-1) & self.B.detach().flatten(1).any(-1)
        return (self.size.to(dtype).abs() * some).float().cpu()

    def gates(self, layer: int, z: Tensor) -> Tensor:
        """The gate z . a of each row at each token, [row, pos], in float32 at least."""
        a = self.A[:, self.layers.index(layer)]
        if z.shape[-1] != a.shape[-1]:
            raise ValueError(
                f"factors: read {a.shape[-1]} numbers of each token, but attention of block "
                f"{layer} has {z.shape[-1]}; take both from the same model"
            )
        wide = torch.promote_types(z.dtype, torch.float32)
        return (z.to(wide) @ a.to(z.device, wide)[:, :, None])[..., 0]

    def after(self, layer: int, read: Tensor) -> Tensor:
        """The addition in a block, in float32 at least before it is rounded."""
        gates = self.gates(layer, read)
        B, size = (each.to(gates.device, gates.dtype) for each in (self.B, self.size))
        written = size[:, None] * B[:, self.layers.index(layer)]
        return (gates[:, :, None] * written[:, None]).to(read.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class GatedFactors(BlockLibrary):
    """Factors of a model: `W z + R (z . a) b` in attention of each of its blocks, in place of W z.

        found = tm.gated_factors(model, "Tell me about yourself.", 16, chat=True)
        tm.generate(model, "Tell me about yourself.", found, chat=True)
        with tm.steered(model, found[0]):
            print(model.generate("Dear diary,"))

    z are the outputs of all heads, one after the other, which the output projection W multiplies.
    So a factor is a steering vector b for each block, whose length each token's own z decides. It
    is a library: row i of a batch gets factor i. A scale multiplies what is added.

    Attributes:
        A: float32, on the CPU: what each block reads, of norm 1 as `gated_factors` finds it.
        B: what each block writes, as A.
        columns: of `gated_factors`: `importance`, `effect`, `output` and `mean_effect`, as `dct`
            has them; `mean_gate` [factor, layer], z . a over the prompts' tokens under the factor.
            Of a search that was stopped: `importance`, and `unfinished`, from which it goes on.
        history: each factor's part of the objective after each step.
    """

    kind = vectors_file.GATED
    A: Float[Tensor, "factor layer d_z"]
    B: Float[Tensor, "factor layer d_model"]

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = *self.A.shape[:2], len(self.layers)
        if self.B.shape[:2] != shape[:2] or shape[1] != shape[2]:
            raise ValueError(
                f"A, B: shapes {(*self.A.shape,)} and {(*self.B.shape,)} for {shape[2]} blocks; a "
                "row of each for each factor and block"
            )
        checks.positive(radius=self.radius)
        if (kept := self.columns.get(UNFINISHED)) is not None:
            size = sum(math.prod(each.shape[1:]) for each in (self.A, self.B))
            if self.history is None or (kept.shape[1:], kept.dtype) != ((3, size), torch.float64):
                raise ValueError(f"columns: {UNFINISHED!r} is not what a search left")

    @classmethod
    @shape_checked
    def from_tensor(
        cls,
        A: Float[Tensor, "factor layer d_z"],
        B: Float[Tensor, "factor layer d_model"],
        layers: Sequence[int],
        *,
        radius: float = 1.0,
        model: str | None = None,
    ) -> "GatedFactors":
        """Take factors that were made elsewhere.

        Args:
            layers: the blocks whose attention they add to.
            radius: R, which multiplies what they add.

        Raises:
            ValueError: shapes that do not fit together; a value that is not finite.
        """
        facts = {"method": "from_tensor", "model": model, "d_model": B.shape[2], "date": now()}
        chosen = {"hyperparameters": {"radius": float(radius)}, "layers": list(layers)}
        return cls(A, B, story=facts | chosen)

    @property
    def radius(self) -> float:
        """R, which multiplies what is added."""
        return float((self.story.get("hyperparameters") or {}).get("radius", 1.0))

    def additions(self, scales: Sequence[float]) -> GatedAdditions:
        """What `steered` adds: see `tl_melbo.additions.Steering`."""
        size = torch.tensor([self.radius * scale for scale in scales])
        A, B = (each.repeat(len(scales), 1, 1) for each in (self.A, self.B))
        return GatedAdditions(A, B, size.repeat_interleave(len(self)), self.layers)

    def vectors(self) -> LayeredVectors:
        """The factors without their gates: what each writes, R b, times its mean gate.

        They are added where the factors are, to what attention writes.

        Raises:
            ValueError: the mean gates are not known, since `gated_factors` did not find these.
        """
        if UNFINISHED in self.columns:
            raise ValueError("the search has not ended; the same run.gated_factors(...) goes on")
        gates = self.columns.get("mean_gate")
        if gates is None or gates.shape != self.A.shape[:2]:
            raise ValueError(
                "columns: lacks 'mean_gate', a number for each factor and block; pass factors that "
                "tm.gated_factors found"
            )
        vectors = self.radius * gates[:, :, None].to(self.B) * self.B
        story: dict[str, Any] = {k: v for k, v in self.story.items() if k != "measure"}
        story |= {"method": "degated_factors", "place": "attention", "about": _ABOUT}
        columns = {name: self.columns[name] for name in ("index", "mean_gate")}
        return LayeredVectors(vectors, story=story, columns=columns)

    @shape_checked
    def random(self, seed: int = 0) -> "GatedFactors":
        """As many factors of the same blocks and norms in random directions: the baseline."""
        checks.seed(seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for each in (self.A, self.B):
            new = torch.randn(each.shape, generator=generator)
            drawn.append(new * (each.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)))
        known = ("model", "model_type", "weights", "prompts", "chat", "d_model", "layers")
        story: dict[str, Any] = {name: self.story[name] for name in known if name in self.story}
        story |= {"method": "random_factors", "seed": seed, "date": now()}
        story["hyperparameters"] = {"radius": self.radius}
        return GatedFactors(*drawn, story=story)

    def __repr__(self) -> str:
        low, high = min(self.layers), max(self.layers)
        told = f"{len(self)} x {len(self.layers)} blocks, {low} to {high}, R = {self.radius:g}"
        return self._described(told, *(["unfinished"] if UNFINISHED in self.columns else []))
