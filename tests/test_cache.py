"""Converted GGUF files: what is kept, what is noticed, and what is no error."""

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tl_melbo.model import cache, load

SHORT = torch.float32


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "the cache"
    monkeypatch.setenv("TL_MELBO_CACHE", str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and more")
    return path


class Converter:
    """Writes two files, and counts how often it was asked to."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.calls, self.fail = 0, fail

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "weights").write_bytes(bytes(1000))
        if self.fail:
            raise self.fail
        (folder / "config.json").write_text("{}")


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_it_is_made_once_for_each_content_and_dtype(folder, source):
    convert = Converter()
    entry = cache.converted(source, torch.float32, convert)
    assert entry.parent == folder
    assert cache.converted(source, torch.float32, convert) == entry
    assert cache.converted(source, torch.float64, convert) == entry, "kept as float32"
    moved = source.rename(source.with_name("elsewhere.gguf"))
    assert cache.converted(moved, torch.float32, convert) == entry
    assert convert.calls == 1
    assert cache.converted(moved, torch.bfloat16, convert) != entry
    moved.write_bytes(b"GGUF and less")
    assert cache.converted(moved, torch.float32, convert) != entry
    assert convert.calls == 3


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("TL_MELBO_CACHE")
    assert cache.cache_folder() == Path("/somewhere/tl_melbo").absolute()
    monkeypatch.setenv("TL_MELBO_CACHE", "~/mine")
    assert cache.cache_folder() == Path.home() / "mine"


def cut(entry: Path) -> None:
    (entry / "weights").write_bytes(bytes(999))


def altered(entry: Path) -> None:
    (entry / "weights").write_bytes(bytes(999) + b"1")


def lost(entry: Path) -> None:
    (entry / "config.json").unlink()


def added(entry: Path) -> None:
    (entry / "evil.py").touch()


def linked(entry: Path) -> None:
    other = entry.parent / "other"
    (entry / "weights").rename(other)
    (entry / "weights").symlink_to(other)


def unfinished(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def broken(entry: Path) -> None:
    (entry / "manifest.json").write_text("[1")


def strange(entry: Path) -> None:
    (entry / "manifest.json").write_text(json.dumps({"files": {"../x": 1}}))


@pytest.mark.parametrize("damage", [cut, altered, lost, added, linked, unfinished, broken, strange])
def test_what_is_damaged_is_made_anew(folder, source, damage: Callable[[Path], None]):
    convert = Converter()
    entry = cache.converted(source, SHORT, convert)
    damage(entry)
    assert not cache.is_whole(entry)
    assert cache.converted(source, SHORT, convert) == entry
    assert cache.is_whole(entry)
    assert convert.calls == 2
    assert (entry / "weights").read_bytes() == bytes(1000)


def test_a_copy_of_the_cache_is_as_good(folder, source):
    convert = Converter()
    entry = cache.converted(source, SHORT, convert)
    for path in entry.iterdir():
        path.write_bytes(path.read_bytes())
    assert cache.converted(source, SHORT, convert) == entry
    assert convert.calls == 1


def test_a_failure_leaves_nothing_behind(folder, source):
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, ValueError("not a model"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            cache.converted(source, SHORT, Converter(error))
        assert entries(folder) == {"sources"}


@pytest.mark.slow
def test_two_at_once_convert_once_and_a_killed_one_does_not_matter(folder, source):
    code = f"""
import sys, time, torch, pathlib
from tl_melbo.model import cache
def convert(folder):
    (folder / "weights").write_bytes(bytes(10))
    print("converting", flush=True)
    time.sleep(float(sys.argv[1]))
cache.converted(pathlib.Path({str(source)!r}), torch.float32, convert)
"""

    def start(seconds: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    killed = start(1000)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "converting\n"
    assert any(name.endswith(".partial") for name in entries(folder))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [start(0.5), start(0.5)]
    printed = sorted(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert printed == ["", "converting\n"]
    assert not any(name.endswith(".partial") for name in entries(folder))


def test_the_digest_is_remembered_until_the_file_changes(folder, source, monkeypatch):
    first = cache.source_digest(source)
    read = cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda path: pytest.fail("was read again"))
    assert cache.source_digest(source) == first
    monkeypatch.setattr(cache, "_sha256", read)
    time.sleep(0.02)
    source.write_bytes(b"GGUF and less")
    assert cache.source_digest(source) != first


def small_model(gguf_file: Path) -> None:
    """Two blocks of a llama in a GGUF file, with a tokenizer of five words."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(gguf_file, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    for name, shape in (tensors | {"token_embd": (5, 32), "output_norm": (32,)}).items():
        values = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        if len(shape) == 2:
            values = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    small_model(path)
    return path


def same(one: tuple, other: tuple) -> None:
    """Models and tokenizers are the same, bit for bit."""
    (model, tokenizer), (its_model, its_tokenizer) = one[:2], other[:2]
    weights, its_weights = model.state_dict(), its_model.state_dict()
    assert weights.keys() == its_weights.keys()
    for key, weight in weights.items():
        assert weight.dtype == its_weights[key].dtype
        assert torch.equal(weight, its_weights[key]), key
    for part in ("config", "generation_config"):
        assert getattr(model, part).to_dict() == getattr(its_model, part).to_dict()
    assert not hasattr(model.config, "quantization_config")
    assert model.config.architectures
    assert tokenizer.backend_tokenizer.to_str() == its_tokenizer.backend_tokenizer.to_str()
    assert tokenizer.chat_template == its_tokenizer.chat_template
    assert tokenizer("ab</s>a")["input_ids"] == its_tokenizer("ab</s>a")["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_model_is_the_same_bit_for_bit(folder, gguf_file, dtype, monkeypatch):
    direct = load._read_gguf(gguf_file, dtype, "small")
    first = load.load_hugging_face(gguf_file, "cpu", dtype)
    monkeypatch.setattr(load, "_read_gguf", lambda *_: pytest.fail("was read again"))
    second = load.load_hugging_face(gguf_file, "cpu", dtype)
    assert next(second[0].parameters()).dtype == dtype
    same(direct, first)
    same(direct, second)
    with torch.no_grad():  # what somebody does with the model does not reach the file
        next(second[0].parameters()).add_(1)
    same(direct, load.load_hugging_face(gguf_file, "cpu", dtype))


def test_a_truncated_cache_is_made_anew(folder, gguf_file):
    first = load.load_hugging_face(gguf_file, "cpu", SHORT)
    (weights,) = folder.glob("*/model.safetensors")
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-100])
    same(first, load.load_hugging_face(gguf_file, "cpu", SHORT))
    assert len(weights.read_bytes()) == len(kept)
    assert cache.is_whole(weights.parent)


