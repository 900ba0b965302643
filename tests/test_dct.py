"""Deep causal transcoding: planted factors, closed forms, a slow reference, differences."""

import sys

import pytest
import torch

import tl_melbo as tm
from tests.reference import dct as reference
from tests.tiny_models import tiny_bridge
from tl_melbo.geometry import numbered_sphere

PROMPTS = ["Tell me about yourself.", "What is that?"]
ALL = slice(None)


class PlantedMap:
    """theta -> U diag(alpha) s(V' theta), with one prompt of one token."""

    def __init__(self, inputs, outputs, alpha, power=torch.expm1):
        self.inputs, self.outputs, self.alpha, self.power = inputs, outputs, alpha, power
        self.x = torch.ones(1, 1, inputs.shape[1], dtype=inputs.dtype)
        self.mask = torch.ones(1, 1, dtype=torch.bool)

    def delta(self, theta, positions=ALL):
        inputs, outputs = self.inputs.to(theta.dtype), self.outputs.to(theta.dtype)
        return (self.power(theta @ inputs.T) * self.alpha @ outputs)[:, None, None, :]

    def position_mask(self, positions):
        return self.mask

    def vectors_at_once(self, with_gradient=True):
        return 40

    def story(self):
        return {"model": "planted", "source_layer": 0, "target_layer": 1}


def random_units(count, d_model, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, d_model, generator=generator, dtype=dtype)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def exp_mlp(count=32, d_model=4096, seed=777):
    """Mack & Turner's benchmark without a model; with a seed that the search does not use."""
    inputs, outputs = random_units(count, d_model, seed), random_units(count, d_model, seed + 50)
    return PlantedMap(inputs, outputs, torch.ones(count))


def recovered(found, planted):
    """The mean over planted directions of the largest cosine."""
    units = found.vectors / found.norms[:, None]
    return float((planted @ units.T).abs().amax(1).mean())


def test_hard_exponential_factors_of_a_random_network_come_back():
    f = exp_mlp()
    found = tm.dct(f, 32, "exponential", "hard", radius=3.0, steps=30, positions=ALL)
    assert recovered(found, f.inputs) > 0.99
    assert float((f.outputs @ found.columns["output"].T).amax(1).mean()) > 0.99
    assert not found.vectors.isnan().any()


def test_soft_exponential_factors_come_back_at_a_moderate_radius():
    # Two starts may end at one factor, since soft vectors may be alike: now and then one is missed.
    shares = []
    for seed in (100, 101, 102, 103, 104):
        f = exp_mlp(seed=seed)
        found = tm.dct(f, 32, "exponential", "soft", radius=0.45, steps=100, positions=ALL)
        shares.append(recovered(found, f.inputs))
    assert sorted(shares)[2] > 0.99
    assert min(shares) > 0.96


def test_quadratic_factors_come_back_where_linear_ones_mix():
    f = exp_mlp()
    quadratic = tm.dct(f, 32, "quadratic", radius=1.0, steps=20, positions=ALL)
    linear = tm.dct(f, 32, "linear", radius=1.0, positions=ALL)
    assert recovered(quadratic, f.inputs) > 0.99
    # Equal weights leave the Jacobian's singular vectors free to turn.
    assert recovered(linear, f.inputs) < 0.6


def test_orthogonal_quadratic_factors_are_exact():
    inputs = torch.linalg.qr(random_units(9, 9, 1, torch.float64)).Q[:4]
    outputs = torch.linalg.qr(random_units(9, 9, 2, torch.float64)).Q[:4]
    alpha = torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    f = PlantedMap(inputs, outputs, alpha, torch.square)
    found = tm.dct(f, 4, "quadratic", radius=2.0, steps=60, positions=ALL)
    # alpha z² with z = <v, theta>, so alpha R² where z is <v, theta> / R.
    expected = (alpha * 4).float()
    torch.testing.assert_close(found.columns["importance"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.columns["effect"], expected, rtol=1e-6, atol=0)
    cosines = (found.vectors.double() / 2) @ inputs.T
    assert (cosines.abs().diagonal() > 1 - 1e-6).all()
    torch.testing.assert_close(found.columns["output"], outputs.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["exponential", "quadratic"])
def test_the_iteration_is_that_of_the_slow_reference(order):
    f = tm.ActivationMap.from_prompts(tiny_bridge("gpt2", torch.float64), PROMPTS, 1, 3)
    radius, steps = 2.0, 4
    seen = []
    found = tm.dct(
        f, 3, order, radius=radius, steps=steps, on_step=lambda step, value: seen.append(value)
    )

    def effect(theta):
        return f.delta(theta[None], slice(-3, None)).sum((0, 1, 2)) / 6

    start = numbered_sphere(3, f.d_model, 0)
    slow = getattr(reference, order)(effect, start, radius, steps)
    objectives = [objective for *_, objective in slow]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(objectives), rtol=1e-6, atol=0)
    vectors, outputs, alpha, _ = max(slow, key=lambda each: each[-1])
    by_size = alpha.argsort(descending=True)
    torch.testing.assert_close(
        found.columns["importance"].double(), alpha[by_size], rtol=1e-5, atol=0
    )
    signs = (found.vectors.double() * vectors[by_size]).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(
        found.vectors.double() * signs / radius, vectors[by_size], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        found.columns["output"].double(), outputs[by_size], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        found.history.double().sum(0), torch.tensor(objectives, dtype=torch.float64),
        rtol=1e-5, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["gpt2", "gptneox"])
