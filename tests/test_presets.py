"""The published settings, written down once more, by hand, from the original code's numbers."""

import pytest

import tl_melbo as tm
from tests.tiny_models import tiny_bridge

# radius, p, q, positions, vectors, steps
PUBLISHED = {
    "chain-of-thought": (1.0, 4, 4, slice(None), 32, 300),
    "refusal": (4.0, 2, 1, slice(None), 32, 600),
    "backdoor": (4.0, 2, 1, slice(-3, None), 100, 1200),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name):
    preset = tm.PRESETS[name]
    names = ("radius", "p", "q", "positions", "n_vectors", "steps")
    assert tuple(preset.search[setting] for setting in names) == PUBLISHED[name]
    assert preset.search["orthogonal"] is True
    assert preset.search["optimiser"] == "adamw"
    # 24 blocks: the residual stream after the 8th, and Hugging Face's hidden state 16, which is
    # what comes out of block 15.
    assert preset.layers(24) == {"source_layer": 7, "target_layer": 15}


def test_the_embedded_preset_is_the_default():
    preset = tm.PRESETS["embedded"]
    assert preset.layers(30) == {"source_layer": 8, "target_layer": 16}
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, "Hi there!", 1, 4)
    found = tm.melbo(f, 1, 12.0)  # by default calibrated
    chosen = dict(found.story["hyperparameters"], positions=slice(-3, None))
    assert {**preset.search, "norm": "l2", "n_vectors": 1} == chosen


@pytest.mark.parametrize("name", tm.PRESETS)
def test_a_preset_is_arguments(name):
    preset = tm.PRESETS[name]
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, "Hi there!", 1, 4)
    for search in (preset.search, preset.fast):
        few = {**search, "n_vectors": 1, "positions": slice(1, None)}
        if "steps" in few:
            few["steps"] = 2
        found = tm.melbo(f, **few)
        assert float(found.norms[0]) == pytest.approx(search["radius"], rel=1e-5)
    assert "steps" not in preset.fast
    with pytest.raises(TypeError):
        preset.search["radius"] = 1


def test_a_shallow_model_is_told():
    with pytest.raises(ValueError, match=r"n_layers=16: .* takes 17 layers or more; choose"):
        tm.PRESETS["refusal"].layers(16)


def test_a_preset_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(KeyError, match=r"'bundle': did you mean 'bundled'\? known are chain-of"):
        tm.PRESETS["bundle"]
    assert tm.PRESETS.get("bundle") is None
    assert "bundle" not in tm.PRESETS
