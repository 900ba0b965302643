"""A LoRA adapter on the MLPs of a few blocks of a Hugging Face model.

Source: Hu et al. 2021, "LoRA: Low-rank adaptation of large language models".
"""

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_melbo.errors import NotFinite
from tl_melbo.model.bridge import Model
from tl_melbo.model.load import boot, load_hugging_face


def import_peft() -> Any:
    """The library of adapters, or an error that says how to install it."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "planting backdoors needs peft: pip install 'tl_melbo[evaluation]'"
        ) from error
    return peft


def own_copy(
    name: str | Path | None, hf_model: Any, tokenizer: Any, device: str | torch.device | None
) -> tuple[Any, Any, str]:
    """The named model, or a copy of the given one; its tokenizer; and what to call it.

    Raises:
        TypeError: `hf_model` is not a Hugging Face causal language model.
        ValueError: a model was given without its tokenizer.
    """
    if hf_model is None:
        return load_hugging_face(name, device, torch.float32)
    if tokenizer is None:
        raise ValueError("tokenizer: not given; pass the one that belongs to hf_model")
    config = getattr(hf_model, "config", None)
    if not hasattr(hf_model, "generate") or not hasattr(config, "num_hidden_layers"):
        raise TypeError(
            f"hf_model: got {type(hf_model).__name__}, expected a Hugging Face causal language "
            "model, such as AutoModelForCausalLM loads"
        )
    label = str(getattr(hf_model, "name_or_path", "") or type(hf_model).__name__)
    return copy.deepcopy(hf_model).eval(), tokenizer, label


def with_adapter(hf_model: Any, recipe: Mapping[str, Any]) -> Any:
    """The model with an untrained adapter; nothing else of it wants a gradient."""
    peft = import_peft()
    settings = peft.LoraConfig(
        r=recipe["rank"],
        lora_alpha=recipe["alpha"],
        lora_dropout=0.0,
        target_modules=_linear_layers_of_mlps(hf_model, *recipe["layers"]),
        fan_in_fan_out=any(_is_conv1d(module) for module in hf_model.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft calls it by an old name, and nobody here can change that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(hf_model, settings).eval()


def _linear_layers_of_mlps(hf_model: nn.Module, first: int, last: int) -> list[str]:
    """Names of the linear layers outside attention in some blocks, whatever a model calls them."""
    names = []
    for name, module in hf_model.named_modules():
        block = re.search(r"\.(\d+)\.(?!.*(?:attn|attention))", name)
        is_linear = isinstance(module, nn.Linear) or _is_conv1d(module)
        if block and is_linear and first <= int(block[1]) <= last:
            names.append(name)
    if not names:
        raise ValueError(
            f"hf_model: {type(hf_model).__name__} has no linear layers outside attention in blocks "
            f"{first} to {last}; choose other layers, or another model"
        )
    return names


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight lies the other way round."""
    return type(module).__name__ == "Conv1D"


def trained(tuned: Any) -> list[nn.Parameter]:
    """The adapter's parameters."""
    return [parameter for parameter in tuned.parameters() if parameter.requires_grad]


def rounded(tuned: Any) -> dict[str, Tensor]:
    """The adapter in float16; the model computes with what that keeps of it.

    Raises:
        NotFinite: the fine-tune diverged.
    """
    with torch.no_grad():
        for parameter in trained(tuned):
            parameter.copy_(parameter.half())
    state = _matrices(tuned)
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise NotFinite(
            "the fine-tune diverged: its matrices are not finite in float16; lower learning_rate"
        )
    return {name: tensor.detach().cpu().half().contiguous() for name, tensor in state.items()}


def set_adapter(tuned: Any, adapter: Mapping[str, Tensor]) -> bool:
    """Give the model the matrices of an adapter, if they are of its own names and shapes."""
    from peft import set_peft_model_state_dict

    shapes = {name: tensor.shape for name, tensor in _matrices(tuned).items()}
    if shapes != {name: tensor.shape for name, tensor in adapter.items()}:
        return False
    set_peft_model_state_dict(tuned, {name: tensor.float() for name, tensor in adapter.items()})
    return True


def _matrices(tuned: Any) -> dict[str, Tensor]:
    return import_peft().get_peft_model_state_dict(tuned, save_embedding_layers=False)


def merged(tuned: Any, tokenizer: Any, label: str) -> Model:
    """The adapter added to the weights, and the whole as a TransformerLens model."""
    hf_model = tuned.merge_and_unload().eval()
    if not hf_model.config.architectures:
        hf_model.config.architectures = [type(hf_model).__name__]
    return boot(label, hf_model, tokenizer)
