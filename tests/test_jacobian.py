"""Jacobian directions and random vectors: closed forms, finite differences, an SVD of all of J."""

import functools
import sys

import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import tiny_bridge

PROMPTS = ["Tell me about yourself.", "What is that?"]


class Linear:
    """f(x) = x A' at each position, in float64: its Jacobian is known."""

    def __init__(self, d_model=12, n_pos=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
        self.x = torch.randn(2, n_pos, d_model, generator=generator, dtype=torch.float64)
        self.mask = torch.ones(2, n_pos, dtype=torch.bool)

    def delta(self, theta, positions=slice(None)):
        effect = (theta.double() @ self.matrix.T)[:, None, None, :].expand(-1, *self.x.shape)
        return effect * self.position_mask(positions)[:, :, None]

    def position_mask(self, positions):
        mask = torch.zeros_like(self.mask)
        mask[:, positions] = True
        return mask

    def vectors_at_once(self, with_gradient=True):
        return 5

    def story(self):
        return {"model": "linear", "source_layer": 0, "target_layer": 1}


@pytest.fixture
def exact(request, monkeypatch):
    """Both ways: all of J'J, and a block of vectors that is iterated."""
    if not request.param:
        monkeypatch.setattr(sys.modules["tl_melbo.discovery._jacobian"], "_EXACT_WIDTH", 0)


both_ways = pytest.mark.parametrize("exact", [True, False], indirect=True)


@both_ways
def test_a_linear_map_gives_its_singular_vectors(exact):
    f = Linear()
    found = tm.jacobian(f, 6, radius=1.0, positions=slice(-3, None))
    _, values, right = torch.linalg.svd(f.matrix)
    # Two prompts and three positions, stacked.
    expected = values[:6] * 6**0.5
    torch.testing.assert_close(
        found.columns["singular_value"].double(), expected, rtol=1e-6, atol=0
    )
    cosines = (found.vectors.double() @ right[:6].T).abs()
    assert (cosines.diagonal() > 1 - 1e-6).all()


def test_the_linear_map_to_nine_digits():
    module = sys.modules["tl_melbo.discovery._jacobian"]
    f = Linear()
    _, values, right = torch.linalg.svd(f.matrix)
    for width in (2048, 0):
        module._EXACT_WIDTH, before = width, module._EXACT_WIDTH
        try:
            vectors, singular = module.top_directions(f, f.delta, 12)
        finally:
            module._EXACT_WIDTH = before
        torch.testing.assert_close(singular, values * 8**0.5, rtol=1e-9, atol=0)
        assert ((vectors @ right.T).abs().diagonal() > 1 - 1e-9).all()


def test_a_jacobian_that_is_too_large_is_not_held(monkeypatch):
    module, f = sys.modules["tl_melbo.discovery._jacobian"], Linear(40)
    whole, held = tm.jacobian(f, 3, radius=1.0, positions=slice(None)), []
    monkeypatch.setattr(module, "_LARGEST_JACOBIAN", 8 * 40**2 - 1)  # two prompts, four positions
    times = module._map.jacobian_times
    count = lambda *a: held.append(len(a[2])) or times(*a)  # noqa: E731
    monkeypatch.setattr(module._map, "jacobian_times", count)
    found = tm.jacobian(f, 3, radius=1.0, positions=slice(None))
    assert max(held) <= 16
    torch.testing.assert_close(found.vectors, whole.vectors, rtol=0, atol=1e-6)


def test_a_map_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"value_and_gradient\(\): argument 'f' is None"):
        tm.discovery.value_and_gradient(None, torch.sum, slice(None))


class Flat(Linear):
    """A map whose singular values are known: some that stand out, then nearly equal ones."""

    def __init__(self, values, dtype=torch.float64):
        super().__init__(len(values), n_pos=1)
        left, right = (torch.linalg.qr(Linear(len(values), seed=seed).matrix).Q for seed in (1, 2))
        self.right = right.T
        self.matrix = left * values @ right.T
        self.x = self.x[:1].to(dtype)
        self.mask = self.mask[:1]

    def vectors_at_once(self, with_gradient=True):
        return 64