def test_second_derivatives_agree_with_differences(architecture):
    f = tm.ActivationMap.from_prompts(tiny_bridge(architecture, torch.float64), PROMPTS, 1, 4)
    fit = sys.modules["tl_melbo.discovery._dct_fit"].Fit(f, slice(-3, None), 1.0)
    v, step = numbered_sphere(3, f.d_model, 5), 1e-3
    images = fit.second_order(v)
    with torch.no_grad():
        ahead, behind = fit.mean_effect(step * v), fit.mean_effect(-step * v)
    torch.testing.assert_close(
        images.effects, (ahead + behind) / (2 * step**2), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptneox"])
def test_at_a_small_radius_all_methods_find_the_first_jacobian_direction(architecture):
    f = tm.ActivationMap.from_prompts(tiny_bridge(architecture, torch.float64), PROMPTS[:1], 1, 4)
    last = slice(-1, None)  # one output: the mean effect is the effect
    radius = 1e-3 * float(f.x.norm(dim=-1)[f.mask].median())
    first = tm.jacobian(f, 1, radius, positions=last)
    climbed = tm.melbo(f, 1, radius, positions=last, steps=300)
    factor = tm.dct(f, 4, radius=radius, positions=last, steps=300)[0]
    linear = tm.dct(f, 4, "linear", radius=radius, positions=last)[0]
    for other in (climbed, factor, linear):
        assert float(tm.analysis.cosine_similarity(first, other).abs()) > 0.99


def test_the_metadata_is_enough_for_everything_else(tiny_llama, tmp_path, unchanged):
    unchanged(tiny_llama)
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    run = tm.Run(tmp_path / "run")
    found = run.keep(tm.dct, f, 5, radius=2.0, steps=3)
    assert run.keep(tm.dct, f, 5, radius=2.0, steps=3).vectors.equal(found.vectors)
    loaded = tm.SteeringVectors.load(tmp_path / "run" / "vectors.safetensors")
    assert loaded.columns["output"].shape == (5, f.d_model)
    assert {"importance", "effect"} < set(loaded.table())
    assert "output" not in loaded.table()
    assert (loaded.columns["importance"].diff() <= 0).all()
    torch.testing.assert_close(loaded.norms, torch.full((5,), 2.0))
    with pytest.raises(tm.errors.DifferentSearch, match="together"):
        run.keep(tm.dct, f, 7, radius=2.0, steps=3)
    for few in ({}, {"order": "linear", "orthogonal": "soft"}):  # linear ones are orthogonal
        with pytest.raises(ValueError, match=r"n_vectors=33: .* at most d_model=32 .* orthogonal"):
            tm.dct(f, f.d_model + 1, radius=2.0, steps=1, **few)
    assert len(tm.dct(f, f.d_model + 1, orthogonal="soft", radius=2.0, steps=1)) == f.d_model + 1


def test_hard_factors_are_orthogonal_and_a_seed_gives_them_again(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    found = tm.dct(f, 6, radius=2.0, steps=3, seed=4)
    gram = found.vectors @ found.vectors.T / 4
    torch.testing.assert_close(gram, torch.eye(6), rtol=0, atol=1e-5)
    assert tm.dct(f, 6, radius=2.0, steps=3, seed=4).vectors.equal(found.vectors)
    from_jacobian = tm.dct(f, 6, radius=2.0, steps=3, start="jacobian")
    assert not torch.allclose(from_jacobian.vectors, found.vectors)


def test_factors_ranked_by_effect_or_along_a_direction(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    found = tm.dct(f, 6, radius=2.0, steps=3)
    by_effect = tm.ranked(found, "effect")
    assert (by_effect.columns["effect"].diff() <= 0).all()
    direction = torch.ones(f.d_model)
    scores = found.columns["effect"] * (found.columns["output"] @ direction)
    assert (
        tm.ranked(found, direction).columns["index"].tolist()
        == scores.argsort(descending=True).tolist()
    )
    with pytest.raises(ValueError, match="output"):
        tm.ranked(tm.melbo(f, 2, 2.0, steps=2), direction)
