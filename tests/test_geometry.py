"""Spheres, tangents and complements, by their defining properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_melbo.geometry import complement, normalise, random_sphere, tangent


def draw(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**31)


@given(seed=seeds, n=st.integers(1, 5), d=st.integers(1, 20), radius=st.floats(0.01, 1e4))
def test_normalise_keeps_directions(seed, n, d, radius):
    theta = draw(seed, n, d)
    scaled = normalise(theta, radius)
    torch.testing.assert_close(scaled.norm(dim=-1), torch.full((n,), radius, dtype=torch.float64))
    torch.testing.assert_close(scaled * theta.norm(dim=-1, keepdim=True), theta * radius)


@given(seed=seeds, n=st.integers(1, 5), d=st.integers(2, 20))
def test_tangent_is_orthogonal_and_keeps_the_rest(seed, n, d):
    gradient, theta = draw(seed, n, d), draw(seed + 1, n, d)
    flat = tangent(gradient, theta)
    zero = torch.zeros(n, dtype=torch.float64)
    torch.testing.assert_close((flat * theta).sum(-1), zero, rtol=0, atol=1e-12)
    removed = gradient - flat
    parallel = (removed * theta).sum(-1).square()
    torch.testing.assert_close(
        parallel, removed.square().sum(-1) * theta.square().sum(-1), rtol=1e-9, atol=1e-18
    )


@given(seed=seeds, n=st.integers(1, 5), d=st.integers(2, 20), data=st.data())
def test_complement_is_the_projection(seed, n, d, data):
    rank = data.draw(st.integers(0, d - 1))
    basis = torch.linalg.qr(draw(seed, d, rank))[0].T
    vectors = draw(seed + 1, n, d)
    inside = complement(vectors, basis)
    expected = vectors @ (torch.eye(d, dtype=torch.float64) - basis.T @ basis)
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(complement(inside, basis), inside, rtol=0, atol=1e-14)


def test_complement_is_orthogonal_even_when_almost_nothing_is_left():
    basis = torch.linalg.qr(draw(0, 50, 49))[0].T
    almost_inside = draw(1, 1, 49) @ basis + 1e-10 * draw(2, 1, 50)
    rest = complement(almost_inside, basis)
    assert float((rest @ basis.T).abs().max() / rest.norm()) < 1e-12


def test_random_sphere_is_uniform_and_seeded():
    generator = torch.Generator().manual_seed(0)
    theta = random_sphere(4000, 3, 2.0, generator=generator)
    torch.testing.assert_close(theta.norm(dim=-1), torch.full((4000,), 2.0))
    assert theta.mean(0).abs().max() < 0.08  # three standard errors
    # On a sphere in three dimensions every coordinate is uniform (Archimedes).
    quartiles = theta[:, 0].quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=0.1)
    again = random_sphere(4000, 3, 2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(theta, again)


def test_directions_of_nothing_are_refused():
    theta = torch.tensor([[1.0, 0.0], [0.0, 0.0], [float("nan"), 1.0]])
    with pytest.raises(ValueError, match=r"vectors \[1, 2\] are zero or not finite"):
        normalise(theta)
