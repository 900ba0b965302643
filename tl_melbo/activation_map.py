"""The activation map f: from the residual stream after one block to that after a later one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tl_melbo.models import (
    Model,
    check_model,
    frozen,
    model_name,
    residual_hook_name,
    to_tokens,
    whole_model,
)
from tl_melbo.shapes import (
    Delta,
    PositionMask,
    Residual,
    Theta,
    checked_slice,
    shape_checked,
)

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]

# How far replaying the blocks may be from the model's own forward pass, relative to its size.
_REPLAY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMap:
    """f(x): the residual stream after `source_layer` pushed through to after `target_layer`.

    Blocks `source_layer + 1` to `target_layer` run, and nothing else. They are the model's own
    modules, called with the arguments that they got in one ordinary forward pass of each prompt
    (position embeddings, masks), without the KV cache; so hooks on them fire. Prompts of equal
    length run as one batch and others apart: no block ever sees padding, and f of many prompts is
    f of each. Make one with `ActivationMap.from_prompts`.

    Attributes:
        x: residual stream after `source_layer` of the unsteered prompts; prompts shorter than
            the longest are padded with zeros on the left.
        y: f(x).
        mask: True where `x` holds a token, False where it is padding.
        prompts: the texts.
        batch_size: vectors pushed through at once by `delta`; None picks what fits in memory.

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
    _block_calls: dict[int, list[BlockCall]] = field(default_factory=dict)
    _hooks: tuple[Any, ...] = ()

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
            model: a TransformerLens model. It is left exactly as it is.
            prompts: one text or several, of any lengths.
            source_layer: s; vectors are added to the residual stream after block s.
            target_layer: t; their effect is read in the residual stream after block t.
            chat: format each prompt as a user's turn with the tokenizer's chat template.
            batch_size: vectors at a time in `delta`; None picks what fits in memory.

        Raises:
            TypeError: `model` is not a TransformerLens model.
            ValueError: layers out of order or beyond the model, an empty prompt, no prompt,
                a batch size below one, activations that are not finite.
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
            x_row, y_row, calls = _capture(model, row, source_layer, target_layer)
            if not torch.isfinite(y_row).all():
                raise ValueError(
                    f"prompt {text!r}: the residual stream of {model_name(model)} after layer "
                    f"{target_layer} holds values that are not finite in {y_row.dtype}; load the "
                    "model in a wider type, for example dtype=torch.float32"
                )
            padding = (0, 0, longest - row.shape[1], 0)
            x_rows.append(nn.functional.pad(x_row, padding))
            y_rows.append(nn.functional.pad(y_row, padding))
            block_calls.setdefault(row.shape[1], calls)
        lengths = torch.tensor([t.shape[1] for t in tokens])
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
            _block_calls=block_calls,
            _hooks=_hooks_on(model, source_layer, target_layer),
        )
        f._check_replay()
        return f

    def __repr__(self) -> str:
        return (
            f"ActivationMap({model_name(self.model)}, layer {self.source_layer} -> "
            f"{self.target_layer}, {len(self.prompts)} prompt(s), "
            f"{int(self.mask.sum())} tokens, d_model {self.d_model}, {self.x.dtype})"
        )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.x.shape[-1])

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
        batched = x if x.ndim == 4 else x[None]
        lengths = self.mask.sum(-1)
        if len(self._block_calls) == 1:
            y = self._run_blocks(batched.flatten(0, 1), x.shape[-2]).unflatten(0, batched.shape[:2])
        else:
            y = torch.zeros_like(batched)
            for length in self._block_calls:
                rows = (lengths == length).nonzero().flatten()
                group = batched[:, rows, -length:]
                out = self._run_blocks(group.flatten(0, 1), length).unflatten(0, group.shape[:2])
                y[:, rows, -length:] = out
        return y if x.ndim == 4 else y[0]

    @shape_checked
    def delta(self, theta: Theta) -> Delta:
        """The effect of each vector: f(x + theta) - f(x), with theta added at every position.

        Differentiable in theta. Runs `batch_size` vectors at a time; where a gradient is wanted of
        more than that, batches are recomputed in the backward pass so that memory stays bounded.

        Args:
            theta: vectors, in the units of the residual stream.

        Returns:
            Zeros at padding; float32, or float64 where theta or the model is.

        Raises:
            ValueError: theta has another width than the residual stream.
        """
        if theta.shape[1] != self.d_model:
            raise ValueError(
                f"theta: {theta.shape[1]} wide, but the residual stream of "
                f"{model_name(self.model)} has d_model={self.d_model}"
            )
        bad = (~theta.isfinite().all(-1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"theta: vectors {bad} hold values that are not finite")
        if not len(theta):
            return theta.new_zeros(0, *self.x.shape)
        with_gradient = torch.is_grad_enabled() and theta.requires_grad
        size = self.vectors_at_once(with_gradient)
        if theta.shape[0] <= size:
            return self._delta(theta)
        batches = theta.split(size)
        if with_gradient:
            return torch.cat([checkpoint(self._delta, b, use_reentrant=False) for b in batches])
        return torch.cat([self._delta(batch) for batch in batches])

    def _delta(self, theta: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(theta.dtype, self.x.dtype), torch.float32)
        steered = self.x + theta.to(self.x.device, self.x.dtype)[:, None, None, :]
        effect = self(steered).to(wide) - self._unsteered().to(wide)
        return effect * self.mask[:, :, None]

    def _unsteered(self) -> Tensor:
        """f(x): `y`, unless hooks came or went between the layers since `y` was made."""
        if _hooks_on(self.model, self.source_layer, self.target_layer) == self._hooks:
            return self.y
        with torch.no_grad():
            return self(self.x)

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
        """How many vectors `delta` runs at once: `batch_size`, or what fits in half the memory."""
        if self.batch_size is not None:
            return self.batch_size
        cfg = self.model.cfg
        d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * self.d_model)
        n_heads = int(getattr(cfg, "n_heads", None) or 1)
        n_pos = self.x.shape[1]
        # Per token and block: about 16 residual-sized and 5 MLP-sized tensors, and four copies of
        # a row of the attention pattern in each head. Without a gradient one block's worth lives.
        per_token = 16 * self.d_model + 5 * d_mlp + 4 * n_heads * n_pos
        blocks = self.target_layer - self.source_layer if with_gradient else 1
        per_vector = per_token * self.x[..., 0].numel() * blocks * self.x.element_size()
        if self.x.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.x.device)[0]
            # Enough rows to fill a large device; beyond that only memory grows.
            most = 1024
        else:
            free = psutil.virtual_memory().available
            # A CPU gains nothing from larger batches, and they fall out of its caches.
            most = 32
        return max(1, min(most, int(free / 2 / per_vector)))

    def story(self) -> dict[str, Any]:
        """Where the map comes from, as JSON-ready facts."""
        return {
            "model": model_name(self.model),
            "n_layers": int(self.model.cfg.n_layers),
            "d_model": self.d_model,
            "dtype": str(self.x.dtype).removeprefix("torch."),
            "prompts": list(self.prompts),
            "chat": self.chat,
            "source_layer": self.source_layer,
            "target_layer": self.target_layer,
        }

    def _run_blocks(self, rows: Tensor, length: int) -> Tensor:
        blocks = self.model.blocks[self.source_layer + 1 : self.target_layer + 1]
        with frozen(blocks):
            for block, (args, kwargs) in zip(blocks, self._block_calls[length], strict=True):
                rows = _first_tensor(block(rows, *args, **kwargs))
        return rows

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


