"""Deep causal transcoding: planted factors, closed forms, a slow reference, differences."""

import itertools
import math
import sys

import pytest
import torch

import tl_melbo as tm
from tests.reference import dct as reference
from tests.test_activation_map import HonestFloat64
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
    """The mean over planted directions of the largest cosine; exp(z) - 1 has a sign, z² none."""
    cosines = planted @ (found.vectors / found.norms[:, None]).T
    is_signed = found.story["hyperparameters"]["order"] == "exponential"
    return float((cosines if is_signed else cosines.abs()).amax(1).mean())


MAPS = [777, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(200, 210))]


@pytest.mark.parametrize("seed", MAPS)
@pytest.mark.parametrize("orthogonal", ["hard", "soft"])
def test_exponential_factors_of_a_random_network_come_back(orthogonal, seed):
    f = exp_mlp(seed=seed)
    found = tm.dct(f, 32, "exponential", orthogonal, radius=3.0, steps=30, positions=ALL)
    assert recovered(found, f.inputs) > 0.99
    assert float((f.outputs @ found.columns["output"].T).amax(1).mean()) > 0.99


@pytest.mark.slow
def test_soft_factors_come_back_where_they_are_alike():
    # 16 pairs, whose cosine is 0.5: orthonormal vectors cannot be all of them.
    axes = torch.linalg.qr(random_units(512, 512, 100, torch.float64)).Q
    inputs = torch.cat([axes[:16], axes[:16] / 2 + axes[16:32] * math.sqrt(0.75)]).float()
    f = PlantedMap(inputs, random_units(32, 512, 150), torch.ones(32))
    hard, soft = (
        tm.dct(f, 32, orthogonal=kind, radius=3.0, positions=ALL) for kind in ("hard", "soft")
    )
    assert recovered(hard, inputs) < 0.97
    assert recovered(soft, inputs) > 0.99


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


def test_linear_factors_are_the_singular_ones_of_the_mean_effect():
    inputs = torch.linalg.qr(random_units(9, 9, 1, torch.float64)).Q[:4]
    outputs = torch.linalg.qr(random_units(9, 9, 2, torch.float64)).Q[:4]
    alpha = torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    # To first order z; the effect at R v is more.
    f = PlantedMap(inputs, outputs, alpha, lambda z: z + z**3)
    seen = []
    found = tm.dct(
        f, 3, "linear", radius=2.0, positions=ALL, on_step=lambda *step: seen.append(step)
    )
    expected = alpha[:3].float() * 2
    torch.testing.assert_close(found.columns["importance"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.columns["effect"], expected * 5, rtol=1e-6, atol=0)
    signs = (found.vectors.double() * inputs[:3]).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(found.vectors * signs.float(), 2 * inputs[:3].float())
    torch.testing.assert_close(found.columns["output"] * signs.float(), outputs[:3].float())
    assert seen == [(1, pytest.approx(float(expected.square().sum() / 2)))]


@pytest.mark.parametrize(
    "order",
    [
        "exponential",
        *(pytest.param(order, marks=pytest.mark.slow) for order in ("quadratic", "soft")),
    ],
)
def test_the_iteration_is_that_of_the_slow_reference(order):
    f = tm.ActivationMap.from_prompts(tiny_bridge("gpt2", torch.float64), PROMPTS, 1, 3)
    radius, steps = 2.0, 3
    seen = []
    chosen = {"order": "exponential", "orthogonal": "soft"} if order == "soft" else {"order": order}
    found = tm.dct(
        f, 3, radius=radius, steps=steps, on_step=lambda _, value: seen.append(value), **chosen
    )

    def effect(theta):
        return f.delta(theta[None], slice(-3, None)).sum((0, 1, 2)) / 6

    start = numbered_sphere(3, f.d_model, 0)
    slow = getattr(reference, order)(effect, start, radius, steps)
    objectives = [objective for *_, objective in slow]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(objectives), rtol=1e-6, atol=0)
    # The last near the highest; of soft ones the step without the push.
    near = [i for i, value in enumerate(objectives) if value >= 0.999 * max(objectives)]
    vectors, outputs, alpha, _ = slow[-1 if order == "soft" else near[-1]]
    falls = [after < before for before, after in itertools.pairwise(objectives)]
    assert found.story["falls"] == sum(falls)
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


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptneox"])
def test_second_derivatives_agree_with_differences(architecture):
    with HonestFloat64():
        f = tm.ActivationMap.from_prompts(tiny_bridge(architecture, torch.float64), PROMPTS, 1, 4)
    fit = sys.modules["tl_melbo.discovery._dct_fit"].Fit(f, slice(-3, None), 1.0)
    v, step = numbered_sphere(3, f.d_model, 5), 1e-3

    def mean_effect_and_pull(theta, outputs):
        theta = theta.clone().requires_grad_()
        effects = fit.mean_effect(theta)
        return effects.detach(), torch.autograd.grad((effects * outputs).sum(), theta)[0]

    with HonestFloat64():
        effects, gradients = fit.second_order(v)
        outputs = effects / effects.norm(dim=-1, keepdim=True)
        ahead, pull_ahead = mean_effect_and_pull(step * v, outputs)
        behind, pull_behind = mean_effect_and_pull(-step * v, outputs)
    torch.testing.assert_close(effects, (ahead + behind) / (2 * step**2), rtol=1e-4, atol=1e-7)
    # T2(u, v, .) is how the gradient of <u, effect> changes along v.
    torch.testing.assert_close(
        gradients, (pull_ahead - pull_behind) / (2 * step), rtol=1e-4, atol=1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gpt2", "gptneox"))],
)
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
    with pytest.raises(tm.errors.DifferentSearch, match="5 were found together, and 3 are wanted"):
        run.keep(tm.dct, f, 3, radius=2.0, steps=3)
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


