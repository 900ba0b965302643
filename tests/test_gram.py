"""J'J of a map: against the whole model's derivatives in float64, and against products with J."""

import pytest
import torch

import tl_melbo as tm
from tests.conftest import PROMPT
from tests.reference import atlas as reference
from tests.test_activation_map import HonestFloat64
from tests.tiny_models import tiny_bridge
from tl_melbo.discovery import _map

PROMPTS = [PROMPT, "What is that?", "Tell me about yourself, and of what it is."]
LAST_TWO, ALL = slice(-2, None), slice(None)


def by_products(f, positions, mean):
    """J'J by forward-mode differentiation of `delta`, which fires the user's hooks."""

    def effect(theta):
        found = f.delta(theta, positions)
        return found.sum(2) / f.position_mask(positions).sum(-1, keepdim=True) if mean else found

    with _map.own_arithmetic(f):
        images = _map.jacobian_times(f, effect, torch.eye(f.d_model)).double()
    return images @ images.T


@pytest.mark.parametrize("positions", [LAST_TWO, ALL])
@pytest.mark.parametrize("mean", [False, True])
def test_it_is_what_products_with_j_give(tiny, positions, mean):
    f = tm.ActivationMap.from_prompts(tiny, PROMPTS, 1, 4)
    shares = []
    found = f.gram(positions, mean=mean, on_share=shares.append)
    expected = by_products(f, positions, mean)
    assert found.dtype == torch.float64
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_the_square_of_the_whole_models_jacobian(architecture, unchanged):
    model = tiny_bridge(architecture, torch.float64)
    unchanged(model)
    with HonestFloat64():
        f = tm.ActivationMap.from_prompts(model, PROMPTS[:2], 1, 4)
        found = f.gram(LAST_TWO)
        J = reference.jacobian(model, PROMPTS[:2], 1, 4, LAST_TWO)
    torch.testing.assert_close(found, J.T @ J, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_user_count(architecture, when):
    model = tiny_bridge(architecture)
    plain = tm.ActivationMap.from_prompts(model, PROMPTS[:2], 1, 4)
    without = plain.gram(LAST_TWO)
    point = model.hook_dict["blocks.3.hook_resid_post"]
    handle = point.register_forward_hook(lambda module, args, output: output * 2)
    f = tm.ActivationMap.from_prompts(model, PROMPTS[:2], 1, 4) if when == "before" else plain
    assert f.path == "hooked"
    found, expected = f.gram(LAST_TWO), by_products(f, LAST_TWO, False)
    handle.remove()
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert float((found - without).norm() / without.norm()) > 1e-2


def test_it_is_summed_some_columns_at_a_time(tiny_llama, monkeypatch):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4, batch_size=2)
    whole = f.gram(ALL)
    widths = []
    double = torch.Tensor.double

    def watched(tensor):
        widths.append(tensor.shape[-1])
        return double(tensor)

    monkeypatch.setattr("tl_melbo.memory._GRAM_COLUMNS", 7)
    monkeypatch.setattr(torch.Tensor, "double", watched)
    torch.testing.assert_close(f.gram(ALL), whole, rtol=1e-12, atol=1e-12)
    assert max(widths) == 7


def test_melbo_ortho_takes_it_where_the_map_has_it(tiny_llama, monkeypatch):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS[:2], 1, 4)
    theta0 = tm.melbo(f, 1, 2.0, steps=3)
    before = tm.melbo_ortho(WithoutGram(f), theta0, 1, steps=10)

    def refused(*_args):
        raise AssertionError("products with J, though the map has a faster way")

    monkeypatch.setattr(_map, "jacobian_times", refused)
    after = tm.melbo_ortho(f, theta0, 1, steps=10)
    torch.testing.assert_close(after.vectors, before.vectors, rtol=1e-3, atol=1e-3)


class WithoutGram:
    """The same map with nothing but what a method may count on."""

    def __init__(self, f):
        self.x, self.mask, self.delta, self.story = f.x, f.mask, f.delta, f.story
        self.position_mask, self.vectors_at_once = f.position_mask, f.vectors_at_once
