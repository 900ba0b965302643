"""llama.cpp, ready built, driven by ctypes: as much of it as the tests need.

Its settings are passed as they come, as so many bytes: their layout changes between versions.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_float, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PACKAGE = "@node-llama-cpp/linux-x64"
VERSION = "3.22.1"
_LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class _Bytes(ctypes.Structure):
    """A structure of unknown layout, and no longer than this."""

    _fields_ = (("bytes", c_char * 1024),)


class _String(ctypes.Structure):
    """std::string, of libstdc++."""

    _fields_ = (("at", c_void_p), ("size", c_size_t), ("own", c_char * 16))


class _File(ctypes.Structure):
    """common_control_vector_load_info."""

    _fields_ = (("strength", c_float), ("name", _String))


class _Several(ctypes.Structure):
    """std::vector."""

    _fields_ = (("begin", c_void_p), ("end", c_void_p), ("room", c_void_p))


class _Read(ctypes.Structure):
    """common_control_vector_data."""

    _fields_ = (("width", c_int), ("data", _Several))


def library(folder: Path) -> Path:
    """The folder with the ready built library; the test is skipped where it cannot be fetched."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which fetches a ready built llama.cpp, is not installed")
    wanted = [f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--no-audit", "--no-fund"]
    # Nothing else is installed: the library of another system is refused.
    done = subprocess.run(
        [npm, "install", "--prefix", str(folder), *wanted],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip()[-200:]}")
    return folder / "node_modules" / PACKAGE / "bins" / "linux-x64"


class LlamaCpp:
    """One model in llama.cpp on the CPU, with or without a control vector."""

    def __init__(self, folder: Path, model: Path) -> None:
        # In the order in which they need each other.
        parts = ("ggml-base", "ggml.v*", "llama.v*", "llama-common")
        base, ggml, self.lib, self.common = (
            ctypes.CDLL(str(next(folder.glob(f"lib{part}.so"))), mode=ctypes.RTLD_GLOBAL)
            for part in parts
        )
        self._quiet = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)(lambda *_: None)
        base.ggml_log_set(self._quiet, None)
        self.lib.llama_log_set(self._quiet, None)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.lib.llama_backend_init()
        self._returns(_Bytes, "model_default_params", "context_default_params", "batch_get_one")
        self._returns(c_void_p, "model_load_from_file", "init_from_model", "get_memory")
        self._returns(c_void_p, "model_get_vocab")
        self._returns(POINTER(c_float), "get_logits_ith")
        self.model = c_void_p(
            self.lib.llama_model_load_from_file(
                str(model).encode(), self.lib.llama_model_default_params()
            )
        )
        assert self.model, f"llama.cpp cannot load {model}"
        self.n_embd = self.lib.llama_model_n_embd(self.model)
        self.n_layers = self.lib.llama_model_n_layer(self.model)
        self.n_vocab = self.lib.llama_vocab_n_tokens(
            c_void_p(self.lib.llama_model_get_vocab(self.model))
        )
        self.context = c_void_p(
            self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        )
        self.lib.llama_set_n_threads(self.context, 1, 1)

    def _returns(self, kind: Any, *names: str) -> None:
        for name in names:
            getattr(self.lib, f"llama_{name}").restype = kind

    def control(self, path: Path | None, strength: float = 1.0) -> None:
        """Add the control vector of a file, as the server's --control-vector does; None: no more.

        Its own reader reads the file.
        """
        self.clear()
        if path is None:
            assert not self._adapter(None, 0, -1, -1)
            return
        name = str(path).encode()
        held = ctypes.create_string_buffer(name)
        file = _File(strength, _String(ctypes.addressof(held), len(name)))
        at = ctypes.addressof(file)
        end = at + ctypes.sizeof(file)
        read = _Read()
        load = getattr(self.common, _LOADER)
        load.restype = None
        load(byref(read), byref(_Several(at, end, end)))
        assert read.width == self.n_embd, f"llama.cpp cannot read {path}"
        # To the last block: what is not there would stay as an earlier vector left it.
        rows = (c_float * ((self.n_layers - 1) * self.n_embd))()
        ctypes.memmove(rows, read.data.begin, read.data.end - read.data.begin)
        assert not self._adapter(rows, len(rows), 1, self.n_layers)

    def _adapter(self, data: Any, size: int, first: int, last: int) -> int:
        width = self.n_embd
        set_it = self.lib.llama_set_adapter_cvec
        return set_it(
            self.context, data, c_size_t(size), c_int32(width), c_int32(first), c_int32(last)
        )

    def clear(self) -> None:
        """Forget all tokens: those of another vector would be attended to."""
        memory = c_void_p(self.lib.llama_get_memory(self.context))
        self.lib.llama_memory_clear(memory, ctypes.c_bool(True))

    def log_probs(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of the token after these, [d_vocab]."""
        self.clear()
        held = (c_int32 * len(tokens))(*tokens)
        batch = self.lib.llama_batch_get_one(held, c_int32(len(tokens)))
        assert not self.lib.llama_decode(self.context, batch)
        logits = self.lib.llama_get_logits_ith(self.context, c_int32(-1))
        found = torch.from_numpy(np.ctypeslib.as_array(logits, (self.n_vocab,)).copy())
        return found.log_softmax(-1)

    def close(self) -> None:
        """Free the memory."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
