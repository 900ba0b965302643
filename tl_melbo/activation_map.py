"""The activation map f: from the residual stream after one block to that after a later one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_melbo import checks, shortcut
from tl_melbo.memory import add_gram, free_memory, map_batches
from tl_melbo.model.bridge import Model, check_model, model_name, model_type, weights_digest
from tl_melbo.replay import Group, Picked, capture_prompts, push
from tl_melbo.shapes import Delta, PositionMask, Residual, Theta, checked_slice, shape_checked

# How far replaying the blocks may be from the model's own forward pass, relative to its size.
_REPLAY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Tokens at once beyond which a CPU gains nothing; vectors at once that fill a large GPU.
_CPU_ROWS, _GPU_VECTORS = 1200, 1024
# Between any two paths f(x) differed by at most 5.4 eps |y| on five architectures in float32, and
# by 2.0 eps |y| in narrow types, whose products are summed in float32.
_ROUNDING, _NARROW_ROUNDING = {torch.float64: 8.0, torch.float32: 8.0}, 3.0


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMap:
    """f(x): the residual stream after `source_layer` pushed through to after `target_layer`.

    Only the blocks between run, with the arguments that they got in one ordinary forward pass.
    `path` tells which code runs: "hooked", the model's own modules; "unhooked", the Hugging Face
    modules below; "fast", for blocks of the Llama kind. A faster path is taken if it gave the
    model's own results when the map was made, until hooks, modules or weights change (except
    through a tensor's `.data`).

    Attributes:
        x: residual stream after `source_layer` of the unsteered prompts, padded on the left.
        y: f(x).
        mask: True where `x` holds a token.

    Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
    """

    model: Model
    prompts: tuple[str, ...]
    chat: bool
    source_layer: int
    target_layer: int
    x: Residual
    y: Residual
    mask: PositionMask
    batch_size: int | None
    _groups: tuple[Group, ...]
    _watched: shortcut.Watched
    _state: shortcut.State
    _shortcut: shortcut.Shortcut | None = None
    # f(x) under the hooks that are there now; what each slice picks.
    _unsteered_memo: dict[shortcut.State, Residual] = field(default_factory=dict)
    _picked_memo: dict[tuple[int | None, ...], Picked] = field(default_factory=dict)

    @classmethod
    @shape_checked
    def from_prompts(
        cls,
        model: Model,
        prompts: str | Sequence[str],
        source_layer: int = 8,
        target_layer: int = 16,
        *,
        chat: bool = False,
        batch_size: int | None = None,
    ) -> "ActivationMap":
        """Run the prompts once and remember what the blocks in between need.

        Args:
            source_layer: vectors are added to the residual stream after this block.
            target_layer: their effect is read in the residual stream after this one.
            chat: format each prompt as a user's turn with the tokenizer's chat template.
            batch_size: vectors at a time in `delta`; None picks what fits in memory.

        Raises:
            ValueError: also for activations that are not finite.
            RuntimeError: the blocks alone do not do what they do inside the model.
        """
        check_model(model)
        _check_layers(model, source_layer, target_layer)
        checks.at_least(1, batch_size=batch_size)
        f = cls._hooked_between(model, prompts, chat, source_layer, target_layer, batch_size)
        if f._state[0]:
            return f
        return replace(f, _shortcut=shortcut.find(f._blocks(), f._groups, f.x, f.mask))

    @classmethod
    def _hooked_between(
        cls,
        model: Model,
        prompts: str | Sequence[str],
        chat: bool,
        source_layer: int,
        target_layer: int,
        batch_size: int | None,
    ) -> "ActivationMap":
        """A map on the hooked path, of arguments that were checked; source -1 is the embedding."""
        texts, layers = tuple(checks.as_texts(prompts)), (source_layer, target_layer)
        x, y, mask, groups = capture_prompts(model, texts, chat, *layers)
        watched = shortcut.Watched(model.blocks[source_layer + 1 : target_layer + 1])
        state = watched.state()
        f = cls(model, texts, chat, *layers, x, y, mask, batch_size, groups, watched, state)
        f._check_replay()
        return f

    def __repr__(self) -> str:
        n_tokens, layers = int(self.mask.sum()), f"layer {self.source_layer} -> {self.target_layer}"
        return (
            f"ActivationMap({model_name(self.model)}, {layers}, {len(self.prompts)} prompt(s), "
            f"{n_tokens} tokens, d_model {self.d_model}, {self.x.dtype}, {self.path} path)"
        )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.x.shape[-1])

    @property
    def path(self) -> shortcut.Path:
        """Which code runs the blocks now: see `ActivationMap`."""
        if self._shortcut is None or self._watched.state() != self._state:
            return "hooked"
        return self._shortcut.way.path

    @shape_checked
    def __call__(
        self, x: Float[Tensor, "*vector prompt pos d_model"]
    ) -> Float[Tensor, "*vector prompt pos d_model"]:
        """Push residual streams like `self.x` to the target layer; padding becomes zero."""
        stack = x if x.ndim == 4 else x[None]
        if (stack.shape[1:], x.dtype, x.device) != (self.x.shape, self.x.dtype, self.x.device):
            raise ValueError(
                f"x: shape {tuple(x.shape)}, {x.dtype} on {x.device}; f is made for its own "
                f"prompts: pass {tuple(self.x.shape)}, or that with an axis of vectors in front, "
                f"{self.x.dtype} on {self.x.device}, as f.x"
            )
        way = self._way(shortcut.is_transformed(stack))
        y = push(stack, self._groups, self._picked(slice(None)), way.run)
        return y if x.ndim == 4 else y[0]

    @shape_checked
    def delta(self, theta: Theta, positions: slice = slice(None)) -> Delta:
        """The effect of each vector: f(x + theta) - f(x), with theta added at every position.

        Differentiable in theta; float32, or float64 where theta or f.x is. Zero outside
        `positions`, which count each prompt's own tokens.

        Raises:
            ValueError: theta is too wide or not finite; the positions miss some prompt.
        """
        of = f"the residual stream of {model_name(self.model)}"
        checks.width(theta, self.d_model, "theta", of)
        checks.finite(theta, "theta")
        picked = self._picked(checked_slice(positions))
        way = self._way(shortcut.is_transformed(theta))
        if not len(theta):
            return torch.zeros(0, *self.x.shape, dtype=self._wide(theta), device=self.x.device)
        with_gradient = torch.is_grad_enabled() and theta.requires_grad
        room, size = self._vectors_in_memory(), self.vectors_at_once()
        # Where the graphs do not all fit, each is made in its backward pass.
        recompute = with_gradient and len(theta) > max(room, size)
        effects, _ = map_batches(
            lambda some: self._effect(some, picked, way, recompute), theta, size
        )
        return effects[0] if len(effects) == 1 else torch.cat(effects)

    def _effect(self, theta: Tensor, picked: Picked, way: shortcut.Way, recompute: bool) -> Tensor:
        """The effects of one batch."""
        wide = self._wide(theta)
        steered = self.x + theta.to(self.x.device, self.x.dtype)[:, None, None, :]
        y = push(steered, self._groups, picked, way.run, recompute)
        effect = y.to(wide) - way.y.to(wide)
        unchanged = self._unchanged(steered)
        if unchanged.any():
            # The input is the same bit for bit: what is left is rounding. The gradient stays.
            effect = effect - torch.where(unchanged[:, :, None, None], effect.detach(), 0.0)
        return effect if picked.everything else effect * picked.mask[:, :, None]

    def _unchanged(self, steered: Tensor) -> Tensor:
        """Under which vectors x is what it was, bit for bit, [vector, prompt]."""
        return ((steered.detach() == self.x) | ~self.mask[:, :, None]).flatten(2).all(-1)

    def _wide(self, theta: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(theta.dtype, self.x.dtype), torch.float32)

    def _blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.blocks[self.source_layer + 1 : self.target_layer + 1])

    def _way(self, transformed: bool) -> shortcut.Way:
        """Which code runs the blocks now; `transformed`: by what else than a gradient's graph."""
        state, y = self._watched.state(), self.y
        if state != self._state:
            if state not in self._unsteered_memo:
                self._unsteered_memo.clear()
                self._unsteered_memo[state] = self._hooked(self.x)
            y = self._unsteered_memo[state]
        elif self._shortcut is not None:
            return self._shortcut.differentiable if transformed else self._shortcut.way
        return shortcut.Way("hooked", shortcut.hooked_run(self._blocks()), y)

    @torch.no_grad()
    def _hooked(self, x: Residual) -> Residual:
        """f(x) by the model's own modules, without a graph."""
        run = shortcut.hooked_run(self._blocks())
        return push(x[None], self._groups, self._picked(slice(None)), run)[0]

    @shape_checked
    def gram(
        self,
        positions: slice = slice(None),
        *,
        mean: bool = False,
        on_share: Callable[[float], None] | None = None,
    ) -> Float[Tensor, "d_model d_model"]:
        """J'J, with J the derivative at zero of the effect, flattened over prompts and positions.

        By forward-mode differentiation; float64, on the CPU, not finite along an axis whose
        derivative is not. A method may use it where a map has it.

        Args:
            mean: J is the derivative of the mean effect over each prompt's positions instead.
            on_share: called with the share of the work that is done.
        """
        done, total = 0, self.d_model * len(self.prompts)

        def count(n: int) -> None:
            nonlocal done
            done += n
            if on_share is not None:
                on_share(done / total)

        layers = self.source_layer, [self.target_layer]
        return self.gram_matrices(*layers, positions, count, mean)[self.target_layer]

    @shape_checked
    @torch.no_grad()
    def gram_matrices(
        self,
        source_layer: int,
        target_layers: Sequence[int],
        positions: slice = slice(None),
        on_batch: Callable[[int], None] | None = None,
        mean: bool = False,
    ) -> dict[int, Tensor]:
        """`gram` from one layer of this map to several later ones, all in one forward-mode pass.

        `on_batch` gets the number of directions that were pushed through for one prompt.
        """
        first, last = self.source_layer, self.target_layer
        if not all(first <= source_layer < layer <= last for layer in target_layers):
            raise ValueError(
                f"source_layer={source_layer}, target_layers={[*target_layers]}: expected "
                f"{first} <= source_layer < target_layer <= {last}, the layers of this map"
            )
        picked, skipped = self._picked(checked_slice(positions)), source_layer - first
        wanted = {layer - source_layer - 1: layer for layer in target_layers}
        fast = None if self.path == "hooked" else self._shortcut
        start = shortcut.tangents_of(self._blocks()) if fast is None else fast.tangents
        axes = torch.eye(self.d_model, dtype=self.x.dtype, device=self.x.device)
        grams = {layer: torch.zeros(axes.shape, dtype=torch.float64) for layer in target_layers}
        size = self.vectors_at_once(False) * len(self.prompts)  # which go one by one

        def images(
            push: shortcut.Push, places: Tensor | None, tangents: Tensor
        ) -> dict[int, Tensor]:
            found = {}
            for number, image in enumerate(push(tangents, skipped, places)):
                if number in wanted:  # and nothing else stays on the device
                    image = image.to(self._wide(image)).mean(1) if mean else image.flatten(1)
                    found[wanted[number]] = image.cpu()
            if on_batch is not None:
                on_batch(len(tangents))
            return found

        for group in self._groups:
            rows = self.x if group.prompts is None else self.x[group.prompts, -group.length :]
            of_row = axes[:, None].expand(-1, group.length, -1)
            for row in rows:
                push, places = start(row[None], group), picked.places[group.length][0]
                parts, _ = map_batches(partial(images, push, places), of_row, size)
                for layer, gram in grams.items():
                    add_gram(gram, [part.pop(layer) for part in parts], self.x.device)
        return grams

    @shape_checked
    def resolution(self, positions: slice = slice(None)) -> float:
        """How large an effect can be by rounding alone: its L2 norm over these positions."""
        counted = self._picked(checked_slice(positions)).mask
        rounding = _ROUNDING.get(self.x.dtype, _NARROW_ROUNDING) * torch.finfo(self.x.dtype).eps
        return rounding * float(self.y[counted].double().norm())

    @shape_checked
    def position_mask(self, positions: slice = slice(None)) -> PositionMask:
        """Which positions a slice picks; a ValueError if it misses some prompt."""
        return self._picked(checked_slice(positions)).mask.clone()

    def _picked(self, positions: slice) -> Picked:
        """What a slice picks; remembered, since a search asks at every gradient."""
        parts = positions.start, positions.stop, positions.step
        if parts not in self._picked_memo:
            picked = Picked.of(positions, self.mask)
            missed = (~picked.mask.any(-1)).nonzero().flatten().tolist()
            if missed:
                raise ValueError(
                    f"positions={positions}: picks no token of prompt {missed[0]} "
                    f"({self.prompts[missed[0]]!r}, {int(self.mask[missed[0]].sum())} tokens); "
                    "choose a slice that each prompt reaches, for example slice(-1, None)"
                )
            self._picked_memo[parts] = picked
        return self._picked_memo[parts]

    def vectors_at_once(self, with_gradient: bool = True) -> int:
        """How many vectors `delta` runs at once: `batch_size`, or what is fast and fits."""
        on_cpu = self.x.device.type == "cpu"  # whose caches more rows fall out of
        most = _CPU_ROWS // self.mask.numel() if on_cpu else _GPU_VECTORS
        return self.batch_size or max(1, min(most, self._vectors_in_memory(with_gradient)))

    def _vectors_in_memory(self, with_gradient: bool = True) -> int:
        """How many vectors fit in half of the free memory."""
        cfg = self.model.cfg
        d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * self.d_model)
        n_heads = int(getattr(cfg, "n_heads", None) or 1)
        # 16 residual-sized and 5 MLP-sized tensors, and four attention patterns; without a gradient
        # one block's worth lives.
        floats = 16 * self.d_model + 5 * d_mlp + 4 * n_heads * self.x.shape[1]
        blocks = self.target_layer - self.source_layer if with_gradient else 1
        per_vector = floats * self.mask.numel() * blocks * self.x.element_size()
        return int(free_memory(self.x.device) / 2 / per_vector)

    def story(self) -> dict[str, Any]:
        """Where the map comes from, as JSON-ready facts."""
        return {
            "model": model_name(self.model),
            "model_type": model_type(self.model),
            "weights": weights_digest(self.model),
            "n_layers": int(self.model.cfg.n_layers),
            "d_model": self.d_model,
            "dtype": str(self.x.dtype).removeprefix("torch."),
            "n_hooks": len(self._watched.state()[0]),
            "prompts": list(self.prompts),
            "chat": self.chat,
            "source_layer": self.source_layer,
            "target_layer": self.target_layer,
        }

    def _check_replay(self) -> None:
        error = float((self._hooked(self.x) - self.y).abs().max() / self.y.abs().max())
        if not error <= _REPLAY_TOLERANCE.get(self.x.dtype, 0.05):
            raise RuntimeError(
                f"{model_name(self.model)}: blocks {self.source_layer + 1} to {self.target_layer} "
                f"called alone differ from the whole model by {error:.1e} of its size; this "
                "architecture passes something between blocks that is not in their arguments, or a "
                "hook on them is not deterministic"
            )


def _check_layers(model: Model, source_layer: int, target_layer: int) -> None:
    n_layers = int(model.cfg.n_layers)
    if not 0 <= source_layer < target_layer < n_layers:
        source = min(round(n_layers * 8 / 30), n_layers - 2)
        target = max(source + 1, round(n_layers * 16 / 30))
        raise ValueError(
            f"source_layer={source_layer}, target_layer={target_layer}: {model_name(model)} has "
            f"{n_layers} layers, so allowed is 0 <= source_layer < target_layer <= {n_layers - 1}; "
            f"for this depth try source_layer={source}, target_layer={target}"
        )
