"""MELBO-ortho: the published optimiser against the slow reference, the fast one against it."""

import math
import sys

import pytest
import torch

import tl_melbo as tm
from tests.conftest import PROMPT
from tests.golden import recorded
from tests.reference import melbo_ortho as reference
from tests.test_melbo import cosines
from tests.tiny_models import tiny_bridge
from tl_melbo.model.tokens import to_tokens

PROMPTS = ["Tell me about yourself.", "Write a poem about the sea."]


def tiny_map(model, prompts=PROMPT, **options):
    return tm.ActivationMap.from_prompts(model, prompts, 1, 4, **options)


def start(f, radius=2.0):
    return tm.melbo(f, 1, radius, steps=6)


def mean_effect(f, theta):
    with torch.no_grad():
        return f.delta(theta).sum(2) / f.mask.sum(-1, keepdim=True)


@pytest.mark.everywhere
@pytest.mark.parametrize("norm_penalty", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_adam_matches_the_reference_step_by_step(every_tiny, norm_penalty, monkeypatch):
    # So few steps leave short vectors, and the family is not to end there.
    module = sys.modules["tl_melbo.discovery._melbo_ortho"]
    monkeypatch.setattr(module, "SMALLEST_NORM", 0.0)
    f = tiny_map(every_tiny)
    theta0 = start(f)
    ours = tm.melbo_ortho(f, theta0, 2, norm_penalty, optimiser="adam", steps=12)
    tokens = to_tokens(every_tiny, PROMPT)
    earlier = []
    for k in range(2):
        history, theta = reference.adam(
            every_tiny, tokens, theta0.vectors[0], earlier, 12, 1, 4, norm_penalty
        )
        # Step 0 is at theta0 itself: no distance but rounding.
        torch.testing.assert_close(ours.history[k, 1:12], history[1:], rtol=1e-3, atol=1e-4)
        assert float((ours.vectors[k] - theta).norm() / theta.norm()) < 5e-3
        earlier.append(ours.vectors[k])


@pytest.mark.everywhere
def test_fast_comes_nearer_than_adam_in_an_eighth_of_its_gradients(every_tiny):
    f = tiny_map(every_tiny)
    slow = recorded("tiny_adam_320")[every_tiny.cfg.model_name.removeprefix("tiny-")]
    fast = tm.melbo_ortho(f, tm.melbo(f, **slow["theta0"]), 2)
    assert slow["steps"] == 8 * 40
    assert (fast.columns["evaluations"] <= 40).all()
    assert fast.columns["distance"].mean() <= sum(slow["distance"]) / 2


@pytest.mark.slow
def test_fast_comes_nearer_than_the_published_run(f):
    """On the embedded model; 125 steps are an eighth of the published 1000."""
    eighth, whole = recorded("adam_125"), recorded("adam_1000")
    assert eighth["theta0"] == whole["theta0"]
    theta0 = tm.melbo(f, **eighth["theta0"])
    fast = tm.melbo_ortho(f, theta0, 1)
    assert (eighth["steps"], whole["steps"]) == (125, 1000)
    assert float(fast.columns["distance"]) < 0.6 * eighth["distance"][0]
    assert whole["distance"][0] < eighth["distance"][0]
    z0 = mean_effect(f, theta0.vectors)
    reached = (mean_effect(f, fast.vectors) - z0).norm()
    torch.testing.assert_close(reached, fast.columns["distance"][0], rtol=1e-3, atol=0)


@pytest.mark.everywhere
def test_family_until_the_space_is_used_up(tiny_llama, unchanged):
    unchanged(tiny_llama)
    f = tiny_map(tiny_llama)
    theta0 = start(f)
    family = tm.melbo_ortho(f, theta0, steps=8)
    everything = torch.cat([theta0.vectors, family.vectors])
    assert cosines(everything).max() < 1e-5
    # Either the space is used up, or what was left had shrunk to nothing.
    assert len(family) <= 31
    assert (family.norms >= 0.1).all()
    assert family.table()["index"].tolist() == list(range(len(family)))


@pytest.mark.everywhere
def test_a_space_that_a_map_does_not_feel_ends_the_family():
    """delta = theta M with M of rank 2: what is left after the felt directions has no effect."""
    matrix = torch.zeros(5, 5)
    matrix[0, 0], matrix[1, 0] = 2.0, 1.0

    class Linear:
        x = torch.ones(1, 3, 5)
        mask = torch.ones(1, 3, dtype=torch.bool)

        def delta(self, theta):
            return (theta @ matrix)[:, None, None, :].expand(-1, 1, 3, -1)

        def position_mask(self, positions):
            return self.mask

        def vectors_at_once(self, with_gradient=True):
            return 4

        def story(self):
            return {"model": "linear"}

    theta0 = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0])
    family = tm.melbo_ortho(Linear(), theta0)
    # Only the second axis does what the first does: 6 = 2 * 3 = 1 * 6.
    assert len(family) == 1
    torch.testing.assert_close(
        family.vectors, torch.tensor([[0.0, 6.0, 0.0, 0.0, 0.0]]), rtol=1e-3, atol=1e-3
    )
    assert float(family.columns["distance"]) < 1e-2
    # Closed form with the penalty: minimise |t - 6| + w t^2, at t = 1 / (2 w).
    shorter = tm.melbo_ortho(Linear(), theta0, norm_penalty=0.25)
    torch.testing.assert_close(float(shorter.norms[0]), 2.0, rtol=1e-3, atol=0)


