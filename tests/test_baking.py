"""Baked models: read by plain transformers, and held to `steered`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_melbo as tm
from tests.tiny_models import D_MODEL, as_bridge, tiny_bridge, tiny_hf, tokenizer
from tl_melbo.model.bridge import without_bridge
from tl_melbo.model.load import gguf_reader

PROMPT = "Tell me about yourself."


def a_vector(layer=2, seed=0):
    theta = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return tm.SteeringVectors.from_tensor(3 * theta / theta.norm(), source_layer=layer)


def log_probs(hugging_face, tokens):
    with torch.no_grad():
        return hugging_face(tokens).logits.log_softmax(-1)


def read_back(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gptneox"])
def test_transformers_reads_a_steered_model(architecture, tmp_path, unchanged):
    model, one = tiny_bridge(architecture), a_vector()
    unchanged(model)
    tokens = model.to_tokens(PROMPT)
    with tm.steered(model, one), torch.no_grad():
        ours = model(tokens).log_softmax(-1)
    folder = one.bake(model, tmp_path / "baked")
    assert folder == (tmp_path / "baked").resolve()
    baked = read_back(folder)
    expected_type = "llama" if architecture == "qwen2" else baked.config.model_type
    assert baked.config.model_type == expected_type
    torch.testing.assert_close(log_probs(baked, tokens), ours, rtol=1e-5, atol=1e-5)
    plain = log_probs(without_bridge(model.original_model), tokens)
    assert float((ours - plain).abs().max()) > 0.1
    # The vector is named where an auditor looks.
    said = json.loads((folder / "config.json").read_text())["steering"]
    assert said == {"layers": [2], "norms": [pytest.approx(3.0)]}


def test_tied_embeddings_several_blocks_and_narrow_types(tmp_path):
    hf_model = tiny_hf("llama", torch.bfloat16)
    hf_model.config.tie_word_embeddings = True
    hf_model.tie_weights()
    model = as_bridge(hf_model)
    theta = torch.randn(1, 2, D_MODEL, generator=torch.Generator().manual_seed(1))
    layered = tm.LayeredVectors.from_tensor(theta, [1, 3])
    from tl_melbo.baking import bake

    baked = read_back(bake(model, layered, tmp_path / "baked"))
    assert baked.get_output_embeddings().weight is baked.get_input_embeddings().weight
    for layer, vector in zip((1, 3), theta[0], strict=True):
        bias = baked.model.layers[layer].mlp.down_proj.bias
        assert torch.equal(bias.detach(), vector.bfloat16().float())
    assert not baked.model.layers[2].mlp.down_proj.bias.any()


def test_what_no_bias_can_hold_is_refused(tmp_path):
    model, one = tiny_bridge("llama"), a_vector()
    with pytest.raises(ValueError, match="normalises what its MLP writes"):
        one.bake(tiny_bridge("gemma3"), tmp_path / "a")
    with pytest.raises(ValueError, match="expected exactly one"):
        tm.concatenate([one, -one]).bake(model, tmp_path / "a")
    with pytest.raises(ValueError, match="layers, so allowed are"):
        one.bake(model, tmp_path / "a", layer=17)
    with pytest.raises(ValueError, match=r"only a \.gguf file"):
        one.bake(model, tmp_path / "a", source="x.gguf")
    with pytest.raises(ValueError, match=r"was not loaded from a \.gguf"):
        one.bake(model, tmp_path / "a.gguf")
    sliding = tiny_bridge("qwen2")
    sliding.original_model.config.use_sliding_window = True
    with pytest.raises(ValueError, match="sliding window"):
        one.bake(sliding, tmp_path / "a")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FileExistsError):
        one.bake(model, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def tiny_gguf(path: Path, width: int = D_MODEL) -> Path:
    """As much of a llama model as is copied: numbers, words, a quantised tensor."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(width)
    writer.add_block_count(6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list(["a", "ü", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_bool("llama.anything", True)
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.2.ffn_down.weight", gguf.quantize(rows, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", rows[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_takes_one_more_tensor(tmp_path):
    import gguf

    model, one, source = tiny_bridge("llama"), a_vector(), tiny_gguf(tmp_path / "source.gguf")
    baked = one.bake(model, tmp_path / "baked.gguf", source=source)
    (-0.5 * one).bake(model, tmp_path / "twice.gguf", source=baked)
    old, new, twice = map(gguf.GGUFReader, (source, baked, tmp_path / "twice.gguf"))
    assert type(gguf_reader()(baked).tensors[0].data) is np.ndarray  # a map is cut slowly
    facts = [{n: f.contents() for n, f in r.fields.items() if n[:4] != "GGUF"} for r in (old, new)]
    assert facts[0] == facts[1]
    assert "tokenizer.ggml.tokens" in facts[0]
    tensors = {tensor.name: tensor for tensor in new.tensors}
    for tensor in old.tensors:
        same = tensors.pop(tensor.name)
        assert same.tensor_type == tensor.tensor_type
        assert np.array_equal(same.data, tensor.data)
    assert [*tensors] == ["blk.2.ffn_down.bias"]
    bias = tensors["blk.2.ffn_down.bias"]
    assert bias.tensor_type.name == "F32"
    assert np.array_equal(bias.data, one.vectors[0].numpy())
    assert np.allclose(twice.tensors[-1].data, 0.5 * one.vectors[0].numpy())
    for there in (baked, source):
        with pytest.raises(FileExistsError, match="name a new file"):
            one.bake(model, there, source=source)
    with pytest.raises(ValueError, match="both must be llama and of one size"):
        one.bake(model, tmp_path / "b.gguf", source=tiny_gguf(tmp_path / "wide.gguf", 64))
    with pytest.raises(FileNotFoundError, match=re.escape(str(Path("~/no.gguf").expanduser()))):
        one.bake(model, tmp_path / "other.gguf", source="~/no.gguf")
    with pytest.raises(FileExistsError, match="name a new file"):  # which would be lost
        one.bake(model, source, source=source)
    (tmp_path / "bad.gguf").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="not a model in a GGUF file"):
        one.bake(model, tmp_path / "b.gguf", source=tmp_path / "bad.gguf")


def test_a_baked_gguf_is_not_loaded_without_its_vector(tmp_path):
    """The reader of transformers drops such a bias, and says nothing."""
    model, one = tiny_bridge("llama"), a_vector()
    baked = one.bake(model, tmp_path / "baked.gguf", source=tiny_gguf(tmp_path / "source.gguf"))
    with pytest.raises(ValueError, match=r"ffn_down\.bias"):
        tm.load_model(baked)


def test_a_baked_folder_is_a_model_as_any(tmp_path):
    tiny_hf("qwen2").save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    model, one = tm.load_model(tmp_path / "source"), a_vector()
    again = tm.load_model(one.bake(model, tmp_path / "baked"))
    # Whether a first token is put before the text is a thing of the architecture's in
    # TransformerLens, and this one is Llama now.
    tokens = model.to_tokens(PROMPT)
    with tm.steered(model, one), torch.no_grad():
        ours = model(tokens)
    torch.testing.assert_close(again(tokens), ours, rtol=1e-4, atol=1e-4)
    # As the checkpoint has it, not as TransformerLens changes it.
    read = AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert read(PROMPT)["input_ids"] == tokenizer()(PROMPT)["input_ids"]
