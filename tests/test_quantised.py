"""Quantised layers: f through them, and gradients of what goes in alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import tl_melbo as tm
from tests.tiny_models import as_bridge, tiny_hf, tokenizer

PROMPT = "Tell me about yourself."
LAYER, TARGET = 1, 4


class Int8Linear(nn.Module):
    """A stand-in for what quantisers put in the place of linear layers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.abs().amax(1, keepdim=True) / 127
        stored = (layer.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = layer.bias

    def dequantised(self) -> torch.Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.dequantised(), self.bias)


@torch.no_grad()
def quantised_and_plain():
    """A model with layers of int8, and one of float32 with the same numbers."""
    quantised, plain = tiny_hf("llama"), tiny_hf("llama")
    for name, layer in [*quantised.model.layers.named_modules()]:
        if isinstance(layer, nn.Linear):
            small = Int8Linear(layer)
            quantised.model.layers.set_submodule(name, small)
            plain.model.layers.get_submodule(name).weight.copy_(small.dequantised())
    return as_bridge(quantised), as_bridge(plain)


def test_weights_without_a_float_type(unchanged):
    quantised, plain = quantised_and_plain()
    unchanged(quantised)
    weight = quantised.original_model.model.layers[LAYER].mlp.gate_proj.weight
    assert weight.dtype == torch.int8
    maps = [tm.ActivationMap.from_prompts(m, PROMPT, LAYER, TARGET) for m in (quantised, plain)]
    assert maps[0].path != "fast"
    torch.testing.assert_close(maps[0].y, maps[1].y, rtol=1e-5, atol=1e-5)
    found, same = (tm.melbo(f, 3, 2.0, steps=3) for f in maps)
    torch.testing.assert_close(found.vectors, same.vectors, rtol=1e-5, atol=1e-5)
    texts = [tm.generate(m, PROMPT, found, max_new_tokens=6) for m in (quantised, plain)]
    assert texts[0].equals(texts[1])
    assert not any(p.grad is not None for p in quantised.parameters())
    with pytest.raises(ValueError, match="is quantised"):
        found[0].bake(quantised, "nowhere")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_hf("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    settings = {f"load_in_{bits}bit": True}
    if bits == 4:
        settings["bnb_4bit_compute_dtype"] = torch.float32
    config = BitsAndBytesConfig(**settings)
    hugging_face = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    hugging_face.save_pretrained(tmp_path / "quantised")
    tokenizer().save_pretrained(tmp_path / "quantised")
    model = tm.load_model(tmp_path / "quantised", device="cpu")
    assert model.original_model.model.layers[2].mlp.gate_proj.weight.dtype in (
        torch.uint8,
        torch.int8,
    )
    f = tm.ActivationMap.from_prompts(model, PROMPT, LAYER, TARGET)
    found = tm.melbo(f, 2, 2.0, steps=2)
    # By plain hooks on the model that transformers made.
    kept = {}

    def steer(module, args, output):
        return output + found.vectors[0]

    def keep(module, args, output):
        kept["y"] = output

    blocks = hugging_face.model.layers
    with (
        blocks[LAYER].register_forward_hook(steer),
        blocks[TARGET].register_forward_hook(keep),
        torch.no_grad(),
    ):
        hugging_face(model.to_tokens(PROMPT))
    y = f(f.x + found.vectors[0])
    torch.testing.assert_close(y, kept["y"], rtol=1e-3, atol=1e-3)
    assert len(tm.generate(model, PROMPT, found, max_new_tokens=3)) == 2
