"""The steps that searches are made of, for pytest-benchmark:

    python -m pytest benchmarks

`make test` runs each once, untimed, so that none rots. `compare.py` is beside the published code.
"""

import pytest
import torch

import tl_melbo as tm
from tl_melbo.geometry import normalise, random_sphere

PROMPT = "Tell me about yourself."


@pytest.fixture(scope="module")
def model():
    return tm.load_model()


@pytest.fixture(scope="module")
def f(model):
    return tm.ActivationMap.from_prompts(model, PROMPT, chat=True)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("n_vectors", [1, 8, 32])
@pytest.mark.parametrize("positions", [slice(None), slice(-3, None)], ids=["all", "last three"])
def test_gradient_of_f(benchmark, f, generator, n_vectors, positions):
    theta = random_sphere(n_vectors, f.d_model, 12.0, generator=generator).requires_grad_()

    def gradient():
        return torch.autograd.grad(f.delta(theta, positions).square().sum(), theta)[0]

    assert benchmark(gradient).isfinite().all()


def test_f_without_gradient(benchmark, f, generator):
    theta = random_sphere(32, f.d_model, 12.0, generator=generator)
    with torch.no_grad():
        assert benchmark(f.delta, theta).isfinite().all()


def test_melbo_one_vector(benchmark, f):
    found = benchmark.pedantic(tm.melbo, (f, 1), rounds=3)
    assert float(found.objective[0]) > 0


@pytest.mark.parametrize("index", [5, 500])
def test_melbo_ortho_ten_gradients(benchmark, f, generator, index):
    """Ten gradients for one vector of a family with `index` vectors; the Jacobian is not timed."""
    frame = torch.randn(f.d_model, index + 1, generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(frame).Q.T.float()
    theta0 = 12.0 * normalise(frame[:1])
    family = tm.iter_melbo_ortho(f, theta0, 4, previous=frame[1:], steps=10)
    next(family)
    assert len(benchmark.pedantic(next, (family,), rounds=3)) == 1


def test_generate_32_rows(benchmark, model, generator):
    theta = random_sphere(32, 576, 3.0, generator=generator)
    options = {"max_new_tokens": 10, "chat": True}
    frame = benchmark.pedantic(tm.generate, (model, PROMPT, theta, 8), options, rounds=3)
    assert len(frame) == 32