@pytest.mark.parametrize("order", ["linear", "quadratic", "exponential"])
def test_factors_ranked_by_effect_or_along_a_direction(tiny_llama, order):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    found = tm.dct(f, 6, order, radius=2.0, steps=3)
    by_effect = tm.ranked(found, "effect")
    assert (by_effect.columns["effect"].diff() <= 0).all()
    direction = random_units(1, f.d_model, 3)[0]
    with torch.no_grad():
        effects = f.delta(found.vectors, slice(-3, None)).sum((1, 2)) / 6
    torch.testing.assert_close(found.columns["mean_effect"], effects, rtol=1e-4, atol=1e-5)
    along = (effects @ direction).argsort(descending=True)
    assert tm.ranked(found, direction).columns["index"].tolist() == along.tolist()
    with pytest.raises(ValueError, match="mean_effect"):
        tm.ranked(tm.random_vectors(f, 2, 2.0), direction)
    for none in (0 * direction, direction / 0):
        with pytest.raises(ValueError, match=r"by: .* zero or not finite"):
            tm.ranked(found, none)


@pytest.mark.parametrize("order", ["linear", "quadratic", "exponential"])
@pytest.mark.parametrize("start", ["random", "jacobian"])
def test_a_map_without_effect_has_no_factors(order, start):
    f = PlantedMap(random_units(3, 8, 1), random_units(3, 8, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"radius: .*every vector of this norm changes nothing"):
        tm.dct(f, 3, order, radius=1.0, positions=ALL, start=start)


def test_a_radius_that_the_type_cannot_see_is_refused(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    for order in ("linear", "quadratic", "exponential"):
        with pytest.raises(ValueError, match=r"radius: .*changes nothing"):
            tm.dct(f, 3, order, radius=1e-9)


def test_an_affine_map_has_no_quadratic_factors():
    f = PlantedMap(random_units(3, 8, 1), random_units(3, 8, 2), torch.ones(3), lambda z: z)
    with pytest.raises(ValueError, match="no second derivative"):
        tm.dct(f, 3, "quadratic", radius=1.0, positions=ALL)


def with_objectives(monkeypatch, objectives):
    """Steps whose factors have the number of the step as their importance."""
    module, made = sys.modules["tl_melbo.discovery._dct_fit"], iter(enumerate(objectives))

    def fitted(self, order, vectors):
        step, objective = next(made)
        alpha = torch.full((len(vectors),), float(step))
        part = torch.full_like(alpha, objective / len(vectors)).double()
        return module.Factors(vectors, vectors, alpha, vectors), part, vectors

    monkeypatch.setattr(module.Fit, "fitted", fitted)
    f = PlantedMap(random_units(3, 8, 1), random_units(3, 8, 2), torch.ones(3))

    def find(orthogonal="hard", steps=6):
        return tm.dct(f, 2, orthogonal=orthogonal, radius=1.0, positions=ALL, steps=steps)

    return find


@pytest.mark.parametrize(
    ("orthogonal", "objectives", "taken", "falls"),
    [
        ("hard", [1, 2, 9, 9.5, 6, 5], 3, 2),
        ("hard", [1, 2, 9, 9.5, 6, 9.499], 5, 1),
        ("hard", [1, 2, 9, 9.5, 6, 11], 5, 1),
        ("soft", [1, 2, 9, 9.5, 6, 7, 9.2], 6, 1),
    ],
)
def test_which_step_is_taken(monkeypatch, orthogonal, objectives, taken, falls):
    found = with_objectives(monkeypatch, objectives)(orthogonal)
    assert found.columns["importance"].tolist() == [taken, taken]
    assert found.story["falls"] == falls
    assert found.history.sum(0).tolist() == pytest.approx(objectives)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_ends_the_search_with_the_best_before(monkeypatch, bad):
    find = with_objectives(monkeypatch, [1, 3, 2, bad])
    with pytest.warns(UserWarning, match=r"step 4 of 6: .* not finite"):
        found = find()
    assert found.columns["importance"].tolist() == [1, 1]
    assert found.history.shape == (2, 3)
    find = with_objectives(monkeypatch, [1, 3, 2, bad])
    with pytest.warns(UserWarning, match=r"the last step: .* not finite"):
        found = find("soft", 3)
    assert found.columns["importance"].tolist() == [2, 2]  # the only one of the last third


def test_a_map_that_is_never_finite_is_told_of():
    f = PlantedMap(random_units(3, 8, 1), random_units(3, 8, 2), torch.ones(3), lambda z: z / 0)
    with pytest.raises(tm.errors.NotFinite):
        tm.dct(f, 3, radius=1.0, positions=ALL)


def test_effects_whose_squares_overflow_have_a_gradient():
    f = PlantedMap(random_units(3, 8, 1), random_units(3, 8, 2), torch.full((3,), 1e20))
    found = tm.dct(f, 2, orthogonal="soft", radius=1.0, positions=ALL, steps=2)
    assert found.norms.tolist() == pytest.approx([1.0, 1.0])


def test_of_nearly_dependent_vectors_none_is_lost():
    module = sys.modules["tl_melbo.discovery._dct_fit"]
    same = torch.eye(4, dtype=torch.float64)[[0, 0, 1]]
    spread = module._in_turn(same, torch.ones(3))
    torch.testing.assert_close(spread @ spread.T, torch.eye(3, dtype=torch.float64))


def test_the_batch_that_fits_is_remembered():
    f, sizes = exp_mlp(6, 12), []
    delta = f.delta

    def small(theta, positions=ALL):
        sizes.append(len(theta))
        if len(theta) > 3:
            raise MemoryError
        return delta(theta, positions)

    f.delta, f.vectors_at_once = small, lambda with_gradient=True: 6 if with_gradient else 3
    tm.dct(f, 6, radius=3.0, steps=4, positions=ALL)
    assert sizes == [6] + [3] * 8


def test_what_does_nothing_tells_no_searches_apart(tiny_llama, tmp_path):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    run = tm.Run(tmp_path / "run")
    found = run.keep(tm.dct, f, 3, order="linear", radius=2.0)
    other = {"seed": 4, "steps": 7, "start": "jacobian", "orthogonal": "soft"}
    assert run.keep(tm.dct, f, 3, order="linear", radius=2.0, **other).vectors.equal(found.vectors)
    assert not {*other} & {*found.story, *found.story["hyperparameters"]}


def test_the_history_is_in_squared_units(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    found = tm.dct(f, 3, radius=2.0, steps=2)
    label = tm.plots.objective_history(found).layout.yaxis.title.text
    assert label == "part of the objective (residual-stream units, squared)"