@pytest.mark.everywhere
def test_interrupted_and_continued_is_the_same_bit_for_bit(tiny_llama):
    f = tiny_map(tiny_llama, PROMPTS)
    theta0 = start(f)
    whole = tm.melbo_ortho(f, theta0, 8, steps=10)
    first = tm.melbo_ortho(f, theta0, 3, steps=10)
    rest = tm.melbo_ortho(f, theta0, 5, previous=first, steps=10)
    assert torch.equal(torch.cat([first.vectors, rest.vectors]), whole.vectors)
    assert rest.table()["index"].tolist() == [3, 4, 5, 6, 7]
    for name, column in whole.columns.items():
        assert torch.equal(torch.cat([first.columns[name], rest.columns[name]]), column)
    from_tensor = tm.melbo_ortho(f, theta0.vectors[0], 5, previous=first.vectors, steps=10)
    assert torch.equal(from_tensor.vectors, rest.vectors)
    one_row = tm.melbo_ortho(f, theta0.vectors, 5, previous=first.vectors, steps=10)
    assert torch.equal(one_row.vectors, rest.vectors)


@pytest.mark.boundary
def test_a_penalty_gives_shorter_vectors(tiny_llama):
    f = tiny_map(tiny_llama)
    theta0 = start(f)
    norms = [
        float(tm.melbo_ortho(f, theta0, 1, norm_penalty).norms[0])
        for norm_penalty in (0.0, 0.02, 0.1)
    ]
    assert norms[0] > norms[1] > norms[2]


def test_yields_one_by_one_and_checks_at_the_call(tiny_llama):
    f = tiny_map(tiny_llama)
    theta0 = start(f)
    one_by_one = tm.iter_melbo_ortho(f, theta0, 3, steps=4)
    first = next(one_by_one)
    assert len(first) == 1
    together = tm.melbo_ortho(f, theta0, 3, steps=4)
    assert torch.equal(together[0].vectors, first.vectors)
    with pytest.raises(ValueError, match="n_vectors=0"):
        tm.iter_melbo_ortho(f, theta0, 0)


class Breaking:
    """A map that gives NaN at some of its calls for a gradient, counted from 1."""

    def __init__(self, f, broken):
        self.f, self.broken, self.calls = f, broken, 0
        self.x, self.mask = f.x, f.mask

    def delta(self, theta):
        effect = self.f.delta(theta)
        self.calls += theta.requires_grad
        return effect * math.nan if theta.requires_grad and self.calls in self.broken else effect

    def position_mask(self, positions):
        return self.f.position_mask(positions)

    def vectors_at_once(self, with_gradient=True):
        return self.f.vectors_at_once(with_gradient)

    def story(self):
        return self.f.story()


@pytest.mark.parametrize("broken", [range(6, 12), range(2, 8), range(1, 2)])
def test_not_finite_costs_one_vector_and_not_the_family(tiny_llama, broken):
    f = tiny_map(tiny_llama)
    family = tm.melbo_ortho(Breaking(f, broken), start(f), 3, steps=20)
    assert torch.isfinite(family.vectors).all()
    assert torch.isfinite(family.columns["distance"]).all()
    assert len(family) == 3
    stopped = family.table()["stopped"].tolist()
    # Broken at its very start a vector is searched for again, else it keeps its last finite place.
    assert (stopped[0] == "not finite") == (broken[0] == 6)
    assert stopped[2] != "not finite"


def test_a_map_that_stays_broken_ends_the_family_with_a_word(tiny_llama):
    f = tiny_map(tiny_llama)
    theta0 = start(f)
    n_calls = []
    tm.melbo_ortho(f, theta0, 1, steps=10, on_step=n_calls.append)
    with pytest.warns(UserWarning, match="vector 1: the residual stream of .* was not finite next"):
        family = tm.melbo_ortho(Breaking(f, range(len(n_calls) + 1, 10_000)), theta0, 3, steps=10)
    assert len(family) == 1


