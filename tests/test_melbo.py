"""The objective, the published optimiser and the fast one, against the slow reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl_melbo as tm
from tests.conftest import PROMPT
from tests.golden import recorded
from tests.reference import melbo as reference
from tests.tiny_models import tiny_bridge
from tl_melbo.model.tokens import to_tokens

PROMPTS = ["Tell me about yourself.", "Write a poem about the sea."]


def tiny_map(model, prompts=PROMPT, **options):
    return tm.ActivationMap.from_prompts(model, prompts, 1, 4, **options)


def cosines(vectors):
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    return (unit @ unit.T - torch.eye(len(unit), dtype=torch.float64)).abs()


@given(
    seed=st.integers(0, 2**31),
    p=st.sampled_from([1, 1.5, 2, 3, 4]),
    q=st.sampled_from([None, 1, 2, 4]),
    norm=st.sampled_from(["l2", "lp"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
)
def test_objective_is_the_equation(seed, p, q, norm, shape):
    delta = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours = tm.melbo_objective(delta, p, q, norm)
    theirs = [reference.objective(list(d), slice(None), p, q or p, norm) for d in delta]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=0)


def test_norms_agree_at_p_2_and_differ_at_p_4():
    delta = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    objective = tm.melbo_objective
    torch.testing.assert_close(objective(delta, 2, 1, "l2"), objective(delta, 2, 1, "lp"))
    assert (objective(delta, 4, 1, "l2") > objective(delta, 4, 1, "lp") * 1.1).all()


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("norm", ["l2", "lp"])
def test_objective_of_no_effect_has_a_zero_gradient(p, norm):
    delta = torch.zeros(1, 1, 2, 3, requires_grad=True)
    tm.melbo_objective(delta, p, None, norm).sum().backward()
    assert torch.equal(delta.grad, torch.zeros_like(delta))


@pytest.mark.everywhere
@pytest.mark.parametrize(
    ("p", "q", "norm", "positions"),
    [(2, 2, "l2", slice(-3, None)), (4, 1, "l2", slice(None)), (4, 4, "lp", slice(1, None))],
)
@pytest.mark.parametrize("orthogonal", [True, False])
def test_adamw_matches_the_reference_step_by_step(tiny, p, q, norm, positions, orthogonal):
    f = tiny_map(tiny, PROMPTS)
    found = tm.melbo(
        f, 2, 2.0, p, q, positions, orthogonal, seed=5, optimiser="adamw", steps=4, norm=norm
    )
    starts = tm.melbo(f, 2, 2.0, orthogonal=False, seed=5, steps=1).vectors
    tokens = [to_tokens(tiny, prompt) for prompt in PROMPTS]
    earlier = []
    for k in range(2):
        history, theta = reference.adamw(
            tiny, tokens, starts[k], earlier, 2.0, 4, 1, 4, positions, p, q, norm
        )
        torch.testing.assert_close(found.history[k].float(), history.float(), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.vectors[k], theta, rtol=0, atol=2e-4)
        if orthogonal:
            earlier.append(found.vectors[k])


@pytest.mark.everywhere
def test_ascent_is_monotone_and_returns_its_best(tiny):
    f = tiny_map(tiny, PROMPTS)
    for orthogonal in (True, False):
        found = tm.melbo(f, 5, 3.0, orthogonal=orthogonal, steps=12)
        history = found.history.nan_to_num(-math.inf)
        steps = (~found.history.isnan()).sum(-1)
        for k in range(5):
            assert (history[k, : steps[k]].diff() >= 0).all()
        with torch.no_grad():
            effect = f.delta(found.vectors) * f.position_mask(slice(-3, None))[:, :, None]
        reached = tm.melbo_objective(effect).double()
        torch.testing.assert_close(reached, found.objective, rtol=1e-4, atol=0)
        torch.testing.assert_close(history.amax(-1), found.objective)
        assert (found.columns["evaluations"] <= 12).all()


@pytest.mark.everywhere
@pytest.mark.parametrize("radius", [0.5, 2])
def test_ascent_climbs_above_adamw_on_every_architecture(every_tiny, radius):
    slow = recorded(f"tiny_adamw_{radius}")[every_tiny.cfg.model_name.removeprefix("tiny-")]
    fast = tm.melbo(tiny_map(every_tiny), **slow["settings"]).objective
    objective = torch.tensor(slow["objective"], dtype=fast.dtype)
    # Tiny random models have many small optima, and single starts end in either's favour.
    assert fast.max() >= 0.99 * objective.max()
    assert fast.mean() >= 0.95 * objective.mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "radius", [12, *(pytest.param(radius, marks=pytest.mark.slow) for radius in (3, 6))]
)
def test_ascent_reaches_300_published_steps_in_10_gradients(f, radius):
    """Every start, on the embedded model; the objective of both is the published one."""
    slow = recorded(f"adamw_{radius}")
    fast = tm.melbo(f, **slow["settings"])
    assert slow["steps"] == 300
    assert (fast.columns["evaluations"] <= 10).all()
    objective = torch.tensor(slow["objective"], dtype=fast.objective.dtype)
    assert (fast.objective >= objective).all(), (fast.objective, objective)


@pytest.mark.everywhere
def test_orthogonal_library_until_the_space_is_used_up(tiny_llama, unchanged):
    unchanged(tiny_llama)
    found = tm.melbo(tiny_map(tiny_llama), 32, 2.0, steps=4)
    assert len(found) == 32
    assert cosines(found.vectors).max() < 1e-5
    torch.testing.assert_close(found.norms, torch.full((32,), 2.0))


@pytest.mark.everywhere
@pytest.mark.boundary
def test_order_means_greedy_and_starts_do_not_depend_on_the_count(tiny_llama):
    f = tiny_map(tiny_llama)
    few, many = tm.melbo(f, 3, 2.0, seed=4), tm.melbo(f, 6, 2.0, seed=4)
    assert torch.equal(few.vectors, many.vectors[:3])


@pytest.mark.everywhere
def test_same_seed_same_vectors_other_seed_others(tiny_llama):
    f = tiny_map(tiny_llama)
    first = tm.melbo(f, 2, 2.0, seed=7)
    torch.manual_seed(123)
    assert torch.equal(first.vectors, tm.melbo(f, 2, 2.0, seed=7).vectors)
    assert not torch.equal(first.vectors, tm.melbo(f, 2, 2.0, seed=8).vectors)


@pytest.mark.everywhere
def test_batch_size_does_not_matter(tiny_llama):
    options = {"radius": 2.0, "orthogonal": False}
    whole = tm.melbo(tiny_map(tiny_llama, batch_size=5), 5, **options)
    split = tm.melbo(tiny_map(tiny_llama, batch_size=2), 5, **options)
    torch.testing.assert_close(whole.vectors, split.vectors, rtol=0, atol=1e-3)


@pytest.mark.everywhere
def test_linear_map_gives_its_singular_vectors():
    """A map with a known answer: for delta = theta M, the library is M's left singular vectors."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    singular_values = torch.tensor([32.0, 16.0, 8.0, 4.0, 2.0, 1.0])
    matrix = left @ torch.diag(singular_values) @ right

    class Linear:
        x = torch.zeros(1, 4, 6)
        mask = torch.ones(1, 4, dtype=torch.bool)

        def delta(self, theta):
            return (theta @ matrix)[:, None, None, :].expand(-1, 1, 4, -1)

        def position_mask(self, positions):
            mask = torch.zeros(1, 4, dtype=torch.bool)
            mask[0, positions] = True
            return mask

        def vectors_at_once(self, with_gradient=True):
            return 4

        def story(self):
            return {"model": "linear", "source_layer": 0}

    found = tm.melbo(Linear(), 6, 3.0, positions=slice(-2, None), steps=40)
    overlap = ((found.vectors / 3.0) @ left).abs()
    torch.testing.assert_close(overlap, torch.eye(6), rtol=0, atol=0.03)
    # Two positions of |delta|^2 each, then the square root.
    expected = math.sqrt(2) * 3.0 * singular_values.double()
    torch.testing.assert_close(found.objective, expected, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_first_token_that_takes_over_is_pointed_out(f):
    with pytest.warns(UserWarning, match=r"objective comes from the first token"):
        tm.melbo(f, 1, 6.0, positions=slice(None), steps=3)


def test_story_tells_everything(tiny_llama):
    found = tm.melbo(tiny_map(tiny_llama, PROMPTS), 2, 2.0, p=4, q=1, steps=2, seed=3)
    story = found.story
    assert story["method"] == "melbo"
    assert story["model"] == "tiny-llama"
    assert story["prompts"] == PROMPTS
    assert story["seed"] == 3
    assert (story["source_layer"], story["target_layer"]) == (1, 4)
    assert story["hyperparameters"] == {
        "n_vectors": 2, "radius": 2.0, "p": 4, "q": 1, "norm": "l2", "positions": [-3, None, None],
        "orthogonal": True, "optimiser": "ascent", "steps": 2,
    }  # fmt: skip
    assert {"python", "torch", "transformer-lens", "tl-melbo"} <= set(story["versions"])
    assert story["date"]


def test_steps_are_reported(tiny_llama):
    seen = []
    tm.melbo(tiny_map(tiny_llama), 2, 2.0, steps=3, on_step=seen.append)
    assert [(s.first_vector, s.step) for s in seen] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (1, 2),
        (1, 3),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, r"radius=0.0: must be a positive norm"),
        ({"radius": -1}, r"radius=-1"),
        ({"radius": math.nan}, r"radius=nan"),
        ({"p": 0.5}, r"p=0.5: a power, from 1"),
        ({"q": 0}, r"q=0"),
        ({"p": math.inf}, r"p=inf"),
        ({"n_vectors": 0}, r"n_vectors=0: must be from 1"),
        ({"n_vectors": 33}, r"n_vectors=33: .*at most d_model=32"),
        ({"steps": 0}, r"steps=0"),
        ({"positions": slice(90, None)}, r"picks no token of prompt 0"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, arguments, message, unchanged):
    unchanged(tiny_llama)
    with pytest.raises(ValueError, match=message):
        tm.melbo(tiny_map(tiny_llama), **{"n_vectors": 2, **arguments})