def test_a_cache_that_passes_and_cannot_be_read_is_left_aside(folder, gguf_file, monkeypatch):
    first = load.load_hugging_face(gguf_file, "cpu", SHORT)
    (weights,) = folder.glob("*/model.safetensors")
    weights.write_bytes(b"damaged")
    monkeypatch.setattr(cache, "is_whole", lambda entry: entry.exists())
    same(first, load.load_hugging_face(gguf_file, "cpu", SHORT))
    assert not weights.exists()


def no_space(*_args: object, **_settings: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trouble", ["file in the way", "full", "full while saving", "no locks"])
def test_a_cache_that_cannot_be_written_is_no_error(folder, gguf_file, monkeypatch, trouble, dtype):
    direct = load._read_gguf(gguf_file, dtype, "small")
    if trouble == "file in the way":
        folder.touch()
    elif trouble == "full":
        monkeypatch.setattr(Path, "mkdir", no_space)
    elif trouble == "full while saving":
        monkeypatch.setattr(type(direct[0]), "save_pretrained", no_space)
    else:
        monkeypatch.setattr(cache.FileLock, "acquire", no_locks)
    with pytest.warns(UserWarning, match="cannot be kept in .*TL_MELBO_CACHE") as told:
        found = load.load_hugging_face(gguf_file, "cpu", dtype)
    assert len(told) == 1
    assert told[0].filename == __file__
    same(direct, found)
    monkeypatch.undo()
    assert not list(folder.glob("*.partial"))
    assert not list(folder.glob(".*.partial"))


def no_locks(*_args: object, **_settings: object) -> None:
    raise NotImplementedError


def test_nothing_is_drawn_and_names_are_restored(folder, gguf_file, capfd):
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load.load_hugging_face(gguf_file, "cpu", SHORT)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert "%|" not in capfd.readouterr().err
