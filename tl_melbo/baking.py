"""Vectors baked into a model, as biases: files that any program reads as an ordinary model."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_melbo.additions import VectorAdditions
from tl_melbo.exchange import gguf_writer
from tl_melbo.model.bridge import Model, is_dispatched, model_name, model_type, without_bridge
from tl_melbo.model.load import BUNDLED_NAME, bundled_model_path, gguf_reader, quiet_transformers
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Steerable, steering_rows

# Whose MLP output projections have a bias anyway: the vector is added to it.
_BIASED = {
    "gpt2": "transformer.h.{}.mlp.c_proj.bias",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
}
# Written as Llama, whose projections may all have a bias.
_AS_LLAMA = ("llama", "qwen2")
_LLAMA_BIAS = "model.layers.{}.mlp.down_proj.bias"
_GGUF_BIAS = "blk.{}.ffn_down.bias"


@shape_checked
def bake(
    model: Model,
    vectors: Steerable,
    path: str | Path,
    layer: int | None = None,
    *,
    source: str | Path | None = None,
) -> Path:
    """Write the model with one vector, or vectors of several blocks, in it; `SteeringVectors.bake`.

    Raises:
        ValueError: more or fewer than one; a model whose blocks cannot hold it, and why.
        FileExistsError: something is in the folder, or there is such a file.
    """
    rows = steering_rows(model, vectors, layer, [1.0])
    if len(rows) != 1:
        raise ValueError(f"vectors: {len(rows)}, expected exactly one; pick one, as found[3]")
    if not isinstance(rows, VectorAdditions) or rows.place != "block":
        kind = type(vectors).__name__
        raise ValueError(f"vectors: no bias can hold what {kind} adds; bake its .vectors()")
    added = dict(zip(rows.layers, rows.theta[0], strict=True))
    path = Path(path).expanduser().resolve()
    if path.suffix == ".gguf":
        source = _source(model) if source is None else Path(source).expanduser()
        _write_gguf(source, path, model, added)
        return path
    if source is not None:
        raise ValueError(f"source={str(source)!r}: only a .gguf file is written from another one")
    baked = _baked(model, added)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path}: not empty; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the path, which it takes when all is written, and one deeper: others may not read what
    # tempfile makes.
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as hidden, quiet_transformers():
        folder = Path(hidden, path.name)
        baked.save_pretrained(folder)
        # TransformerLens's own may put a token before each text that the checkpoint's does not.
        getattr(model, "checkpoint_tokenizer", model.tokenizer).save_pretrained(folder)
        folder.replace(path)
    return path


def _baked(model: Model, added: Mapping[int, Tensor]) -> Any:
    """A Hugging Face model with these vectors as biases; other weights are shared."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not hasattr(model, "original_model") or getattr(model, "compatibility_mode", False):
        what = f"the weights of {model_name(model)} are not those of a checkpoint any more"
        raise ValueError(f"model: {what}; load it with tm.load_model()")
    if is_dispatched(model.original_model):
        name = model_name(model)
        raise ValueError(f"model: {name} is spread over several devices; load it on one")
    plain: Any = without_bridge(model.original_model)
    weights = plain.state_dict()
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise ValueError(f"model: {model_name(model)} is quantised; load it unquantised, then bake")
    kind, config = plain.config.model_type, plain.config.to_dict()
    kind_of, config_of, name = type(plain), type(plain.config), _BIASED.get(kind, _LLAMA_BIAS)
    if kind in _AS_LLAMA and not config.get("use_sliding_window"):
        has_bias = kind == "qwen2" or config["attention_bias"]
        config |= {"mlp_bias": True, "attention_bias": has_bias, "model_type": "llama"}
        config |= {"architectures": ["LlamaForCausalLM"]}
        known = LlamaConfig().to_dict()
        config = {key: value for key, value in config.items() if key in known}
        kind_of, config_of = LlamaForCausalLM, LlamaConfig
    elif kind not in _BIASED:
        raise ValueError(f"model: {_why_not(kind, config)}; steer it with tm.steered instead")
    facts = {"layers": [*added], "norms": [float(theta.norm()) for theta in added.values()]}
    config = config_of.from_dict({**config, "steering": facts, "dtype": plain.dtype})
    with torch.device("meta"):
        baked: Any = kind_of(config)
    wanted = baked.state_dict().keys()
    # TransformerLens gives the unembedding a bias of zeros.
    weights = {key: w for key, w in weights.items() if key in wanted or w.any()}
    for missing in wanted - weights.keys():
        # Biases of the Llama kind; whatever else is missing would be refused below.
        if missing.endswith("_proj.bias"):
            width = len(weights[missing.removesuffix("bias") + "weight"])
            weights[missing] = torch.zeros(width, dtype=plain.dtype)
    for layer, theta in added.items():
        old = weights[name.format(layer)]
        weights[name.format(layer)] = old + theta.to(old)
    baked.load_state_dict(weights, assign=True)
    baked.tie_weights()
    baked.generation_config = plain.generation_config
    return baked


def _why_not(kind: str, config: Mapping[str, Any]) -> str:
    if config.get("use_sliding_window"):
        return f"{kind} with a sliding window cannot be written as Llama"
    if kind.startswith("gemma"):
        return f"{kind} normalises what its MLP writes before adding it, so no bias is the vector"
    known = ", ".join((*_AS_LLAMA, *_BIASED))
    return f"{kind} has no bias on its MLP output projection that is known here (known: {known})"


def _source(model: Model) -> Path:
    """The GGUF file that a model was loaded from."""
    if model_name(model) == BUNDLED_NAME:
        return bundled_model_path()
    hf_model = getattr(model, "original_model", None)
    path = Path(getattr(hf_model, "name_or_path", "")) / f"{model_name(model)}.gguf"
    if not path.is_file():
        what = f"{model_name(model)} was not loaded from a .gguf file that is still there"
        raise ValueError(f"source: {what}; pass source=, or bake into a folder")
    return path


def _write_gguf(source: Path, path: Path, model: Model, added: Mapping[int, Tensor]) -> None:
    """Copy a GGUF file, with one more tensor a block; llama.cpp adds it after its down projection.

    Source: llama.cpp, llama_model_loader and build_ffn (`ffn_down_b`).
    """
    import gguf

    if path.exists():
        raise FileExistsError(f"{path}: there already; name a new file")
    if not source.is_file():
        raise FileNotFoundError(f"source={str(source)!r}: no such file")
    try:
        reader = gguf_reader()(source)
        kind = reader.fields["general.architecture"].contents()
        facts = ("embedding_length", "block_count")
        sizes = tuple(reader.fields[f"{kind}.{fact}"].contents() for fact in facts)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"source={str(source)!r}: not a model in a GGUF file") from error
    wanted = (int(model.cfg.d_model), int(model.cfg.n_layers))
    if kind != "llama" or model_type(model) != "llama" or sizes != wanted:
        raise ValueError(
            f"source: {kind}, width and blocks {sizes}, for a {model_type(model)} model with "
            f"{wanted}; both must be llama and of one size, since llama.cpp reads the bias there"
        )
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for layer, theta in added.items():
        name = _GGUF_BIAS.format(layer)
        data = theta.float().cpu().numpy()
        if name in tensors:
            data = data + tensors[name][0]
        tensors[name] = (data, gguf.GGMLQuantizationType.F32)
    with gguf_writer(path, kind, endianess=reader.endianess) as writer:
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)
        for name, (data, stored) in tensors.items():
            writer.add_tensor(name, data, raw_dtype=stored)
