"""What a TransformerLens model is to this package: names, hooks, weights, blocks."""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from tl_melbo.additions import Place
from tl_melbo.shapes import shape_checked

# A HookedTransformer or a TransformerBridge, which have no common base class: see `check_model`.
Model = Any

# Where torch keeps the hooks on a module.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# The bridge hooks itself at its first forward pass, transformers when hidden states are asked for.
_OWN_HOOKS = (
    "transformer_lens.model_bridge.generalized_components",
    "transformers.utils.output_capturing",
)
# How many values of each weight tell two models of one name apart.
_SAMPLED = 64


def check_model(model: Model) -> None:
    """Make sure that `model` is a TransformerLens model with weights in memory."""
    needed = ("cfg", "blocks", "hook_dict", "to_tokens", "generate")
    if not isinstance(model, nn.Module) or not all(hasattr(model, name) for name in needed):
        raise TypeError(
            f"model: got {type(model).__module__}.{type(model).__name__}, expected a "
            "TransformerLens model; load one with tl_melbo.load_model('name'), or wrap one: "
            "TransformerBridge.boot_transformers('name', hf_model=..., tokenizer=...)"
        )
    if any(parameter.is_meta for parameter in model.parameters()) and not is_dispatched(model):
        raise ValueError("model: has parameters on the meta device; load it with its weights")


@shape_checked
def check_layer(model: Model, layer: int, argument: str = "layer") -> None:
    """Make sure that the model has this layer."""
    check_model(model)
    n_layers = int(model.cfg.n_layers)
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"{argument}={layer}: {model_name(model)} has {n_layers} layers, so allowed are "
            f"0 to {n_layers - 1}; pass one of these, or the model that the vectors were found in"
        )


def model_device(model: Model) -> torch.device:
    """The device of the model's embedding, where tokens go."""
    return execution_device(getattr(model, "original_model", model))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module's first weight is when it is used: not where accelerate keeps it."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(each, "_hf_hook", None) for each in module.modules())
    used = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in used if place is not None), device))


def is_dispatched(*roots: nn.Module) -> bool:
    """Whether hooks of accelerate bring weights or activations to a device at each call."""
    return any(hasattr(module, "_hf_hook") for root in roots for module in root.modules())


def model_name(model: Model) -> str:
    """The name that TransformerLens knows the model by."""
    return str(model.cfg.model_name)


def model_type(model: Model) -> str | None:
    """The architecture as its Hugging Face config names it, where that is known: "llama"."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "model_type", None)


def weights_digest(model: Model) -> str:
    """Sixteen letters that tell models of one name apart, from some values of every weight."""
    from accelerate.utils import align_module_device

    digests = set()
    for module in model.modules():
        with align_module_device(module):  # in memory, one after the other
            for parameter in module.parameters(recurse=False):
                flat = parameter.detach().reshape(-1)
                some = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
                digests.add(hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def residual_hook_name(layer: int) -> str:
    """The hook point of the residual stream after a block; -1 is before the first."""
    return "blocks.0.hook_resid_pre" if layer == -1 else f"blocks.{layer}.hook_resid_post"


def hook_points(model: Model, layer: int, place: Place) -> tuple[nn.Module, nn.Module]:
    """The hook points of a block that `Additions` read and add to."""
    if place == "block":
        names = residual_hook_name(layer), residual_hook_name(layer)
    else:
        names = projection_hook_name(layer), f"blocks.{layer}.attn.o.hook_out"
    return model.hook_dict[names[0]], model.hook_dict[names[1]]


def projection_hook_name(layer: int) -> str:
    """The hook point of what attention's output projection multiplies: all heads, one by one."""
    return f"blocks.{layer}.attn.o.hook_in"


def check_projection(model: Model, layer: int) -> None:
    """Make sure that attention's output projection of a block can be hooked."""
    if projection_hook_name(layer) not in model.hook_dict:
        raise ValueError(
            f"model: block {layer} of {model_name(model)} lacks the hook point "
            f"{projection_hook_name(layer)}; use a TransformerBridge with attention"
        )


