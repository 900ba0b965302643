"""Vectors at other lengths, against what scaling them by hand gives."""

import pytest
import torch

import tl_melbo as tm
from tl_melbo.analysis import kl_divergence, repetition, rescale, scale_sweep

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def found():
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 32, generator=generator)
    story = {"method": "melbo", "source_layer": 1, "chat": True}
    return tm.SteeringVectors(theta, story, {"objective": torch.ones(3)}, torch.ones(3, 2))


def test_rescale_keeps_directions(found):
    rescaled = rescale(found[1:], 7)
    torch.testing.assert_close(rescaled.norms, torch.full((2,), 7.0))
    cosines = torch.nn.functional.cosine_similarity(rescaled.vectors, found.vectors[1:])
    torch.testing.assert_close(cosines, torch.ones(2))
    assert rescaled.columns["index"].tolist() == [1, 2]
    torch.testing.assert_close(rescaled.columns["scale"], 7 / found.norms[1:])
    assert rescaled.objective is None
    assert rescaled.history is None
    assert rescaled.source_layer == 1


def test_rescale_to_a_reference_and_back(found):
    at_reference = rescale(found, found[2])
    torch.testing.assert_close(at_reference.norms, found.norms[2].expand(3))
    again = rescale(rescale(found[0], 100.0), found[0])
    torch.testing.assert_close(again.vectors, found.vectors[:1])
    torch.testing.assert_close(again.columns["scale"], torch.ones(1))


@pytest.mark.parametrize("norm", [0.0, -1.0, float("inf"), float("nan"), torch.zeros(32)])
def test_rescale_refuses_a_norm_that_is_none(found, norm):
    with pytest.raises(ValueError, match="norm"):
        rescale(found, norm)


def test_rescale_refuses_what_has_no_length_or_too_many(found):
    with pytest.raises(ValueError, match="norm: 3 vectors, expected exactly one"):
        rescale(found, found)
    with pytest.raises(ValueError, match=r"vectors \[1\] are zero"):
        rescale(torch.stack([torch.ones(32), torch.zeros(32)]), 1.0)
    with pytest.raises(ValueError, match="without vectors"):
        rescale(found[:0], 1.0)


def test_repetition_counts_three_in_a_row():
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2]) == repetition([]) == 0
    # 123 231 312 123 231 312: half of the six have been there.
    assert repetition([1, 2, 3, 1, 2, 3, 1, 2]) == 0.5
    assert repetition([7] * 102) == pytest.approx(0.99)
    assert repetition([1, 1], n=1) == 0.5
    with pytest.raises(ValueError, match="n=0"):
        repetition([1], n=0)


def test_sweep_is_what_scaling_by_hand_gives(tiny_llama, found, unchanged):
    unchanged(tiny_llama)
    scales = [-1.5, 0, 1.0]
    frame = scale_sweep(tiny_llama, PROMPT, found[:2], scales, max_new_tokens=8)
    assert frame.columns.tolist() == [
        "vector", "scale", "norm", "kl", "entropy", "repetition", "completion",
    ]  # fmt: skip
    assert frame["vector"].tolist() == [0, 0, 0, 1, 1, 1]
    assert frame["scale"].tolist() == scales * 2
    for row in frame.itertuples():
        scaled = found[row.vector] * row.scale
        assert row.norm == pytest.approx(float(scaled.norms), rel=1e-5)
        kl = kl_divergence(tiny_llama, PROMPT, scaled)
        assert row.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        log_probs = tm.next_token_log_probs(tiny_llama, PROMPT, scaled, chat=True)
        entropy = torch.distributions.Categorical(logits=log_probs).entropy()
        assert row.entropy == pytest.approx(float(entropy), rel=1e-4)
        text = tm.generate(tiny_llama, PROMPT, scaled, max_new_tokens=8)["completion"][0]
        assert row.completion == text
        assert 0 <= row.repetition < 1


def test_a_tensor_at_a_layer(tiny_llama, found):
    frame = scale_sweep(tiny_llama, PROMPT, found.vectors[0], [1], max_new_tokens=1, layer=2)
    kl = kl_divergence(tiny_llama, PROMPT, found.vectors[0], layer=2)
    assert frame["kl"].tolist() == pytest.approx(kl.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": []}, r"scales=\[\]: one finite number"),
        ({"scales": [1.0, float("inf")]}, r"scales=\[1.0, inf\]: one finite number"),
        ({"vectors": torch.empty(0, 32)}, "without vectors"),
        ({"vectors": torch.ones(31)}, "31 wide"),
        ({"layer": 6}, "layer=6"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompt": " "}, "at least one visible character"),
    ],
)
def test_bad_arguments(tiny_llama, found, change, message):
    with pytest.raises(ValueError, match=message):
        scale_sweep(tiny_llama, **{"prompt": PROMPT, "vectors": found, **change})
