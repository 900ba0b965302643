"""The radius at which a map stops being linear: closed forms, a slow scan, and real models."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_melbo as tm
from tests.tiny_models import tiny_bridge
from tl_melbo.discovery._melbo import check_settings
from tl_melbo.errors import DifferentSearch
from tl_melbo.geometry import random_sphere


class Cubic:
    """delta(theta) = theta (1 + a |theta|^2): the nonlinearity at R is a R^2, exactly."""

    def __init__(self, a: float, d_model: int = 6) -> None:
        self.a = a
        self.x = torch.ones(1, 4, d_model)
        self.mask = torch.ones(1, 4, dtype=torch.bool)

    def delta(self, theta: Tensor) -> Tensor:
        effect = theta * (1 + self.a * theta.square().sum(-1, keepdim=True))
        return effect[:, None, None, :].expand(-1, 1, 4, -1)

    def position_mask(self, positions: slice) -> Tensor:
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[:, positions] = True
        return mask

    def vectors_at_once(self, with_gradient: bool = True) -> int:
        return 3

    def story(self) -> dict[str, Any]:
        return {"source_layer": 0, "target_layer": 1}


@pytest.mark.parametrize(("a", "level"), [(1.0, 0.5), (1e-4, 0.5), (30.0, 0.1), (0.01, 2.0)])
def test_it_is_where_the_closed_form_says(a, level):
    found = tm.calibrate_radius(Cubic(a), level=level)
    assert found == pytest.approx(math.sqrt(level / a), rel=0.01)


def test_it_is_where_a_scan_of_a_real_model_says():
    # The Jacobian by differences: wide ones, since the model's norms compute in float32.
    model = tiny_bridge("llama", torch.float64)
    f = tm.ActivationMap.from_prompts(model, "One two three four five", 1, 4)
    found = tm.calibrate_radius(f, level=0.5, n_directions=5)
    units = random_sphere(5, f.d_model, generator=torch.Generator().manual_seed(0)).double()
    last = slice(-3, None)
    slope = (f.delta(units * 1e-2, last) - f.delta(units * -1e-2, last)) / 2e-2

    def nonlinearity(radius):
        deviation = f.delta(units * radius, last) / radius - slope
        ratio = deviation.flatten(1).norm(dim=-1) / slope.flatten(1).norm(dim=-1)
        return float(ratio.square().mean().sqrt())

    assert nonlinearity(found * 0.98) < 0.5 < nonlinearity(found * 1.02)


def test_hooks_count_in_the_jacobian_too():
    model = tiny_bridge("llama", seed=3)
    f = tm.ActivationMap.from_prompts(model, "One two three four five", 1, 4)
    plain = tm.calibrate_radius(f, n_directions=4)
    handle = model.blocks[3].hook_mlp_out.register_forward_hook(lambda module, args, x: 3 * x)
    try:
        hooked = tm.calibrate_radius(f, n_directions=4)
        anew = tm.ActivationMap.from_prompts(model, "One two three four five", 1, 4)
        assert hooked == tm.calibrate_radius(anew, n_directions=4) != plain
    finally:
        handle.remove()


def test_auto_is_the_calibrated_radius_and_says_so():
    f = tm.ActivationMap.from_prompts(tiny_bridge("llama"), "One two three four five", 1, 4)
    found = tm.melbo(f, 3, radius="auto", steps=2)
    radius = tm.calibrate_radius(f)
    assert found.story["hyperparameters"]["radius"] == radius
    assert found.story["calibration"] == {"criterion": "nonlinearity", "level": 0.4}
    assert torch.equal(found.vectors, tm.melbo(f, 3, radius=radius, steps=2).vectors)
    assert "calibration" not in tm.melbo(f, 3, radius=radius, steps=2).story


def test_a_run_goes_on_with_the_radius_that_it_began_with(tmp_path, monkeypatch):
    f = tm.ActivationMap.from_prompts(tiny_bridge("llama"), "One two three four five", 1, 4)
    first = tm.Run(tmp_path).melbo(f, 2, radius="auto", steps=2)
    # Elsewhere the calibration may come out a digit different.
    module = sys.modules["tl_melbo.discovery._calibration"]
    monkeypatch.setattr(module, "calibrate_radius", lambda *_, **__: 3.21)
    both = tm.Run(tmp_path).melbo(f, 4, radius="auto", steps=2)
    assert both.story["hyperparameters"]["radius"] == first.story["hyperparameters"]["radius"]
    assert torch.equal(both.vectors[:2], first.vectors)


@pytest.mark.parametrize("radius", [-1.0, 0, "12", None])
def test_a_radius_from_a_file_that_is_no_norm_is_calibrated_anew(radius):
    f = tm.ActivationMap.from_prompts(tiny_bridge("llama"), "One two three four five", 1, 4)
    found = tm.random_vectors(f, 2)
    chosen = {**found.story["hyperparameters"], "radius": radius}
    damaged = tm.SteeringVectors(
        found.vectors, {**found.story, "hyperparameters": chosen}, found.columns
    )
    with pytest.raises(DifferentSearch, match="radius"):
        tm.random_vectors(f, 2, previous=damaged)


def test_a_map_that_is_linear_has_no_such_radius():
    with pytest.raises(ValueError, match="nonlinearity of random vectors is still less"):
        tm.calibrate_radius(Cubic(0.0))


def test_a_level_that_is_always_passed_has_no_such_radius():
    with pytest.raises(ValueError, match="still more"):
        tm.calibrate_radius(Cubic(1.0), 1e-30)


@pytest.mark.parametrize(
    "settings", [{"level": 0.0}, {"level": math.nan}, {"n_directions": 0}, {"level": -1.0}]
)
def test_numbers_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        tm.calibrate_radius(Cubic(1.0), **settings)


@pytest.mark.parametrize("radius", [1e20, 1e39, 1e300, math.inf, 0])
def test_a_norm_that_float32_cannot_hold_is_refused(radius):
    for method in (tm.melbo, tm.random_vectors, tm.jacobian, tm.dct):
        with pytest.raises(ValueError, match=r"radius=.*norm"):
            method(Cubic(1.0), 2, radius=radius)


def test_another_word_than_auto_is_refused():
    with pytest.raises(TypeError, match="radius"):
        tm.melbo(Cubic(1.0), 2, radius="automatic")  # pyright: ignore[reportArgumentType]
    check_settings(2, "auto", 2, None, None, 0)
