"""Vectors on other prompts, prompt by prompt against generation and divergence."""

import pytest
import torch

import tl_melbo as tm
from tl_melbo.analysis import kl_divergence, transfer

PROMPTS = ["Once upon a time", "def f(x):", "The"]


@pytest.fixture(scope="module")
def found():
    generator = torch.Generator().manual_seed(0)
    theta = 2 * torch.randn(2, 32, generator=generator)
    return tm.SteeringVectors(theta, {"method": "melbo", "source_layer": 1, "chat": True})


def test_each_prompt_is_what_it_is_alone(tiny_llama, found, unchanged):
    unchanged(tiny_llama)
    frame = transfer(tiny_llama, found, PROMPTS, max_new_tokens=4)
    assert frame.columns.tolist() == [
        "prompt", "vector", "kl", "completion", "unsteered_completion",
    ]  # fmt: skip
    assert frame["prompt"].tolist() == [p for p in PROMPTS for _ in range(2)]
    assert frame["vector"].tolist() == [0, 1] * 3
    for prompt, rows in frame.groupby("prompt"):
        kl = kl_divergence(tiny_llama, prompt, found, chat=True)
        assert rows["kl"].tolist() == pytest.approx(kl.tolist(), rel=1e-4)
        steered = tm.generate(tiny_llama, prompt, found, max_new_tokens=4, chat=True)
        assert rows["completion"].tolist() == steered["completion"].tolist()
        plain = tm.generate(tiny_llama, prompt, max_new_tokens=4, chat=True)["completion"][0]
        assert rows["unsteered_completion"].tolist() == [plain] * 2


def test_a_tensor_one_prompt_and_no_chat(tiny_llama, found):
    frame = transfer(tiny_llama, found.vectors[1], PROMPTS[0], layer=2, max_new_tokens=3)
    kl = kl_divergence(tiny_llama, PROMPTS[0], found.vectors[1], layer=2)
    assert frame["kl"].tolist() == pytest.approx(kl.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: none given"),
        ({"prompts": ["The", "\n"]}, r"prompts\[1\]='\\n': a text needs"),
        ({"vectors": torch.empty(0, 32)}, "without vectors"),
        ({"vectors": torch.ones(32)}, "layer: not given"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_arguments(tiny_llama, found, change, message):
    with pytest.raises(ValueError, match=message):
        transfer(tiny_llama, **{"vectors": found, "prompts": PROMPTS, **change})
