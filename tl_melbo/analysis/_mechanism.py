"""Which attention heads and MLPs carry a vector's effect from its layer to the target layer?"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.additions import VectorAdditions
from tl_melbo.errors import NotFinite
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model, at_rest, check_layer, model_name, residual_hook_name
from tl_melbo.model.tokens import to_tokens
from tl_melbo.probability import kl_from_log_probs
from tl_melbo.shapes import checked_slice, shape_checked
from tl_melbo.steering import Vectors, as_chat, as_library, as_theta, hooked, steering_layer
from tl_melbo.tables import Table

# Stands for a head where there is none.
_MLP = -1
_Hook = tuple[nn.Module, Callable[..., Any]]


@shape_checked
def mechanism(
    model: Model,
    prompt: str,
    vectors: Vectors,
    target_layer: int | None = None,
    *,
    positions: slice = slice(-3, None),
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Patch each head and MLP between two layers from the steered into the unsteered run.

    One component at a time puts out what it does in the steered run, at all tokens; the rest of the
    model is unsteered and reacts. So this shows which component is *enough* to bring about part of
    the effect, not which is needed. Shares do not add up to 1: a component's steered output holds
    what steered ones before it did to it, both get the credit, and later blocks are not linear.
    What no component carries is the direct path: the vector itself, which stays in the residual
    stream.

    Args:
        target_layer: None takes the one that the vectors were found at.
        positions: which tokens of the prompt count at the target layer.
        batch_size: components at a time.

    Returns:
        Rows for each vector: vector, its position; component, "head", "mlp", "direct" (the vector
        added after the target layer instead) or "all" (the steered model); layer; head, or -1;
        share, <patched effect, effect> / |effect|^2 after the target layer, 1 for "all"; kl,
        KL(P_patched || P_unsteered) of the next token, in nats.

    Raises:
        ValueError: layers that are not in order or not known; a vector without effect; positions
            that miss the prompt; a model without attention heads between the layers.
        NotFinite: the residual stream or the logits under a vector.

    Source: Heimersheim & Nanda 2024, "How to use and interpret activation patching".
    """
    library = as_library(vectors)
    theta, source = as_theta(model, library), steering_layer(model, library, layer)
    target = _target(model, library, source, target_layer)
    tokens, own = to_tokens(model, prompt, as_chat(library, chat)), checked_slice(positions)
    checks.at_least(1, batch_size=batch_size)
    if not len(range(tokens.shape[1])[own]):
        raise ValueError(f"positions={positions}: none of the prompt's {tokens.shape[1]} tokens")
    points = _points(model, range(source + 1, target + 1))
    patch = _Patch(model, tokens, source, target, own, points)
    frames = [patch.of_vector(each[None], batch_size) for each in theta]
    table = pd.concat(frames, keys=range(len(frames)), names=["vector"])
    return Table(table.reset_index("vector").reset_index(drop=True))


def _target(model: Model, library: Any, source: int, target: int | None) -> int:
    target = library.story.get("target_layer") if target is None else target
    if target is None:
        raise ValueError("target_layer: not given, and the vectors do not know theirs; pass it")
    check_layer(model, target, "target_layer")
    if target <= source:
        where = f"the vectors are added after layer {source}"
        raise ValueError(f"target_layer={target}: {where}; pass a later one")
    return target


def _points(model: Model, layers: Sequence[int]) -> dict[tuple[int, bool], nn.Module]:
    """The hook points of each layer's heads (True) and of its MLP (False)."""
    names = {
        (layer, heads): f"blocks.{layer}.{'attn.hook_z' if heads else 'hook_mlp_out'}"
        for layer in layers
        for heads in (True, False)
    }
    if missing := [name for name in names.values() if name not in model.hook_dict]:
        where = f"{model_name(model)} has no hook points {missing[:4]}"
        raise ValueError(f"model: {where}; only attention heads and MLPs can be taken apart")
    return {place: model.hook_dict[name] for place, name in names.items()}


