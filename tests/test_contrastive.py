"""Contrastive vectors: means and principal components by hand, and what is refused."""

import pytest
import torch

import tl_melbo as tm

WITH = ["I am so happy today.", "What a lovely day!", "This is great."]
WITHOUT = ["I am so sad today.", "What a horrid day!", "This is awful."]


@pytest.fixture
def maps(tiny_llama):
    return [tm.ActivationMap.from_prompts(tiny_llama, texts, 1, 4) for texts in (WITH, WITHOUT)]


class Told:
    """A map, with other facts in its metadata or another residual stream."""

    def __init__(self, f, x=None, **facts):
        self.f, self.facts = f, facts
        self.x = f.x if x is None else x
        self.mask, self.delta, self.position_mask = f.mask, f.delta, f.position_mask
        self.vectors_at_once = f.vectors_at_once

    def story(self):
        return self.f.story() | self.facts


def last_tokens(f):
    """The residual of each prompt's last token; prompts are padded on the left."""
    return f.x[:, -1].double()


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_the_mean_difference_by_hand(maps):
    f, other = maps
    expected = (last_tokens(f) - last_tokens(other)).mean(0)
    found = tm.contrastive(f, other)
    torch.testing.assert_close(found.vectors[0].double(), expected, rtol=1e-6, atol=1e-7)
    assert float(found.columns["distance"]) == pytest.approx(float(expected.norm()))
    at_three = tm.contrastive(f, other, radius=3.0)
    assert float(at_three.norms) == pytest.approx(3.0)
    assert float(tm.analysis.cosine_similarity(found, at_three)) == pytest.approx(1.0)
    assert found.story["other"] == WITHOUT
    assert found.story["measure"]["column"] == "distance"


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_the_principal_component_is_not_centred(maps):
    f, other = maps
    differences = last_tokens(f) - last_tokens(other)
    _values, vectors = torch.linalg.eigh(differences.T @ differences)
    expected = vectors[:, -1]
    expected = expected * (expected @ differences.mean(0)).sign()
    found = tm.contrastive(f, other, "principal", radius=1.0)
    torch.testing.assert_close(found.vectors[0].double(), expected, rtol=0, atol=1e-6)
    units = differences / differences.norm(dim=-1, keepdim=True)
    pairs = (units @ units.T)[~torch.eye(3, dtype=torch.bool)]
    assert found.story["pair_cosine"] == pytest.approx(float(pairs.mean()), abs=1e-9)


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_all_tokens_of_an_answer_count_once(maps):
    f, other = maps
    means = [
        torch.stack([x[m].double().mean(0) for x, m in zip(g.x, g.mask, strict=True)]) for g in maps
    ]
    found = tm.contrastive(f, other, positions=slice(None))
    torch.testing.assert_close(
        found.vectors[0].double(), (means[0] - means[1]).mean(0), rtol=1e-6, atol=1e-7
    )


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_auto_calibrates_where_the_residuals_are_read(maps):
    f, other = maps
    found = tm.contrastive(f, other, radius="auto", positions=slice(2, None))
    expected = tm.calibrate_radius(f, positions=slice(2, None))
    assert expected != pytest.approx(tm.calibrate_radius(f), rel=0.02)
    assert found.story["hyperparameters"]["radius"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_a_component_that_the_mean_has_no_share_of_has_no_norm(maps):
    """Differences +-5 along one axis and 1 along another: the first component has mean zero."""
    f, _ = maps
    differences = torch.zeros(3, *f.x.shape[1:])
    differences[0, :, 0], differences[1, :, 0], differences[:, :, 1] = 5.0, -5.0, 1.0
    ones = Told(f, f.x.detach() + differences)
    with pytest.raises(ValueError, match=r"estimator='principal': .* pass a radius"):
        tm.contrastive(ones, f, "principal")
    with pytest.warns(UserWarning, match="its sign is arbitrary"):
        found = tm.contrastive(ones, f, "principal", radius=2.0)
    assert abs(float(found.vectors[0, 0])) == pytest.approx(2.0, rel=1e-4)
    assert tm.contrastive(ones, f).vectors[0, :2].tolist() == pytest.approx([0.0, 1.0], abs=1e-5)


def test_pairs_that_disagree_are_told(tiny_llama):
    make = tm.ActivationMap.from_prompts
    texts = ["one", "two", "three", "four"]
    f, other = make(tiny_llama, texts, 1, 4), make(tiny_llama, texts[1:] + texts[:1], 1, 4)
    # Around a circle, the differences sum to zero: no direction at all.
    with pytest.raises(ValueError, match="other: no difference"):
        tm.contrastive(f, other)
    other = make(tiny_llama, [*texts[1:], "five"], 1, 4)
    with pytest.warns(UserWarning, match="hardly agree"):
        tm.contrastive(f, other)


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_what_is_refused(maps, tiny_llama):
    f, other = maps
    with pytest.raises(ValueError, match="other: no difference"):
        tm.contrastive(f, f)
    fewer = tm.ActivationMap.from_prompts(tiny_llama, WITHOUT[:2], 1, 4)
    with pytest.raises(ValueError, match=r"other: 2 prompts, but f has 3; .* needs pairs"):
        tm.contrastive(f, fewer, "principal")
    assert len(tm.contrastive(f, fewer)) == 1
    elsewhere = tm.ActivationMap.from_prompts(tiny_llama, WITHOUT, 2, 4)
    with pytest.raises(ValueError, match="other: its source_layer is 2"):
        tm.contrastive(f, elsewhere)
    chat = tm.ActivationMap.from_prompts(tiny_llama, WITHOUT, 1, 4, chat=True)
    with pytest.raises(ValueError, match=r"other: its chat is True, .* both maps with chat=False"):
        tm.contrastive(f, chat)
    narrow = Told(other, dtype="bfloat16")
    with pytest.raises(ValueError, match="other: its dtype is bfloat16, but that of f is float32"):
        tm.contrastive(f, narrow)
    with pytest.raises(ValueError, match="radius=-1"):
        tm.contrastive(f, other, radius=-1.0)
    with pytest.raises(TypeError, match="estimator"):
        tm.contrastive(f, other, "median")


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_a_run_keeps_it_and_it_starts_a_family(maps, tmp_path):
    f, other = maps
    run = tm.Run(tmp_path / "run")
    theta = run.keep(tm.contrastive, f, 1, other=other, radius=2.0)
    assert run.keep(tm.contrastive, f, 1, other=other, radius=2.0).vectors.equal(theta.vectors)
    family = tm.melbo_ortho(f, theta, 2, steps=20)
    assert family.story["theta0"]["story"]["method"] == "contrastive"
    assert len(family) == 2
    assert float((family.vectors @ theta.vectors[0]).abs().max()) < 1e-4