def test_the_last_step_of_adam_is_checked_too(tiny_llama):
    f = tiny_map(tiny_llama)
    family = tm.melbo_ortho(Breaking(f, [101]), start(f), 1, optimiser="adam", steps=100)
    assert family.table()["stopped"].tolist() == ["not finite"]
    assert torch.isfinite(family.columns["distance"]).all()


def test_story_and_table_tell_everything(tiny_llama, tmp_path):
    f = tiny_map(tiny_llama)
    found = tm.melbo(f, 3, 2.0, steps=3)
    family = tm.melbo_ortho(f, found[2], 2, steps=5)
    assert family.story["method"] == "melbo_ortho"
    assert family.story["theta0"]["story"]["index"] == 2
    assert family.story["hyperparameters"]["optimiser"] == "quasi-newton"
    table = family.table()
    assert {"index", "norm", "distance", "evaluations", "stopped"} <= set(table.columns)
    assert set(table["stopped"]) <= {"max steps reached", "converged", "not finite"}
    family.save(tmp_path / "family.safetensors")
    assert tm.SteeringVectors.load(tmp_path / "family.safetensors").table().equals(table)


def test_steps_are_reported(tiny_llama):
    seen = []
    f = tiny_map(tiny_llama)
    tm.melbo_ortho(f, start(f), 2, steps=3, on_step=seen.append)
    assert [(s.vector, s.step) for s in seen] == [(k, i) for k in (0, 1) for i in (1, 2, 3)]


def test_bad_arguments_are_named(tiny_llama, unchanged):
    unchanged(tiny_llama)
    f = tiny_map(tiny_llama)
    other = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 3)
    theta0 = start(f)
    family = tm.melbo_ortho(f, theta0, 2, steps=3)
    elsewhere = tm.melbo_ortho(other, theta0, 2, steps=3)
    cases = [
        ({"theta0": torch.zeros(32)}, r"theta0: zero"),
        ({"theta0": torch.full((32,), math.nan)}, r"theta0: vectors .* not finite"),
        ({"theta0": torch.ones(7)}, r"theta0: 7 wide.*d_model=32"),
        ({"theta0": family}, r"theta0: 2 vectors, expected exactly one"),
        ({"n_vectors": 0}, r"n_vectors=0: must be from 1 to 31"),
        ({"n_vectors": 32}, r"n_vectors=32: must be from 1 to 31"),
        ({"n_vectors": 30, "previous": family, "steps": 3}, r"from 0 to 29.*and 3 are taken"),
        ({"norm_penalty": -1.0}, r"norm_penalty=-1.0"),
        ({"steps": 1}, r"steps=1: at least 2"),
        ({"theta0": 1e10 * torch.ones(32)}, r"theta0: a norm of 5.66e\+10"),
        (
            {"theta0": tm.SteeringVectors.from_tensor(torch.ones(32), source_layer=2)},
            r"theta0: found with source_layer=2 \(here 1\)",
        ),
        ({"previous": family[1:], "steps": 3}, r"previous: holds vectors \[1\], not all from 0"),
        (
            {"previous": family, "norm_penalty": 0.5, "steps": 3},
            r"previous: found with norm_penalty=0.0 \(here 0.5\)",
        ),
        ({"previous": torch.zeros(1, 32)}, r"previous: vectors \[0\] are zero"),
        ({"previous": torch.eye(32)[1:], "theta0": torch.eye(32)[0]}, "the space is used up"),
        ({"previous": theta0}, r"theta0 and vector 0 are not orthogonal"),
        ({"previous": torch.ones(2, 7)}, r"previous: 7 wide"),
        ({"previous": elsewhere}, r"previous: found with target_layer=3 \(here 4\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            tm.melbo_ortho(f, **{"theta0": theta0, **arguments})


@pytest.mark.boundary
def test_hooked_transformer_and_bridge_find_the_same_family(hooked_and_bridge):
    results = []
    for model in hooked_and_bridge:
        f = tiny_map(model)
        results.append(tm.melbo_ortho(f, torch.ones(32) / 4, 2, steps=6))
    torch.testing.assert_close(results[0].vectors, results[1].vectors, rtol=0, atol=5e-3)


def test_a_map_that_is_not_finite_is_refused():
    model = tiny_bridge("llama")
    f = tiny_map(model)
    with torch.no_grad():
        model.blocks[3].mlp.out.original_component.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"theta0: .* is not finite under it"):
        tm.melbo_ortho(f, torch.ones(32), 1)