def _hooks_on(model: Model, source_layer: int, target_layer: int) -> tuple[Any, ...]:
    """The hooks that sit on the blocks in between, to notice when some come or go."""
    return tuple(
        (*module._forward_pre_hooks, *module._forward_hooks)
        for block in model.blocks[source_layer + 1 : target_layer + 1]
        for module in block.modules()
        if module._forward_pre_hooks or module._forward_hooks
    )


def _capture(
    model: Model, tokens: Tensor, source_layer: int, target_layer: int
) -> tuple[Tensor, Tensor, list[BlockCall]]:
    """One ordinary pass: resid(source), resid(target), and how the blocks between were called."""
    residuals: dict[int, Tensor] = {}
    calls: list[BlockCall] = []

    def keep_residual(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            residuals[layer] = output.detach().clone()

        return hook

    def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = args if "hidden_states" in kwargs else args[1:]
        named = {k: _without_cache(v) for k, v in kwargs.items() if k != "hidden_states"}
        if "use_cache" in named:
            named["use_cache"] = False
        calls.append((tuple(_without_cache(v) for v in rest), named))

    handles = [
        model.hook_dict[residual_hook_name(layer)].register_forward_hook(keep_residual(layer))
        for layer in (source_layer, target_layer)
    ]
    handles += [
        block.register_forward_pre_hook(keep_call, with_kwargs=True)
        for block in model.blocks[source_layer + 1 : target_layer + 1]
    ]
    try:
        with torch.no_grad(), frozen(*whole_model(model)):
            model(tokens, return_type=None)
    finally:
        for handle in handles:
            handle.remove()
    return residuals[source_layer], residuals[target_layer], calls


def _without_cache(argument: Any) -> Any:
    """None for a KV cache: replayed, it would grow at every call and be attended to."""
    is_cache = hasattr(argument, "get_seq_length") or hasattr(argument, "past_keys")
    return None if is_cache else argument


def _first_tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