def whole_model(model: Model) -> tuple[nn.Module, ...]:
    """The model, and the Hugging Face model that a bridge keeps outside its tree of modules."""
    return (model, model.original_model) if hasattr(model, "original_model") else (model,)


@contextmanager
def at_rest(model: Model) -> Iterator[None]:
    """Inside, the whole model computes without gradients and dropout."""
    with torch.no_grad(), frozen(*whole_model(model)):
        yield


@contextmanager
def frozen(*roots: nn.Module) -> Iterator[None]:
    """No gradients for parameters and no dropout inside; everything as it was after."""
    parameters = {p for root in roots for p in root.parameters() if p.requires_grad}
    training = {m for root in roots for m in root.modules() if m.training}
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def residual_streams(
    model: Model, tokens: Tensor, layers: Sequence[int], positions: slice | list[int] = slice(None)
) -> list[Tensor]:
    """The residual stream after each of these layers, [row, pos, d_model], in one ordinary pass."""
    streams: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, args: Any, output: Tensor) -> None:
        streams[layer] = output[:, positions].detach().clone()

    with at_rest(model), ExitStack() as hooks:
        for layer in layers:
            point = model.hook_dict[residual_hook_name(layer)]
            hooks.enter_context(point.register_forward_hook(partial(keep, layer)))
        model(tokens, return_type=None)
    return [streams[layer] for layer in layers]


def hook_tables(modules: Iterable[nn.Module]) -> tuple[dict[int, Any], ...]:
    """The dictionaries that hold the hooks on every module there is, and on these."""
    return (
        global_hooks._global_forward_pre_hooks,
        global_hooks._global_forward_hooks,
        global_hooks._global_backward_hooks,
        *(getattr(module, name) for module in modules for name in _HOOKS),
    )


def user_hooks(tables: Iterable[dict[int, Any]]) -> tuple[int, ...]:
    """The hooks in these dictionaries that must fire: not what libraries wire themselves with."""
    return tuple(
        number
        for hooks in tables
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith(_OWN_HOOKS)
    )


def without_bridge(module: nn.Module, attention: Literal["sdpa", "eager"] = "sdpa") -> nn.Module:
    """A copy of the Hugging Face module below TransformerLens's: its weights without hooks.

    Attention is one fused step ("sdpa"), or "eager", to be differentiated twice and forward.
    """
    while (inner := getattr(module, "_original_component", None)) is not None:
        module = cast(nn.Module, inner)
    plain: Any = copy.copy(module)
    plain.__dict__ = dict(module.__dict__) | {name: OrderedDict() for name in _HOOKS}
    plain._modules = {
        name: None if child is None else without_bridge(child, attention)
        for name, child in module._modules.items()
    }
    plain._parameters = {
        name: None if weight is None else weight.detach()
        for name, weight in module._parameters.items()
    }
    plain.training = False
    if hasattr(getattr(plain, "config", None), "_attn_implementation"):
        plain.config = copy.copy(plain.config)
        plain.config._attn_implementation = attention
    return plain


def plain_model(model: Model) -> Any:
    """The Hugging Face model below a bridge, which computes the same in less time.

    None where it would not, as with user hooks.
    """
    if not hasattr(model, "original_model") or getattr(model, "compatibility_mode", False):
        return None
    quantised = not all(p.is_floating_point() for p in model.original_model.parameters())
    modules = (module for root in whole_model(model) for module in root.modules())
    if quantised or is_dispatched(*whole_model(model)) or user_hooks(hook_tables(modules)):
        return None
    return without_bridge(model.original_model)


def module_below(model: Model, plain: nn.Module, layer: int, place: Place = "block") -> nn.Module:
    """The block of `plain_model(model)` that belongs to a layer, or its output projection."""
    block = model.blocks[layer]
    named = model.original_model.named_modules()
    below: Any = plain.get_submodule(next(name for name, module in named if module is block))
    if place == "block":
        return below
    # By its weight, which both share: their names differ between architectures.
    address = block.attn.o.original_component.weight.data_ptr()
    weights = ((module, module._parameters.get("weight")) for module in below.modules())
    return next(m for m, weight in weights if weight is not None and weight.data_ptr() == address)
