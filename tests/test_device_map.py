"""Models whose weights are partly on disk: the same vectors, the same texts."""

import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import N_LAYERS, tiny_hf, tokenizer
from tl_melbo.model import load

PROMPT = "Tell me about yourself."
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}
REST = {
    "llama": ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
}


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def whole_and_spread(request, tmp_path_factory):
    """A model in memory, and the same with every other block, and its embedding, on disk."""
    name, folder = request.param, tmp_path_factory.mktemp("spread")
    tiny_hf(name).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    places = {BLOCKS[name].format(i): ("cpu", "disk")[i % 2] for i in range(N_LAYERS)}
    places |= {part: "disk" if "embed" in part else "cpu" for part in REST[name]}
    off = {"device_map": places, "offload_folder": folder / "off"}
    return tm.load_model(folder / "model"), tm.load_model(folder / "model", **off)


def meta(model):
    return [name for name, p in model.named_parameters() if p.is_meta]


def test_f_and_search(whole_and_spread):
    spread = whole_and_spread[1]
    assert meta(spread)
    before = meta(spread), [p.requires_grad for p in spread.parameters()]
    maps = [tm.ActivationMap.from_prompts(m, PROMPT, 1, 4) for m in whole_and_spread]
    assert maps[1].path == "hooked"
    torch.testing.assert_close(maps[1].y, maps[0].y, rtol=1e-5, atol=1e-5)
    found, same = (tm.melbo(f, 3, 2.0, steps=3) for f in maps)
    torch.testing.assert_close(same.vectors, found.vectors, rtol=1e-5, atol=1e-5)
    assert same.story["weights"] == found.story["weights"]
    assert not maps[1].delta(torch.zeros(1, 32)).any()
    assert (meta(spread), [p.requires_grad for p in spread.parameters()]) == before


def test_texts_and_distributions(whole_and_spread):
    theta = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    vectors = tm.SteeringVectors.from_tensor(theta, source_layer=3)
    whole, spread = whole_and_spread
    texts = [tm.generate(m, PROMPT, vectors, max_new_tokens=5) for m in whole_and_spread]
    assert texts[0].equals(texts[1])
    # Steered, not merely alike.
    assert texts[0]["completion"].nunique() > 1
    p, q = (tm.next_token_log_probs(m, PROMPT, vectors) for m in whole_and_spread)
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5)
    tokens = whole.to_tokens(PROMPT)
    with tm.steered(whole, vectors[0]), tm.steered(spread, vectors[0]), torch.no_grad():
        torch.testing.assert_close(spread(tokens), whole(tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="spread over several devices"):
        vectors[0].bake(spread, "nowhere")


def test_adapters(whole_and_spread):
    settings = {"max_new_tokens": 4, "steps": 1, "batch_size": 1}
    found, same = (tm.divergence_adapter(m, ["Hi", PROMPT], **settings) for m in whole_and_spread)
    torch.testing.assert_close(same.B, found.B, rtol=1e-4, atol=1e-5)
    texts = [tm.generate(m, PROMPT, found, max_new_tokens=3) for m in whole_and_spread]
    assert texts[0].equals(texts[1])


def test_what_cannot_be_spread_is_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"bundled model is a \.gguf file"):
        tm.load_model(device_map="auto")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"a\.gguf' is a \.gguf file"):
        tm.load_model(tmp_path / "a.gguf", device_map="auto")
    with pytest.raises(ValueError, match="pass one of them"):
        tm.load_model(model_folder, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="pass both, or neither"):
        tm.load_model(model_folder, offload_folder=tmp_path)
    blockless = {"model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    for places in (blockless, {"": "dsk"}):  # no device for the blocks; no such device
        with pytest.raises(ValueError, match=r"^device_map: .*a dictionary with a device for each"):
            tm.load_model(model_folder, device_map=places, offload_folder=tmp_path / "off")


@pytest.mark.parametrize(("name", "hint"), [("model.layer.1", "did you mean"), ("x", "'' is the")])
def test_a_name_of_no_module_is_told(model_folder, name, hint):
    """transformers passes over it, since everything has a device without it, too."""
    allowed = r"Allowed are \[model, model\.embed_tokens, model\.layers, model\.layers\.0, "
    with pytest.raises(ValueError, match=f"^device_map: .* no module '{name}'; {hint}.*{allowed}"):
        tm.load_model(model_folder, device_map={"": "cpu", name: "cpu"})


def test_a_weight_has_a_place_of_its_own(model_folder):
    """As in maps that accelerate infers."""
    model = tm.load_model(model_folder, device_map={"": "cpu", "lm_head.weight": "cpu"})
    assert not meta(model)


def test_auto_is_as_without(model_folder):
    """On a machine where all of it has room, nothing is spread."""
    auto = tm.load_model(model_folder, device_map="auto")
    assert not meta(auto)
    plain = tm.load_model(model_folder, device=str(next(auto.parameters()).device))
    p, q = (tm.next_token_log_probs(m, PROMPT) for m in (plain, auto))
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5)


def test_a_map_of_a_gpu_and_the_memory_beside_it_is_left_to_the_hooks():
    """TransformerLens refuses such a map; the model keeps it."""
    hf_model = tiny_hf("llama")
    hf_model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "cpu"}
    load.boot("tiny", hf_model, tokenizer())
    assert hf_model.hf_device_map == {"model.embed_tokens": 0, "model.layers.0": "cpu"}
