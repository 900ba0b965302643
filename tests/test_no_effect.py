"""No vector, no effect: exactly zero on every path, and a bound on what rounding alone can do."""

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_melbo as tm
from tests.test_activation_map import HonestFloat64
from tests.tiny_models import tiny_bridge

pytestmark = pytest.mark.everywhere
PROMPTS = ["Tell me about yourself.", "Hi!", "Bye.", "Write a short poem about ships."]
POSITIONS = (slice(None), slice(-3, None), slice(0, 1), slice(0, -1, 2))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KEYS = sorted(itertools.product(("llama", "gpt2"), DTYPES), key=str)


@cache
def made(key):
    architecture, dtype = key
    with HonestFloat64():
        return tm.ActivationMap.from_prompts(tiny_bridge(architecture, dtype), PROMPTS, 1, 4)


def through(f, path):
    """The same map by another way, where it has that."""
    shortcut = f._shortcut
    if path == "hooked":
        return dataclasses.replace(f, _shortcut=None)
    if path == "differentiable":
        return dataclasses.replace(f, _shortcut=shortcut._replace(way=shortcut.differentiable))
    return f


def vectors_for(f, is_there, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(len(is_there), f.d_model, generator=generator)
    theta = theta * torch.tensor(is_there)[:, None]
    return theta.to(torch.promote_types(f.x.dtype, torch.float32))


def test_the_paths_are_the_ones_that_are_meant():
    paths = {key: made(key).path for key in KEYS}
    assert paths["llama", torch.float32] == paths["llama", torch.float64] == "fast"
    assert paths["llama", torch.bfloat16] == paths["gpt2", torch.float32] == "unhooked"
    assert through(made(("llama", torch.float32)), "hooked").path == "hooked"


@pytest.mark.parametrize("path", ["own", "hooked", "differentiable"])
@settings(max_examples=15)
@given(
    st.sampled_from(KEYS),
    st.lists(st.booleans(), min_size=1, max_size=9),
    st.sampled_from(POSITIONS),
    st.sampled_from([None, 1, 2, 5]),
    st.booleans(),
)
def test_rows_of_zeros_have_none_and_the_others_their_own(
    path, key, is_there, positions, batch_size, wants_gradient
):
    f = dataclasses.replace(through(made(key), path), batch_size=batch_size)
    theta = vectors_for(f, is_there).requires_grad_(wants_gradient)
    there = torch.tensor(is_there)
    with HonestFloat64():
        effect = f.delta(theta, positions).detach()
        alone = f.delta(theta.detach()[there], positions)
    assert (effect[~there] == 0).all()
    assert (effect[there].flatten(1).norm(dim=-1) > f.resolution(positions)).all()
    if there.any():
        assert (effect[there] - alone).norm() <= 2 * len(alone) * f.resolution(positions)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_vector_that_the_type_cannot_see_has_none(key):
    f = made(key)
    # 0 + 1e-30 is another number.
    tiny = 1e-30 * (f.x[f.mask] != 0).all(0)[None]
    tiny = tiny.to(torch.promote_types(f.x.dtype, torch.float32))
    assert tiny.any()
    assert torch.equal((f.x + tiny.to(f.x.dtype))[f.mask], f.x[f.mask])
    assert (f.delta(tiny) == 0).all()
    assert (f.delta(torch.cat([tiny, torch.ones_like(tiny)]))[0] == 0).all()


@pytest.mark.parametrize("path", ["own", "hooked", "differentiable"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_gradient_at_zero_is_that_of_the_float64_model(architecture, path):
    """The value is made zero; what MELBO-ortho needs, its gradient, is not."""
    weights = torch.randn(3, *made(("llama", torch.float64)).x.shape).double()
    gradients = []
    for f in (
        through(made((architecture, torch.float32)), path),
        through(made((architecture, torch.float64)), "hooked"),
    ):
        theta = vectors_for(f, [False, True, False]).requires_grad_()
        with HonestFloat64():
            loss = (f.delta(theta).double() * weights).sum()
            gradients.append(torch.autograd.grad(loss, theta)[0].double())
    assert gradients[0][0].norm() > 0
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tangents_and_second_gradients_at_zero_stay(architecture):
    f = made((architecture, torch.float64))
    theta = torch.zeros(1, f.d_model, dtype=torch.float64)
    heading = vectors_for(f, [True])
    step, leaf = 1e-4, theta.clone().requires_grad_()
    with HonestFloat64():
        value, slope = torch.func.jvp(f.delta, (theta,), (heading,))
        difference = (f.delta(step * heading) - f.delta(-step * heading)) / (2 * step)
        (gradient,) = torch.autograd.grad(f.delta(leaf).square().sum(), leaf, create_graph=True)
        (curved,) = torch.autograd.grad((gradient * heading).sum(), leaf)
    assert (value == 0).all()
    assert (slope - difference).norm() < 1e-4 * difference.norm()
    # At zero |f|^2 has the Hessian 2 J^T J.
    assert float((curved * heading).sum()) == pytest.approx(2 * float(slope.square().sum()), 1e-4)


@pytest.mark.parametrize("positions", POSITIONS[:2], ids=str)
@pytest.mark.parametrize("path", ["own", "hooked", "differentiable"])
def test_rounding_is_smaller_than_the_resolution(monkeypatch, path, positions):
    monkeypatch.setattr(tm.ActivationMap, "_unchanged", lambda *_: torch.tensor(False))
    for key in KEYS:
        f = through(made(key), path)
        wide = torch.promote_types(f.x.dtype, torch.float32)
        for n_vectors in (1, 3, 16):
            with HonestFloat64():
                rounding = f.delta(torch.zeros(n_vectors, f.d_model, dtype=wide), positions)
            largest = float(rounding.double().flatten(1).norm(dim=-1).max())
            assert largest <= f.resolution(positions) / 2, key
        assert f.resolution(positions) < 0.2 * float(f.y[f.position_mask(positions)].norm())


def test_the_resolution_checks_its_positions():
    f = made(("llama", torch.float32))
    assert f.resolution(slice(-1, None)) < f.resolution()
    with pytest.raises(ValueError, match=r"picks no token of prompt 1 \('Hi!'"):
        f.resolution(slice(5, None))
