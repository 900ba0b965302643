"""Vectors of several blocks: as hooks one by one, in their file, and in other programs."""

import numpy as np
import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import D_MODEL, N_LAYERS, tiny_bridge
from tl_melbo.errors import Damaged

PROMPT = "Tell me about yourself."
LAYERS = (1, 4)


@pytest.fixture(scope="module")
def model():
    return tiny_bridge("llama")


@pytest.fixture(scope="module")
def layered():
    vectors = torch.randn(3, 2, D_MODEL, generator=torch.Generator().manual_seed(0))
    return tm.LayeredVectors.from_tensor(vectors, LAYERS, model="tiny-llama")


def test_adds_each_vector_after_its_block(tiny, unchanged, layered):
    unchanged(tiny)
    tokens = tiny.to_tokens(PROMPT)
    with (
        tm.steered(tiny, layered.vectors[1, 0], layer=1, scale=-2),
        tm.steered(tiny, layered.vectors[1, 1], layer=4, scale=-2),
        torch.no_grad(),
    ):
        expected = tiny(tokens)
    with tm.steered(tiny, layered[1], scale=-2), torch.no_grad():
        torch.testing.assert_close(tiny(tokens), expected)
    with tm.steered(tiny, -2 * layered), torch.no_grad():
        torch.testing.assert_close(tiny(tokens.expand(3, -1))[[1]], expected, rtol=1e-4, atol=1e-4)
    log_probs = tm.next_token_log_probs(tiny, PROMPT, layered, scale=-2)
    expected = expected[:, -1].log_softmax(-1)
    torch.testing.assert_close(log_probs[[1]], expected, rtol=1e-4, atol=1e-4)


def test_of_one_block_they_are_the_vectors_of_a_library(model, layered):
    one = tm.LayeredVectors.from_tensor(layered.vectors[:, :1], [1])
    library = tm.SteeringVectors.from_tensor(layered.vectors[:, 0], source_layer=1)
    options = {"scales": [1, 0], "max_new_tokens": 6}
    ours = tm.generate(model, PROMPT, one, **options)
    assert ours.equals(tm.generate(model, PROMPT, library, **options))
    assert torch.equal(
        tm.next_token_log_probs(model, PROMPT, one), tm.next_token_log_probs(model, PROMPT, library)
    )
    plain = tm.next_token_log_probs(model, PROMPT)
    assert torch.equal(tm.next_token_log_probs(model, PROMPT, layered, scale=0.0)[[2]], plain)


def test_positions_hold_after_every_block(model, layered):
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad():
        plain = model(tokens)
    with tm.steered(model, layered[0], positions=slice(2, None)), torch.no_grad():
        steered = model(tokens)
    assert torch.equal(steered[:, :2], plain[:, :2])
    assert not torch.allclose(steered[:, 2], plain[:, 2], atol=1e-2)


def test_they_are_scaled_as_a_library_is(layered):
    assert torch.equal((layered / 2).vectors, layered.vectors / 2)
    assert torch.equal((-layered).at(4).vectors, -layered.at(4).vectors)
    assert (3 * layered).table()["scale"].tolist() == [3.0] * 6


def test_saved_loaded_and_taken_apart(layered, tmp_path):
    path = tmp_path / "l.safetensors"
    layered.save(path)
    read = tm.LayeredVectors.load(path)
    assert torch.equal(read.vectors, layered.vectors)
    assert read.layers == LAYERS
    assert dict(read.story) == dict(layered.story)
    at = read[[2, 0]].at(4)
    assert (at.source_layer, at.columns["index"].tolist()) == (4, [2, 0])
    assert torch.equal(at.vectors, layered.vectors[[2, 0], 1])
    assert read.table()["norm"].to_numpy() == pytest.approx(layered.norms.flatten().numpy())
    assert read.table()["layer"].tolist() == [1, 4] * 3
    with pytest.raises(ValueError, match=r"layer=2: there are vectors of the blocks \[1, 4\]"):
        read.at(2)
    with pytest.raises(TypeError, match="argument 'layer' is a tensor"):
        read.at(torch.zeros(0))
    with pytest.raises(Damaged, match=r"LayeredVectors\.load, not with Adapter\.load"):
        tm.Adapter.load(path)


def test_exports_hold_a_vector_for_each_block(model, layered, tmp_path):
    from gguf import GGUFReader

    from tl_melbo.model.bridge import without_bridge

    path = tmp_path / "l.gguf"
    layered[1].to_repeng_gguf(path, model_type="llama")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    assert {*tensors} == {"direction.1", "direction.4"}
    assert np.array_equal(tensors["direction.4"], layered.vectors[1, 1].numpy())
    hugging_face = without_bridge(model.original_model)
    tokens = model.to_tokens(PROMPT)
    with tm.steered(model, layered[1]), torch.no_grad():
        ours = model(tokens)
    with layered[1].to_steering_vectors().apply(hugging_face), torch.no_grad():
        torch.testing.assert_close(hugging_face(tokens).logits, ours, rtol=1e-4, atol=1e-4)
    below = tm.LayeredVectors.from_tensor(layered.vectors, (0, 1))
    with pytest.raises(ValueError, match="block 0"):
        below[0].to_repeng_gguf(path, model_type="llama")
    below[0].to_repeng_gguf(path, layers=[1], model_type="llama")
    assert [tensor.name for tensor in GGUFReader(path).tensors] == ["direction.1"]
    with pytest.raises(ValueError, match="expected exactly one"):
        layered.to_repeng_gguf(path, model_type="llama")
    for call in (layered[0].to_repeng_gguf, layered[0].to_steering_vectors):
        with pytest.raises(ValueError, match="layers: none given"):
            call(**({"path": path} if call.__name__ == "to_repeng_gguf" else {}), layers=[])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1,), "layers: 1 given"),
        ((1, 1), "each once"),
        ((-1, 2), "numbers of blocks"),
        ((), "layers"),
    ],
)
def test_bad_layers_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        tm.LayeredVectors.from_tensor(torch.ones(1, 2, 4), layers)


def test_vectors_that_do_not_fit_the_model_are_named(model, layered):
    with pytest.raises(ValueError, match=f"layer={N_LAYERS}"):
        tm.generate(model, PROMPT, tm.LayeredVectors.from_tensor(layered.vectors, (0, N_LAYERS)))
    with pytest.raises(ValueError, match="4 wide"):
        tm.generate(model, PROMPT, tm.LayeredVectors.from_tensor(torch.ones(1, 2, 4), (0, 1)))
    with pytest.raises(ValueError, match="knows its layers"):
        tm.next_token_log_probs(model, PROMPT, layered, layer=1)
    with pytest.raises(ValueError, match="hold values that are not finite"):
        tm.LayeredVectors.from_tensor(torch.full((1, 2, 4), torch.nan), (0, 1))
    with pytest.raises(ValueError, match="scale=inf"):
        layered * float("inf")