@pytest.mark.parametrize("exact", [False], indirect=True)
def test_a_flat_spectrum_settles(exact):
    values = torch.cat([torch.tensor([9.0, 5.0, 3.0]), torch.linspace(1.2, 0.8, 397)]).double()
    f = Flat(values)
    module = sys.modules["tl_melbo.discovery._jacobian"]
    vectors, singular = module.top_directions(f, f.delta, 32)
    torch.testing.assert_close(singular, values[:32], rtol=1e-9, atol=0)
    cosines = (vectors @ f.right.T).abs()
    # Neighbours are 1e-5 of the largest apart, in squares: so much less is their turn known.
    assert (cosines[:3].diagonal() > 1 - 1e-12).all()
    assert (cosines.diagonal() > 1 - 1e-6).all()
    inside = (vectors @ f.right[:32].T).norm(dim=-1)
    assert (inside > 1 - 1e-6).all()


@pytest.mark.parametrize("exact", [False], indirect=True)
def test_equal_singular_values_give_their_subspace_and_no_rank_is_made_up(exact):
    values = torch.zeros(400, dtype=torch.float64)
    values[:6] = torch.tensor([4.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    f = Flat(values)
    module = sys.modules["tl_melbo.discovery._jacobian"]
    vectors, singular = module.top_directions(f, f.delta, 24)
    torch.testing.assert_close(singular, values[:24], rtol=0, atol=1e-7)
    torch.testing.assert_close(
        vectors @ vectors.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12
    )
    for same in (slice(0, 1), slice(1, 4), slice(4, 6)):
        inside = torch.linalg.svdvals(vectors[same] @ f.right[same].T)
        assert (inside > 1 - 1e-12).all()


@pytest.mark.parametrize("exact", [False], indirect=True)
def test_directions_that_have_not_settled_are_told_of(exact, monkeypatch):
    module = sys.modules["tl_melbo.discovery._jacobian"]
    monkeypatch.setattr(module, "_LARGEST_BASIS", 112)
    f = Flat(torch.cat([torch.tensor([9.0]), torch.linspace(1.2, 0.8, 399)]).double())
    with pytest.warns(UserWarning, match="11 of 12 directions have not settled"):
        found = tm.jacobian(f, 12, radius=1.0, positions=slice(None))
    assert abs(float(found.vectors[0].double() @ f.right[0])) > 1 - 1e-7


@both_ways
def test_a_map_without_effect_has_no_directions(exact):
    f = Linear()
    f.matrix = torch.zeros_like(f.matrix)
    with pytest.raises(ValueError, match="radius: every vector of this norm changes nothing"):
        tm.jacobian(f, 3, radius=1.0)


def finite_differences(f, step=0.02):
    """J by central differences along every axis, [output, d_model]."""
    with torch.no_grad():
        axes = step * torch.eye(f.d_model, dtype=f.x.dtype)
        ahead, behind = (f.delta(axis, slice(-3, None)) for axis in (axes, -axes))
    return ((ahead - behind) / (2 * step)).flatten(1).T


def row_by_row(f):
    """J by the gradient of every output, [output, d_model]."""
    theta = torch.zeros(1, f.d_model, dtype=f.x.dtype, requires_grad=True)
    outputs = f.delta(theta, slice(-3, None)).flatten()
    each = torch.eye(len(outputs), dtype=f.x.dtype)
    return torch.autograd.grad(outputs, theta, each, is_grads_batched=True)[0][:, 0]


def float64_map(architecture):
    return tm.ActivationMap.from_prompts(tiny_bridge(architecture, torch.float64), PROMPTS, 1, 4)


@functools.cache
def whole_jacobians(architecture):
    f = float64_map(architecture)
    return row_by_row(f), finite_differences(f)


@both_ways
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_directions_are_those_of_the_whole_jacobian(architecture, exact):
    f = float64_map(architecture)
    found = tm.jacobian(f, 5, radius=2.0)
    # Hugging Face's norms round to float32: differences are good to a few digits.
    for whole, tolerance in zip(whole_jacobians(architecture), (1e-5, 1e-3), strict=True):
        _, values, right = torch.linalg.svd(whole, full_matrices=False)
        singular = found.columns["singular_value"].double()
        torch.testing.assert_close(singular, values[:5], rtol=tolerance, atol=0)
        cosines = (found.vectors.double() @ right[:5].T / 2.0).abs().diagonal()
        assert (cosines > 0.9999).all()
    torch.testing.assert_close(found.norms, torch.full((5,), 2.0))
    assert (found.vectors.gather(1, found.vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_melbo_at_a_small_radius_finds_the_first_direction():
    f = tm.ActivationMap.from_prompts(tiny_bridge("llama", torch.float64), PROMPTS, 1, 4)
    radius = 1e-3 * float(f.x.norm(dim=-1)[f.mask].median())
    first = tm.jacobian(f, 1, radius)
    climbed = tm.melbo(f, 1, radius, steps=200)
    assert float(tm.analysis.cosine_similarity(first, climbed).abs()) > 0.99


def test_the_metadata_is_enough_for_everything_else(tiny_llama, tmp_path, unchanged):
    unchanged(tiny_llama)
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    run = tm.Run(tmp_path / "run")
    some = run.keep(tm.jacobian, f, 3, radius=2.0)
    found = run.keep(tm.jacobian, f, 6, radius=2.0)
    torch.testing.assert_close(found[:3].vectors, some.vectors)
    torch.testing.assert_close(found.vectors, tm.jacobian(f, 6, radius=2.0).vectors)
    loaded = tm.SteeringVectors.load(tmp_path / "run" / "vectors.safetensors")
    assert "singular_value" in loaded.table()
    assert loaded.story["measure"]["column"] == "singular_value"
    with pytest.raises(ValueError, match="jacobian"):
        run.keep(tm.melbo, f, 7, radius=2.0)


def test_random_vectors_are_uniform_and_numbered(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    many = tm.random_vectors(f, 2000, radius=3.0)
    torch.testing.assert_close(many.norms, torch.full((2000,), 3.0))
    # Of a uniform direction: mean 0, covariance identity / d_model; four standard errors.
    units = many.vectors / 3.0
    assert units.mean(0).abs().max() < 4 / (2000 * f.d_model) ** 0.5
    assert (units.T @ units / 2000 * f.d_model - torch.eye(f.d_model)).abs().max() < 0.2
    torch.testing.assert_close(tm.random_vectors(f, 3, radius=3.0).vectors, many.vectors[:3])
    parts = [tm.random_vectors(f, 2, radius=3.0)]
    parts.append(tm.random_vectors(f, 1, radius=3.0, previous=parts[0]))
    torch.testing.assert_close(tm.join_library(parts).vectors, many.vectors[:3])
    assert not torch.equal(tm.random_vectors(f, 3, radius=3.0, seed=1).vectors, many.vectors[:3])
    assert float(tm.random_vectors(f, 1).norms[0]) == pytest.approx(
        tm.calibrate_radius(f), rel=1e-6
    )


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (tm.jacobian, {"n_vectors": 33}, "at most d_model=32"),
        (tm.jacobian, {"n_vectors": 0}, "n_vectors=0"),
        (tm.jacobian, {"radius": -1.0}, "radius=-1.0"),
        (tm.jacobian, {"positions": slice(90, None)}, "picks no token"),
        (tm.random_vectors, {"seed": -1}, "seed=-1"),
        (tm.random_vectors, {"n_vectors": -1}, "n_vectors=-1"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, method, arguments, message):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    with pytest.raises(ValueError, match=message):
        method(f, **{"radius": 1.0, **arguments})


@pytest.mark.parametrize(
    ("find", "settings"),
    [
        (tm.jacobian, {}),
        (tm.dct, {}),
        (tm.dct, {"order": "linear"}),
        (tm.dct, {"start": "jacobian", "steps": 2}),
    ],
)
def test_the_bar_moves_while_all_are_found_together(find, settings, capsys):
    f = Linear()
    f.vectors_at_once = lambda with_gradient=True: 3
    seen = []

    def delta(theta, positions=slice(None)):
        seen.append(search._bar.n if search._bar is not None else None)
        return Linear.delta(f, theta, positions)

    f.delta = delta
    search = find.parts(f, 12, radius=1.0, positions=slice(-3, None), progress=True, **settings)
    search.collect()
    shown = [number for number in seen if number is not None]
    assert shown == sorted(shown)
    assert len({*shown}) >= 4
    assert search._bar.n == 12
    assert "12/12" in capsys.readouterr().err