@dataclass(frozen=True)
class _Patch:
    """Runs of one prompt, with components patched in; `points` as `_points` gives them."""

    model: Model
    tokens: Tensor
    source: int
    target: int
    positions: slice
    points: Mapping[tuple[int, bool], nn.Module]

    def of_vector(self, theta: Tensor, batch_size: int) -> pd.DataFrame:
        """The table of one vector, [1, d_model]."""
        heads = [*range(int(self.model.cfg.n_heads)), _MLP]
        components = [(layer, head) for layer, is_attention in self.points if is_attention
                      for head in heads]  # fmt: skip
        kept: dict[tuple[int, bool], Tensor] = {}
        keeping = [(point, partial(_keep, kept, place)) for place, point in self.points.items()]

        def of_batch(some: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            return self.read(len(some), self.patching(some, kept))

        with at_rest(self.model):
            unsteered = self.read(1)
            with hooked(self.model, VectorAdditions.of(theta, self.source)):
                whole = self.read(1, keeping)
            with hooked(self.model, VectorAdditions.of(theta, self.target)):
                direct = self.read(1)
            parts, _ = map_batches(of_batch, components, batch_size)
        streams, log_probs = map(torch.cat, zip(whole, direct, *parts, strict=True))
        effects = (streams - unsteered[0]).flatten(1)
        kl = kl_from_log_probs(log_probs, unsteered[1].expand_as(log_probs))
        if not (effects.isfinite().all() and kl.isfinite().all()):
            of = f"{model_name(self.model)} under one of norm {float(theta.norm()):.4g}"
            raise NotFinite(f"vectors: {of} is not finite; use a shorter one")
        size = effects[0].square().sum()
        if not size > 0:
            raise ValueError("vectors: one has no effect after the target layer; leave it out")
        kinds = ["all", "direct", *("mlp" if head == _MLP else "head" for _, head in components)]
        places = [(self.source, _MLP), (self.target, _MLP), *components]
        table = pd.DataFrame(places, columns=["layer", "head"])
        table.insert(0, "component", kinds)
        return table.assign(share=(effects @ effects[0] / size).numpy(), kl=kl.numpy())

    def read(self, n_rows: int, hooks: Sequence[_Hook] = ()) -> tuple[Tensor, Tensor]:
        """The residual stream after the target layer, and the next token's log-probabilities."""
        kept: dict[str, Tensor] = {}
        name = residual_hook_name(self.target)
        with ExitStack() as stack:
            for point, hook in (*hooks, (self.model.hook_dict[name], partial(_keep, kept, name))):
                stack.enter_context(point.register_forward_hook(hook))
            logits = self.model(self.tokens.expand(n_rows, -1))
        stream = kept[name][:, self.positions].double().cpu()
        return stream, logits[:, -1].float().log_softmax(-1).cpu()

    def patching(
        self, components: Sequence[tuple[int, int]], kept: Mapping[tuple[int, bool], Tensor]
    ) -> list[_Hook]:
        """Row by row, one component puts out what was kept."""
        hooks = []
        for (layer, is_attention), point in self.points.items():
            mine = [
                (row, head)
                for row, (own, head) in enumerate(components)
                if own == layer and (head != _MLP) == is_attention
            ]
            if mine:
                n_heads = int(self.model.cfg.n_heads)
                hooks.append((point, partial(_put, mine, kept[layer, is_attention], n_heads)))
        return hooks


def _keep(kept: dict[Any, Tensor], name: Any, module: Any, args: Any, output: Tensor) -> None:
    """A hook: keep what comes by."""
    kept[name] = output.detach().clone()


def _put(
    rows: Sequence[tuple[int, int]],
    kept: Tensor,
    n_heads: int,
    module: nn.Module,
    args: Any,
    output: Tensor,
) -> Tensor:
    """A hook: heads lie side by side, as an axis (HookedTransformer) or in one (bridge)."""
    changed = output.clone(memory_format=torch.contiguous_format)
    shape = (output.shape[1], n_heads, -1)
    for row, head in rows:
        if head == _MLP:
            changed[row] = kept[0]
        else:
            changed[row].view(shape)[:, head] = kept[0].reshape(shape)[:, head]
    return changed
