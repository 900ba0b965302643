"""Batches that do not fit are halved, and nothing but rounding depends on it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl_melbo as tm
from tests.tiny_models import tiny_bridge
from tl_melbo.memory import map_batches

ROOT = Path(__file__).resolve().parent.parent
FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. Error code 12"


@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50))
def test_halves_until_it_fits(n_rows, size, room):
    tried = []

    def square(batch):
        tried.append(len(batch))
        if len(batch) > room:
            raise RuntimeError(FULL)
        return batch**2

    rows = torch.arange(n_rows)
    results, fitting = map_batches(square, rows, size)
    assert torch.equal(torch.cat([rows[:0], *results]), rows**2)
    assert all(len(result) <= room for result in results)
    assert fitting <= size
    assert sum(count > room for count in tried) <= 6, "a size that did not fit is tried again"


@pytest.mark.parametrize(
    ("error", "rows"), [(RuntimeError(FULL), 1), (RuntimeError("another"), 4), (ValueError("x"), 4)]
)
def test_one_row_and_other_errors_are_not_hidden(error, rows):
    def fails(batch):
        raise error

    with pytest.raises(type(error)) as caught:
        map_batches(fails, torch.zeros(rows), rows)
    assert caught.value is error


@pytest.fixture
def crowded(monkeypatch):
    """A memory that holds the graphs of three vectors."""
    delta = tm.ActivationMap.delta

    def small(self, theta, *arguments, **options):
        if len(theta) > 3:
            raise RuntimeError(FULL)
        return delta(self, theta, *arguments, **options)

    def switch(on):
        monkeypatch.setattr(tm.ActivationMap, "delta", small if on else delta)

    return switch


@pytest.mark.slow
def test_searches_and_distances_do_not_depend_on_the_batch(crowded):
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, "Tell me about yourself.", 1, 4)
    results = []
    for on in (False, True):
        crowded(on)
        found = tm.melbo(f, 7, 2.0, orthogonal=False, steps=4)
        family = tm.melbo_ortho(f, found[0], 2, steps=4)
        distances = tm.analysis.effect_distance(f, found, found[0])
        results.append((found.objective, distances, family.columns["distance"]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_texts_and_log_probs_do_not_depend_on_the_batch(monkeypatch):
    model = tiny_bridge("llama")
    theta = 3 * torch.eye(32)[:7]
    options = {"layer": 2, "max_new_tokens": 5}
    texts = tm.generate(model, "Once upon a time", theta, **options)
    log_probs = tm.next_token_log_probs(model, "Once upon a time", theta, 2)
    forward = torch.nn.Embedding.forward

    def crowded(self, tokens):
        if len(tokens) > 2:
            raise RuntimeError(FULL)
        return forward(self, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", crowded)
    assert tm.generate(model, "Once upon a time", theta, **options).equals(texts)
    again = tm.next_token_log_probs(model, "Once upon a time", theta, 2)
    torch.testing.assert_close(again, log_probs, rtol=1e-5, atol=1e-5)


LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
import tl_melbo as tm
from tests.tiny_models import tiny_bridge
words = "The ships left the harbour at dawn, and the gulls followed them out to sea. " * 5
f = tm.ActivationMap.from_prompts(tiny_bridge("llama"), words, 1, 4, batch_size=1024)
few = tm.ActivationMap.from_prompts(f.model, words, 1, 4, batch_size=8)
settings = dict(radius=2.0, orthogonal=False, steps=2)
def held():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
expected = tm.melbo(few, 32, **settings)  # so that all code is loaded
sys.modules["tl_melbo.discovery._melbo"]._GROUP = 1024
before = held()
leaf = torch.zeros(1024, 32).normal_().requires_grad_()
f.delta(leaf).sum().backward()
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
now = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
needed = (peak - now) * 1024
limit = before * 1024 + needed // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
try:
    f.delta(leaf).sum().backward()
    raise SystemExit("the limit does not bind")
except RuntimeError as error:
    assert "allocate" in str(error), error
found = tm.melbo(f, 1024, **settings)
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
wanted = tm.melbo(few, 1024, **settings)
difference = (found.objective / wanted.objective - 1).abs().max()
assert difference < 1e-5, difference
print("finished", needed >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits memory as Linux does")
def test_half_of_the_memory_that_a_batch_needs():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("finished")
