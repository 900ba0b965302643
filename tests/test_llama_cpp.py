"""llama.cpp reads our control vectors and our baked files, and does with them what we do."""

from pathlib import Path

import gguf
import pytest
import torch

import tl_melbo as tm
from tests import llama_cpp
from tl_melbo.model.load import bundled_model_path
from tl_melbo.model.tokens import to_tokens

pytestmark = pytest.mark.slow
PROMPTS = ("Tell me about yourself.", "What is the capital of France?", "Write a short story.")
# With weights in float32, only its float16 KV cache differs from ours. Its kernels for quantised
# weights round the activations, too: up to 0.03 without any vector.
MOST, MOST_QUANTISED = 1e-3, 0.05


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.double().exp() * (p.double() - q.double())).sum())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return llama_cpp.library(tmp_path_factory.mktemp("llama_cpp"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The bundled model with its weights in float32."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    reader = gguf.GGUFReader(bundled_model_path())
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def vectors(model):
    theta = torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    theta = 25 * theta / theta.norm(dim=-1, keepdim=True)
    return tm.SteeringVectors.from_tensor(theta, source_layer=8, model=model.cfg.model_name)


def divergences(theirs, model, vector, other):
    """From ours under a vector: theirs, ours without, and ours under another vector."""
    rows = []
    for prompt in PROMPTS:
        expected, without, wrong = (
            tm.next_token_log_probs(model, prompt, each, chat=True)[0]
            for each in (vector, None, other)
        )
        found = theirs.log_probs(to_tokens(model, prompt, chat=True)[0].tolist())
        rows.append([kl(expected, each) for each in (found, without, wrong)])
    return rows


def check(rows, most):
    for found, without, wrong in rows:
        assert found < most, rows
        assert min(without, wrong) > 10 * found, rows


@pytest.mark.parametrize("most", [MOST, MOST_QUANTISED])
def test_a_control_vector(built, model, wide, vectors, tmp_path, most):
    theirs = llama_cpp.LlamaCpp(built, wide if most == MOST else bundled_model_path())
    for vector, scale, layer in [(vectors[0], 1.0, 8), (vectors[1], -0.8, 1)]:
        path: Path = tmp_path / f"{layer}.gguf"
        vector.to_repeng_gguf(path, layer=layer, model_type="llama")
        theirs.control(path, scale)
        placed = tm.SteeringVectors.from_tensor(scale * vector.vectors, source_layer=layer)
        check(divergences(theirs, model, placed, vectors[2]), most)
    theirs.control(None)
    for found, *_ in divergences(theirs, model, None, vectors[2]):
        assert found < most
    theirs.close()


@pytest.mark.parametrize("most", [MOST, MOST_QUANTISED])
def test_a_baked_file(built, model, wide, vectors, tmp_path, most):
    source = wide if most == MOST else None
    path = vectors[0].bake(model, tmp_path / "baked.gguf", source=source)
    theirs = llama_cpp.LlamaCpp(built, path)
    check(divergences(theirs, model, vectors[0], vectors[2]), most)
    theirs.close()
