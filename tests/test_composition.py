"""Means and sums of vectors, against the vectors and against what is added up by hand."""

import math

import pytest
import torch

import tl_melbo as tm
from tl_melbo.analysis import composition, kl_divergence

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def f(tiny_llama):
    return tm.ActivationMap.from_prompts(tiny_llama, [PROMPT, "The"], 1, 3)


@pytest.fixture(scope="module")
def found():
    generator = torch.Generator().manual_seed(0)
    return tm.SteeringVectors.from_tensor(torch.randn(5, 32, generator=generator), source_layer=1)


def test_one_vector_is_itself(tiny_llama, f, found, unchanged):
    unchanged(tiny_llama)
    frame = composition(
        tiny_llama, f, found, 2.0 * found[3], sizes=[1], n_random_subsets=0, max_new_tokens=4
    )
    own = frame[frame["scaling"] != "reference norm"]
    # Its mean, its sum and itself at its own norm are one row.
    assert own["norm"].tolist() == [float(found.norms[0])]
    kl = kl_divergence(tiny_llama, PROMPT, found[0], 2.0 * found[3])
    torch.testing.assert_close(torch.tensor(own["kl_to_reference"].tolist()), kl)
    unsteered = kl_divergence(tiny_llama, PROMPT, found[0])
    torch.testing.assert_close(torch.tensor(own["kl_to_unsteered"].tolist()), unsteered)
    text = tm.generate(tiny_llama, PROMPT, found[0], max_new_tokens=4)["completion"][0]
    assert set(own["completion"]) == {text}


def test_the_reference_itself_is_at_no_distance(tiny_llama, f, found):
    frame = composition(tiny_llama, f, found, found[0], sizes=[1], max_new_tokens=1)
    first = frame[frame["subset"] == "first"]
    assert first["distance"].max() < 1e-4
    assert first["kl_to_reference"].max() < 1e-6
    assert frame["kl_to_unsteered"].min() > 0


def test_rows_are_what_is_added_up_by_hand(tiny_llama, f, found):
    frame = composition(
        tiny_llama, f, found, found[4], sizes=(2, 5, 20), n_random_subsets=2, max_new_tokens=2
    )
    # Three subsets of two, one of all five, none of twenty: four rows each, no two the same.
    assert frame["size"].tolist() == [2] * 12 + [5] * 4
    assert frame.groupby("subset").size().to_dict() == {"first": 8, "random": 8}
    kinds = frame.groupby(["combination", "scaling"]).size().to_dict()
    assert kinds == {("mean", "raw"): 4, ("mean", "reference norm"): 4, ("mean", "mean norm"): 4,
                     ("sum", "raw"): 4}  # fmt: skip
    assert not frame[["members", "norm"]].duplicated().any()
    for row in frame.itertuples():
        members = found.vectors[list(row.members)]
        theta = members.mean(0) if row.combination == "mean" else members.sum(0)
        if row.scaling == "reference norm":
            theta = theta * found.norms[4] / theta.norm()
        if row.scaling == "mean norm":
            theta = theta * members.norm(dim=-1).mean() / theta.norm()
        assert row.norm == pytest.approx(float(theta.norm()), rel=1e-5)
        z = [
            torch.cat([f.delta(t[None])[0, i][f.mask[i]].mean(0) for i in range(2)])
            for t in (theta, found.vectors[4])
        ]
        assert row.distance == pytest.approx(float((z[0] - z[1]).norm()), rel=1e-3)
        kl = kl_divergence(tiny_llama, PROMPT, theta, found[4], layer=1)
        assert row.kl_to_reference == pytest.approx(float(kl), rel=1e-3)
        text = tm.generate(tiny_llama, PROMPT, theta, 1, max_new_tokens=2)["completion"][0]
        assert row.completion == text


def test_without_a_reference(tiny_llama, f, found):
    frame = composition(tiny_llama, f, found.vectors, sizes=[2], max_new_tokens=1)
    assert frame["kl_to_reference"].isna().all()
    assert frame["distance"].isna().all()
    assert set(frame["scaling"]) == {"raw", "mean norm"}
    assert frame["kl_to_unsteered"].notna().all()


def test_random_subsets_follow_the_seed(tiny_llama, f, found):
    def members(seed):
        frame = composition(tiny_llama, f, found, sizes=[2, 3], seed=seed, max_new_tokens=1)
        return frame["members"].tolist()

    assert members(0) == members(0)
    assert members(0) != members(1)
    assert all(len(set(each)) == len(each) for each in members(0))


def test_vectors_that_cancel_stay_zero(tiny_llama, f, found):
    both = tm.concatenate([found[0], -found[0]])
    frame = composition(tiny_llama, f, both, found[1], sizes=[2], max_new_tokens=1)
    assert frame["norm"].tolist() == [0.0] * 4
    assert frame["kl_to_unsteered"].max() < 1e-6
    assert all(math.isfinite(value) for value in frame["distance"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [2, 0]}, "sizes=0: at least 1"),
        ({"sizes": [6, 7]}, "none fits a library of 5 vectors; allowed are 1 to 5"),
        ({"sizes": []}, "none fits"),
        ({"reference": torch.ones(2, 32)}, "reference: 2 vectors, expected exactly one"),
        ({"reference": torch.zeros(32)}, "reference: zero"),
        ({"reference": torch.ones(31)}, "31 wide"),
        ({"vectors": torch.empty(0, 32)}, "a library without vectors"),
        ({"n_random_subsets": -1}, "n_random_subsets=-1"),
        ({"n_random_subsets": 10**9}, "n_random_subsets=1000000000"),
        (
            {"vectors": tm.SteeringVectors.from_tensor(torch.ones(32), source_layer=2)},
            "found at layer 2, but f starts at layer 1",
        ),
    ],
)
def test_bad_arguments(tiny_llama, f, found, change, message):
    with pytest.raises(ValueError, match=message):
        composition(tiny_llama, f, **{"vectors": found, "sizes": [2], **change})