def test_wrong_types_are_named(tiny_llama):
    with pytest.raises(TypeError, match="f"):
        tm.melbo(tiny_llama)
    with pytest.raises(TypeError, match="optimiser"):
        tm.melbo(tiny_map(tiny_llama), optimiser="sgd")


def test_not_finite_objective_is_named():
    model = tiny_bridge("llama")
    f = tiny_map(model)
    with torch.no_grad():
        model.blocks[3].mlp.out.original_component.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"vectors \[0, 1\]: .*not finite"):
        tm.melbo(f, 2, 2.0)


@pytest.mark.boundary
def test_hooked_transformer_and_bridge_find_the_same_vectors(hooked_and_bridge):
    hooked, bridge = hooked_and_bridge
    results = [tm.melbo(tiny_map(m, PROMPTS), 3, 2.0, steps=5) for m in (hooked, bridge)]
    torch.testing.assert_close(results[0].vectors, results[1].vectors, rtol=0, atol=1e-3)
    torch.testing.assert_close(results[0].objective, results[1].objective, rtol=1e-4, atol=0)


def test_nothing_is_not_hidden():
    """A NaN in the effects stays one, and a radius without effect is said to be one."""
    delta = torch.ones(1, 2, 3, 4)
    delta[0, 0, 0, 0] = math.nan
    for p, norm in ((2, "l2"), (4, "l2"), (1, "lp")):
        assert tm.melbo_objective(delta, p, 1, norm).isnan().all()


@pytest.mark.everywhere
def test_a_radius_without_effect_is_named(tiny_llama):
    with pytest.raises(ValueError, match="radius: a random vector of this norm changes nothing"):
        tm.melbo(tiny_map(tiny_llama), 2, 1e-12)


def test_numpy_integers_are_integers(tiny_llama):
    positions = slice(np.int64(-2), None)
    found = tm.melbo(tiny_map(tiny_llama), 1, 2.0, positions=positions, steps=2)
    assert found.story["hyperparameters"]["positions"] == [-2, None, None]
