"""The activation map f: from the residual stream after one block to that after a later one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_melbo.fast_blocks import FastBlocks, Precision
from tl_melbo.memory import free_memory, is_out_of_memory, map_batches
from tl_melbo.model.bridge import (
    Model,
    check_model,
    frozen,
    model_name,
    model_type,
    residual_hook_name,
    user_hooks,
    weights_digest,
    whole_model,
    without_bridge,
)
from tl_melbo.model.tokens import to_tokens
from tl_melbo.probability import kl_from_log_probs
from tl_melbo.replay import BlockCall, capture, run_layers
from tl_melbo.shapes import (
    Delta,
    PositionMask,
    Residual,
    Theta,
    checked_slice,
    shape_checked,
)
from tl_melbo.shortcut import Shortcut, Shortened, State, Watched, is_transformed
from tl_melbo.text import quoted

Path = Literal["fast", "compiled", "unhooked", "hooked"]
_Way = Path | Literal["differentiable"]

# How far replaying the blocks may be from the model's own forward pass, relative to its size.
_REPLAY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# How far a faster way may be from the model's own modules, relative to what the blocks add to each
# token, and to the token itself, whose rounding no way can avoid.
_FAST_TOLERANCE = {torch.float64: (1e-9, 1e-13), torch.float32: (1e-5, 1e-6)}
_NARROW_TOLERANCE = (0.05, 0.01)
# Tokens at once beyond which a CPU gains nothing; vectors at once that fill a large GPU.
_CPU_ROWS, _GPU_VECTORS = 1200, 1024
# Tokens of one vector up to which packing the matrices of a CPU pays.
_MOST_HOT_ROWS = 512


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMap:
    """f(x): the residual stream after `source_layer` pushed through to after `target_layer`.

    Blocks `source_layer + 1` to `target_layer` run, and nothing else, with the arguments that they
    got in one ordinary forward pass of each prompt (position embeddings, masks), without the KV
    cache. Prompts of equal length run as one batch and others apart: no block ever sees padding,
    and f of many prompts is f of each. Make one with `ActivationMap.from_prompts`.

    Which code runs is `path`. "hooked": the model's own modules, so hooks on them fire; always
    taken while there are any. "unhooked": the Hugging Face modules below TransformerLens's, with
    scaled-dot-product attention. "fast": for blocks of the Llama kind, see `fast_blocks`; it holds
    copies of their weights. A faster path is taken if it gave the model's own results, to 1e-5
    relative in float32, when the map was made, and until hooks, modules or weights change (but
    for edits through a tensor's `.data`, which cannot be seen: make a new map after those).
    "compiled" is "unhooked" through torch.compile, and only on request.

    Attributes:
        x: residual stream after `source_layer` of the unsteered prompts; prompts shorter than
            the longest are padded with zeros on the left.
        y: f(x).
        mask: True where `x` holds a token, False where it is padding.
        prompts: the texts.
        batch_size: vectors pushed through at once by `delta`; None picks what fits in memory.
        precision: of matrix products; the residual stream, vectors and effects stay float32.
        compiled: whether torch.compile was asked for.

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
    batch_size: int | None = None
    precision: Precision = "float32"
    compiled: bool = False
    _block_calls: dict[int, list[BlockCall]] = field(default_factory=dict)
    # The modules and parameters of the blocks: finding them takes longer than looking at them.
    _watched: "Watched" = field(default_factory=lambda: Watched.of(()))
    _state: "State" = ((), (), True)
    _shortcut: "Shortcut | None" = None
    _unsteered_memo: dict["State", Residual] = field(default_factory=dict)

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
        precision: Precision = "float32",
        compiled: bool = False,
    ) -> "ActivationMap":
        """Run the prompts once and remember what the blocks in between need.

        Args:
            model: a TransformerLens model. It is left exactly as it is.
            prompts: one text or several, of any lengths.
            source_layer: s; vectors are added to the residual stream after block s.
            target_layer: t; their effect is read in the residual stream after block t.
            chat: format each prompt as a user's turn with the tokenizer's chat template.
            batch_size: vectors at a time in `delta`; None picks what fits in memory.
            precision: of the matrix products. "tf32" (CUDA) and "bfloat16" are faster where the
                hardware has them, for float32 models of the Llama kind; everything else stays
                float32. f is then good to about 1e-3 and 1e-2 of each token. An effect is a small
                difference of such values: in bfloat16 it was 2% to 9% off at the last tokens of
                the embedded model, and meaningless at the first, whose residual is huge.
            compiled: run the blocks through torch.compile, on a GPU with CUDA graphs. On two CPU
                cores that took 40 seconds for a batch size, and as long once more for the second;
                gradients were then 5% to 10% faster than without, so it pays after many thousands.
                It needs a C++ compiler.

        Raises:
            TypeError: `model` is not a TransformerLens model.
            ValueError: layers out of order or beyond the model, an empty prompt, no prompt,
                a batch size below one, activations that are not finite, a precision that this
                model or device cannot have.
            RuntimeError: the blocks called alone do not do what they do inside the model.
        """
        check_model(model)
        _check_layers(model, source_layer, target_layer)
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if not texts:
            raise ValueError("prompts: none given; pass one text or a list of texts")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1, or None to pick what fits")

        tokens = [to_tokens(model, text, chat) for text in texts]
        longest = max(t.shape[1] for t in tokens)
        block_calls: dict[int, list[BlockCall]] = {}
        x_rows, y_rows = [], []
        for text, row in zip(texts, tokens, strict=True):
            x_row, y_row, calls = capture(model, row, source_layer, target_layer)
            if not torch.isfinite(y_row).all():
                raise ValueError(
                    f"prompt {quoted(text)}: the residual stream of {model_name(model)} after "
                    f"layer {target_layer} holds values that are not finite in {y_row.dtype}; "
                    "load the model in a wider type, for example dtype=torch.float32"
                )
            padding = (0, 0, longest - row.shape[1], 0)
            x_rows.append(nn.functional.pad(x_row, padding))
            y_rows.append(nn.functional.pad(y_row, padding))
            block_calls.setdefault(row.shape[1], calls)
        lengths = torch.tensor([t.shape[1] for t in tokens])
        blocks = model.blocks[source_layer + 1 : target_layer + 1]
        f = cls(
            model=model,
            prompts=texts,
            chat=chat,
            source_layer=source_layer,
            target_layer=target_layer,
            x=torch.cat(x_rows),
            y=torch.cat(y_rows),
            mask=(torch.arange(longest) >= longest - lengths[:, None]).to(x_rows[0].device),
            batch_size=batch_size,
            precision=precision,
            compiled=compiled,
            _block_calls=block_calls,
            _watched=Watched.of(blocks),
        )
        f = replace(f, _state=f._state_now())
        f._check_replay()
        _check_precision(precision, compiled, f.x)
        shortcut, failure = f._find_shortcut()
        f = replace(f, _shortcut=shortcut)
        if compiled and f.path != "compiled":
            raise ValueError(
                f"compiled=True: {model_name(model)} cannot be run through torch.compile between "
                f"these layers ({failure or 'there are hooks on them'}); leave it out"
            ) from failure
        if precision != "float32" and f.path != "fast":
            raise ValueError(
                f"precision={precision!r}: only for models whose blocks are of the Llama kind, "
                f"without hooks between the layers; {model_name(model)} takes 'float32' here, or "
                "load it with dtype=torch.bfloat16"
            )
        return f

    def __repr__(self) -> str:
        return (
            f"ActivationMap({model_name(self.model)}, layer {self.source_layer} -> "
            f"{self.target_layer}, {len(self.prompts)} prompt(s), "
            f"{int(self.mask.sum())} tokens, d_model {self.d_model}, {self.x.dtype}, "
            f"{self.path} path{'' if self.precision == 'float32' else f' in {self.precision}'})"
        )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.x.shape[-1])

    @property
    def path(self) -> Path:
        """Which code runs the blocks now: see `ActivationMap`."""
        if self._shortcut is None or self._state_now() != self._state:
            return "hooked"
        if self._shortcut.fast is not None:
            return "fast"
        return "unhooked" if self._shortcut.run is run_layers else "compiled"

    def _state_now(self) -> "State":
        """What the user may change of the blocks in between: hooks, modules, weights."""
        weights = tuple((p.data_ptr(), p._version) for p in self._watched.parameters)
        return user_hooks(self._watched.modules), weights, self._watched.are_in_place()

    @shape_checked
    def __call__(
        self, x: Float[Tensor, "*vector prompt pos d_model"]
    ) -> Float[Tensor, "*vector prompt pos d_model"]:
        """Push residual streams after `source_layer` to after `target_layer`.

        Args:
            x: shaped like `self.x`, or with one more axis of vectors in front. Values at padding
                are ignored, and come back as zeros.

        Raises:
            ValueError: prompts, positions or width differ from those of `self.x`.
        """
        if x.ndim > 4 or x.shape[-3:] != self.x.shape:
            raise ValueError(
                f"x: shape {tuple(x.shape)}, expected {tuple(self.x.shape)}, or that with an axis "
                "of vectors in front; f is made for its own prompts: see ActivationMap.from_prompts"
            )
        if (x.dtype, x.device) != (self.x.dtype, self.x.device):
            raise ValueError(
                f"x: {x.dtype} on {x.device}, expected {self.x.dtype} on {self.x.device}, as f.x; "
                "convert it with x.to(f.x)"
            )
        y = self._map(x if x.ndim == 4 else x[None], slice(None), self.path)
        return y if x.ndim == 4 else y[0]

    @shape_checked
    def delta(self, theta: Theta, positions: slice = slice(None)) -> Delta:
        """The effect of each vector: f(x + theta) - f(x), with theta added at every position.

        Differentiable in theta. Runs `batch_size` vectors at a time; where a gradient is wanted of
        more than fit in memory, batches are recomputed in the backward pass.

        Args:
            theta: vectors, in the units of the residual stream.
            positions: where the effect is wanted, counted on each prompt's own tokens; the last
                block does no work elsewhere where that can be.

        Returns:
            Zeros at padding and at other positions; float32, or float64 where theta or the model
            is.

        Raises:
            ValueError: theta has another width than the residual stream, or holds values that are
                not finite; the positions pick nothing in some prompt.
        """
        self._check_width(theta)
        bad = (~theta.isfinite().all(-1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"theta: vectors {bad} hold values that are not finite")
        counted = self.mask if positions == slice(None) else self.position_mask(positions)
        if not len(theta):
            return torch.zeros(0, *self.x.shape, dtype=self._wide(theta), device=self.x.device)
        path: _Way = self.path
        if is_transformed(theta) and path != "hooked":
            path = "differentiable"
        size = self.vectors_at_once()
        # Where graphs do not all fit, or share memory, each is made in its backward pass.
        with_gradient = torch.is_grad_enabled() and theta.requires_grad
        too_many = len(theta) > self._vectors_in_memory() or path == "compiled"
        recompute = with_gradient and too_many and len(theta) > size
        effects, _ = map_batches(
            lambda batch: self._delta(batch, positions, counted, path, recompute), theta, size
        )
        return effects[0] if len(effects) == 1 else torch.cat(effects)

    @shape_checked
    def divergence(self, theta: Theta) -> Float[Tensor, "vector prompt"]:
        """KL(P_vector || P_unsteered) of the token after each prompt, under each vector.

        The whole model runs, with the vector added after the source layer, at every position.

        Args:
            theta: vectors, in the units of the residual stream.

        Returns:
            In nats, float32, on the CPU; NaN where the model's numbers are not finite.

        Raises:
            ValueError: theta has another width than the residual stream.
        """
        self._check_width(theta)
        columns = [self._divergence(theta, prompt) for prompt in self.prompts]
        return torch.stack(columns, 1)

    def _check_width(self, theta: Theta) -> None:
        if theta.shape[1] != self.d_model:
            raise ValueError(
                f"theta: {theta.shape[1]} wide, but the residual stream of "
                f"{model_name(self.model)} has d_model={self.d_model}"
            )

    def _divergence(self, theta: Theta, prompt: str) -> Float[Tensor, "vector"]:
        tokens = to_tokens(self.model, prompt, self.chat)
        at_source = self.model.hook_dict[residual_hook_name(self.source_layer)]

        def log_probs(batch: Tensor) -> Tensor:
            addend = batch.to(self.x.device, self.x.dtype)[:, None, :]
            handle = at_source.register_forward_hook(lambda module, args, x: x + addend)
            try:
                with torch.no_grad(), frozen(*whole_model(self.model)):
                    logits = self.model(tokens.expand(len(batch), -1))[:, -1]
            finally:
                handle.remove()
            found = logits.float().log_softmax(-1).cpu()
            return found.masked_fill(found.isnan().any(-1, keepdim=True), torch.nan)

        unsteered = log_probs(torch.zeros_like(theta[:1]))
        parts, _ = map_batches(
            lambda batch: kl_from_log_probs(found := log_probs(batch), unsteered.expand_as(found)),
            theta.detach(),
            self.vectors_at_once(with_gradient=False),
        )
        return torch.cat(parts) if parts else theta.new_zeros(0)

    def _delta(
        self, theta: Tensor, positions: slice, counted: PositionMask, path: "_Way", recompute: bool
    ) -> Tensor:
        wide = self._wide(theta)
        steered = self.x + theta.to(self.x.device, self.x.dtype)[:, None, None, :]
        y = self._map(steered, positions, path, recompute)
        effect = y.to(wide) - self._unsteered(path).to(wide)
        return effect if counted.all() else effect * counted[:, :, None]

    def _wide(self, theta: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(theta.dtype, self.x.dtype), torch.float32)

    def _unsteered(self, path: "_Way") -> Residual:
        """f(x) by the same path, so that no vector has no effect."""
        if self._shortcut is not None and path == "differentiable":
            return self._shortcut.y_differentiable
        if self._shortcut is not None and path != "hooked":
            return self._shortcut.y
        state = self._state_now()
        if state == self._state:
            return self.y
        if state not in self._unsteered_memo:
            self._unsteered_memo.clear()
            with torch.no_grad():
                self._unsteered_memo[state] = self._map(self.x[None], slice(None), "hooked")[0]
        return self._unsteered_memo[state]

    @shape_checked
    def position_mask(self, positions: slice = slice(None)) -> PositionMask:
        """Which positions a slice picks, counted on each prompt's own tokens.

        `slice(-3, None)` is the last three tokens of every prompt, however long each is.

        Raises:
            ValueError: the slice picks nothing in some prompt.
        """
        positions = checked_slice(positions)
        n_pos = self.mask.shape[1]
        chosen = torch.zeros_like(self.mask)
        for i, length in enumerate(self.mask.sum(-1).tolist()):
            picked = range(length)[positions]
            if not picked:
                raise ValueError(
                    f"positions={positions}: picks no token of prompt {i} "
                    f"({self.prompts[i]!r}, {length} tokens); choose a slice that each prompt "
                    "reaches, for example slice(-1, None)"
                )
            chosen[i, torch.tensor(list(picked)) + n_pos - length] = True
        return chosen

    def vectors_at_once(self, with_gradient: bool = True) -> int:
        """How many vectors `delta` runs at once: `batch_size`, or what is fast and fits."""
        if self.batch_size is not None:
            return self.batch_size
        # A CPU gains nothing from more rows than this, and they fall out of its caches; a large
        # device is full with that many vectors.
        n_tokens = self.mask.numel()
        most = max(1, _CPU_ROWS // n_tokens) if self.x.device.type == "cpu" else _GPU_VECTORS
        return max(1, min(most, self._vectors_in_memory(with_gradient)))

    def _vectors_in_memory(self, with_gradient: bool = True) -> int:
        """How many vectors fit in half of the free memory."""
        if self._shortcut is not None and self._shortcut.fast is not None:
            floats = self._shortcut.fast.floats_per_token
        else:
            cfg, n_pos = self.model.cfg, self.x.shape[1]
            d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * self.d_model)
            n_heads = int(getattr(cfg, "n_heads", None) or 1)
            # About 16 residual-sized and 5 MLP-sized tensors, and four copies of a row of the
            # attention pattern in each head.
            floats = 16 * self.d_model + 5 * d_mlp + 4 * n_heads * n_pos
        # Without a gradient one block's worth lives.
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
            "precision": self.precision,
            "n_hooks": len(self._state_now()[0]),
            "prompts": list(self.prompts),
            "chat": self.chat,
            "source_layer": self.source_layer,
            "target_layer": self.target_layer,
        }

    def _map(self, x: Tensor, positions: slice, path: "_Way", recompute: bool = False) -> Tensor:
        """Push [vector, prompt, pos, d_model] through; zeros where there is nothing to tell."""
        n_prompts, n_pos = self.mask.shape
        lengths = self.mask.sum(-1)
        y = None
        for length in self._block_calls:
            chosen = sorted(range(length)[positions])
            wanted = None if len(chosen) == length else torch.tensor(chosen, device=x.device)
            prompts = (lengths == length).nonzero().flatten()
            together = len(prompts) == n_prompts
            group = x if together else x[:, prompts, -length:]
            out = self._run(group.flatten(0, 1), length, wanted, path, recompute)
            out = out.unflatten(0, group.shape[:2])
            if together and wanted is None:
                return out
            y = torch.zeros_like(x) if y is None else y
            into = torch.tensor(chosen, device=x.device) + n_pos - length
            y[:, prompts[:, None], into] = out
        return torch.zeros_like(x) if y is None else y

    def _run(
        self, rows: Tensor, length: int, positions: Tensor | None, path: "_Way", recompute: bool
    ) -> Tensor:
        """Prompts of one length through the blocks; with `positions`, these of the result only."""
        shortcut, calls = self._shortcut, self._block_calls[length]

        def hooked(rows: Tensor) -> Tensor:
            blocks = self.model.blocks[self.source_layer + 1 : self.target_layer + 1]
            with frozen(blocks):
                return run_layers(blocks, calls, rows, positions)

        if path == "hooked" or shortcut is None:
            return Shortened.apply(rows, hooked, hooked, True) if recompute else hooked(rows)

        def long(rows: Tensor) -> Tensor:
            return run_layers(shortcut.differentiable, calls, rows, positions)

        def short(rows: Tensor) -> Tensor:
            return shortcut(rows, length, positions)

        if path == "differentiable":
            return long(rows)
        return Shortened.apply(rows, short, long, recompute)

    def _find_shortcut(self) -> "tuple[Shortcut | None, Exception | None]":
        """The fastest way without hooks that does what the model's own modules do.

        And why the others did not run. Layers that need what the bridge adds to them, or quantised
        ones, fail in ways of their own, so every error counts but full memory.
        """
        failure: Exception | None = None
        blocks = self.model.blocks[self.source_layer + 1 : self.target_layer + 1]
        if self._state[0] or not all(hasattr(block, "_original_component") for block in blocks):
            return None, failure
        # One at a time, as a search of one vector comes.
        probes = [self.x, self._probe()]
        with torch.no_grad():
            expected = torch.stack([self(probe) for probe in probes])
            makers = (
                (self._compiled_shortcut,)
                if self.compiled
                else (self._fast_shortcut, self._unhooked_shortcut)
            )
            for make in makers:
                try:
                    shortcut = make(blocks)
                    if shortcut is None or not self._does_the_same(shortcut, probes, expected):
                        continue
                    if self.precision != "float32" and shortcut.fast is not None:
                        # In float32 it is the same function; now in the precision asked for.
                        shortcut = replace(
                            shortcut, fast=shortcut.fast.in_precision(self.precision)
                        )
                    short = replace(self, _shortcut=shortcut)
                    return replace(
                        shortcut,
                        y=short._map(self.x[None], slice(None), short.path)[0],
                        y_differentiable=short._map(self.x[None], slice(None), "differentiable")[0],
                    ), failure
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    failure = error
        return None, failure

    def _does_the_same(self, shortcut: "Shortcut", probes: list[Tensor], expected: Tensor) -> bool:
        """Whether the blocks add the same to the residual stream, to 1e-5, and rounding of it."""
        short = replace(self, _shortcut=shortcut)
        for probe, y in zip(probes, expected, strict=True):
            found = short._map(probe[None], slice(None), short.path)[0]
            error, added, size = (
                part[self.mask].double().norm(dim=-1) for part in (found - y, y - probe, y)
            )
            relative, rounding = _FAST_TOLERANCE.get(self.x.dtype, _NARROW_TOLERANCE)
            # Over all tokens, each by its own size.
            allowed = relative * added + rounding * size
            if not float((error / allowed).square().mean()) <= 1:
                return False
        return True

    def _fast_shortcut(self, blocks: Sequence[nn.Module]) -> "Shortcut | None":
        fast = self._fast_blocks([without_bridge(block) for block in blocks])
        if fast is None:
            return None
        rotations = {}
        for length, calls in self._block_calls.items():
            # Where layers of one model turn differently, as in Gemma 3, results will differ.
            turn = calls[0][1].get("position_embeddings")
            rotation = None if turn is None else fast.rotation(*turn)
            if rotation is None:
                return None
            rotations[length] = rotation
        return Shortcut.of(blocks, self._block_calls, fast, rotations)

    def _unhooked_shortcut(self, blocks: Sequence[nn.Module]) -> "Shortcut | None":
        return Shortcut.of(blocks, self._block_calls)

    def _compiled_shortcut(self, blocks: Sequence[nn.Module]) -> "Shortcut | None":
        return replace(Shortcut.of(blocks, self._block_calls), run=self._compiled_run())

    def _compiled_run(self) -> Callable[..., Tensor]:
        mode = "reduce-overhead" if self.x.device.type == "cuda" else "default"
        run = torch.compile(run_layers, mode=mode)

        def step(*arguments: Any) -> Tensor:
            # CUDA graphs write every result into the same memory: what the last call left there is
            # given up here, and what this one leaves is copied.
            torch.compiler.cudagraph_mark_step_begin()
            return run(*arguments).clone()

        return step

    def _probe(self) -> Tensor:
        """A residual stream that is nobody's: x with noise a tenth as long as its tokens."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.x.shape, generator=generator, dtype=torch.float32).to(self.x)
        length = self.x.norm(dim=-1)[self.mask].median() / self.d_model**0.5
        return (self.x + 0.1 * length * noise) * self.mask[:, :, None]

    def _fast_blocks(self, layers: Sequence[nn.Module]) -> FastBlocks | None:
        if self.x.dtype not in (torch.float32, torch.float64):
            return None  # Hugging Face widens norms and softmax of narrow types
        n_bytes = sum(p.numel() * p.element_size() for p in self._watched.parameters)
        room = free_memory(self.x.device) / 4
        lengths = self.mask.sum(-1)
        hot_rows = max(length * int((lengths == length).sum()) for length in self._block_calls)
        if n_bytes * 4 > room or hot_rows > _MOST_HOT_ROWS:
            hot_rows = None
        if n_bytes * 2 > room:
            return None
        return FastBlocks.of(layers, hot_rows)

    def _check_replay(self) -> None:
        with torch.no_grad():
            error = (self(self.x) - self.y).abs().max() / self.y.abs().max()
        tolerance = _REPLAY_TOLERANCE.get(self.x.dtype, 0.05)
        if not error <= tolerance:
            raise RuntimeError(
                f"{model_name(self.model)}: blocks {self.source_layer + 1} to {self.target_layer} "
                f"called alone differ from the whole model by {float(error):.1e} (relative), more "
                f"than {tolerance:.0e}; this architecture passes something between blocks that is "
                "not in their arguments, or a hook on them is not deterministic"
            )


def _check_layers(model: Model, source_layer: int, target_layer: int) -> None:
    n_layers = int(model.cfg.n_layers)
    if 0 <= source_layer < target_layer < n_layers:
        return
    hint = "a model with one block has no pair of layers"
    if n_layers >= 2:
        source = min(round(n_layers * 8 / 30), n_layers - 2)
        target = max(source + 1, min(round(n_layers * 16 / 30), n_layers - 1))
        hint = f"for this depth try source_layer={source}, target_layer={target}"
    raise ValueError(
        f"source_layer={source_layer}, target_layer={target_layer}: {model_name(model)} has "
        f"{n_layers} layers, so allowed is 0 <= source_layer < target_layer <= {n_layers - 1}; "
        f"{hint}"
    )


def _check_precision(precision: Precision, compiled: bool, x: Tensor) -> None:
    if precision == "float32":
        return
    if compiled:
        raise ValueError(
            f"precision={precision!r}, compiled=True: one or the other; products in another "
            "precision are our own code, which is not compiled"
        )
    if x.dtype != torch.float32:
        raise ValueError(
            f"precision={precision!r}: for models in float32, this one is in {x.dtype}; load it "
            "with dtype=torch.float32, or leave precision out"
        )
    if precision == "tf32" and x.device.type != "cuda":
        raise ValueError(
            f"precision='tf32': only CUDA devices have it, the model is on {x.device}; use "
            "'float32' or 'bfloat16'"
        )
