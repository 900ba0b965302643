"""A whole family measured, and what it is held against: by hand, one vector at a time."""

import pytest
import torch
from pandas.testing import assert_frame_equal

import tl_melbo as tm
from tl_melbo import report
from tl_melbo.analysis import (
    composition,
    effect_distance,
    family,
    kl_baselines,
    kl_divergence,
    rescale,
)

PROMPTS = ["Once upon a time", "The"]


@pytest.fixture(scope="module")
def f(tiny_llama):
    return tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)


@pytest.fixture(scope="module")
def theta0(f):
    return tm.melbo(f, 3, 4.0, steps=3)[2]


@pytest.fixture(scope="module")
def ortho(f, theta0):
    return tm.melbo_ortho(f, theta0, 4, steps=6)


def test_distance_is_that_of_the_search_and_of_a_slow_loop(f, theta0, ortho):
    distances = effect_distance(f, ortho, theta0)
    torch.testing.assert_close(distances, ortho.columns["distance"].float(), rtol=1e-4, atol=0)
    for theta, distance in zip(ortho.vectors, distances, strict=True):
        means = []
        for vector in (theta, theta0.vectors[0]):
            y = f(f.x + vector)
            means.append([y[i][f.mask[i]].mean(0) for i in range(len(PROMPTS))])
        squares = sum(float((a - b).square().sum()) for a, b in zip(*means, strict=True))
        assert float(distance) == pytest.approx(squares**0.5, rel=1e-4)
    # A matrix of one row is a reference, too.
    assert torch.equal(effect_distance(f, ortho.vectors, theta0.vectors), distances)


def test_every_kind_is_what_it_says(tiny_llama, f, theta0, ortho, unchanged):
    unchanged(tiny_llama)
    done = []
    table = family(
        tiny_llama, f, ortho, theta0, max_new_tokens=3, on_batch=lambda *n: done.append(n)
    )
    assert table["kind"].value_counts().to_dict() == {
        "family": 4, "rescaled": 4, "random": 4, "unsteered": 1, "reference": 1,
    }  # fmt: skip
    assert done[-1] == (14, 14)
    assert table["index"].tolist() == [-1, -1, *3 * [0, 1, 2, 3]]
    rows = {kind: table[table["kind"] == kind] for kind in set(table["kind"])}
    assert rows["reference"]["kl_to_reference"].item() == pytest.approx(0, abs=1e-6)
    assert rows["unsteered"]["kl_to_unsteered"].item() == pytest.approx(0, abs=1e-6)
    assert rows["unsteered"]["norm"].item() == 0
    assert rows["rescaled"]["norm"].tolist() == pytest.approx([4.0] * 4)
    assert rows["random"]["norm"].tolist() == pytest.approx(ortho.norms.tolist())
    prompt = PROMPTS[0]
    for kind, vectors in (("family", ortho), ("rescaled", rescale(ortho, theta0))):
        for column, against in (
            ("kl_to_reference", (theta0, "to_reference")),
            ("kl_from_reference", (theta0, "from_reference")),
            ("kl_to_unsteered", (None, "to_reference")),
        ):
            kl = kl_divergence(tiny_llama, prompt, vectors, *against)
            assert rows[kind][column].tolist() == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
        distances = effect_distance(f, vectors, theta0)
        assert rows[kind]["distance"].tolist() == pytest.approx(distances.tolist(), rel=1e-4)
    texts = tm.generate(tiny_llama, prompt, ortho, max_new_tokens=3)["completion"]
    assert rows["family"]["completion"].tolist() == texts.tolist()
    assert rows["random"]["completion"].isna().all()


def test_a_family_for_the_page_is_both_its_parts(tiny_llama, f, theta0, ortho):
    told = []
    options = {"max_new_tokens": 2}
    part = report.collect_family(
        tiny_llama, f, ortho, theta0, sizes=(2, 9), **options, on_batch=lambda *n: told.append(n)
    )
    own = {"rtol": 1e-3, "atol": 1e-5}
    assert_frame_equal(part.table, family(tiny_llama, f, ortho, theta0, **options), **own)
    sums = composition(tiny_llama, f, ortho, theta0, [2], **options)
    assert_frame_equal(part.composition, sums, **own)
    # 14 rows of the family, and four of each of four pairs.
    assert told == [(14, 30), (30, 30)]


def test_baselines_are_no_vector_and_random_ones_of_the_same_norms(tiny_llama, theta0, ortho):
    baselines = kl_baselines(tiny_llama, PROMPTS[0], ortho, theta0)
    assert {name: len(kl) for name, kl in baselines.items()} == {
        "unsteered": 1, "random vectors of the same norms": 4,
    }  # fmt: skip
    nothing = torch.zeros(1, 32)
    expected = kl_divergence(tiny_llama, PROMPTS[0], nothing, theta0, layer=1)
    torch.testing.assert_close(baselines["unsteered"], expected)
    # A plain tensor belongs where the vectors do.
    torch.testing.assert_close(
        kl_divergence(tiny_llama, PROMPTS[0], ortho, theta0.vectors[0]),
        kl_divergence(tiny_llama, PROMPTS[0], ortho, theta0),
    )
    again = kl_baselines(tiny_llama, PROMPTS[0], ortho, theta0)
    other = kl_baselines(tiny_llama, PROMPTS[0], ortho, theta0, seed=1)
    name = "random vectors of the same norms"
    assert torch.equal(again[name], baselines[name])
    assert not torch.equal(other[name], baselines[name])
    figure = tm.plots.kl_curve(
        kl_divergence(tiny_llama, PROMPTS[0], ortho, theta0), ortho, baselines=baselines
    )
    assert {"unsteered", name} <= {trace.name for trace in figure.data}


def test_wrong_places_and_counts_are_named(tiny_llama, f, theta0, ortho):
    elsewhere = tm.SteeringVectors.from_tensor(torch.ones(32), source_layer=2)
    for arguments, message in (
        ((ortho, ortho), "reference: 4 vectors, expected exactly one"),
        ((elsewhere, theta0), "vectors: found at layer 2"),
        ((ortho, elsewhere), "reference: found at layer 2"),
        ((ortho[:0], theta0), "without vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            family(tiny_llama, f, *arguments)
        with pytest.raises(ValueError, match=message):
            effect_distance(f, *arguments)


def test_joined_parts_are_the_family(f, theta0, ortho, tmp_path):
    first = tm.melbo_ortho(f, theta0, 1, steps=6)
    rest = list(tm.iter_melbo_ortho(f, theta0, 3, previous=first, steps=6))
    joined = tm.join_family([first, *rest])
    assert torch.equal(joined.vectors, ortho.vectors)
    assert joined.table().equals(ortho.table())
    assert joined.story["hyperparameters"] == ortho.story["hyperparameters"]
    tm.concatenate([joined])  # still a library like any other
    joined.save(tmp_path / "family.safetensors")
    loaded = tm.SteeringVectors.load(tmp_path / "family.safetensors")
    assert torch.equal(tm.join_family([loaded[:2], loaded[2:]]).vectors, ortho.vectors)


def test_parts_of_other_families_do_not_join(f, theta0, ortho):
    other = tm.melbo_ortho(f, theta0, 1, steps=5)
    for parts, message in (
        ([], "parts: none given"),
        ([ortho, ortho], r"parts\[1\]: holds vectors \[0, 1, 2\]..., but 4 comes next"),
        ([ortho[:1], other], r"parts\[1\]: found with steps"),
        ([theta0], r"parts\[0\]: not of melbo_ortho"),
    ):
        with pytest.raises(ValueError, match=message):
            tm.join_family(parts)


def test_distance_curve_shows_the_level_without_a_vector(ortho):
    figure = tm.plots.distance_curve(ortho, unsteered=5.0, window=2)
    points, line, level = figure.data
    assert list(points.y) == pytest.approx(ortho.columns["distance"].tolist())
    assert list(line.y)[1] == pytest.approx(sum(points.y[:2]) / 2)
    assert set(level.y) == {5.0}
    with pytest.raises(ValueError, match="has no distances"):
        tm.plots.distance_curve(2.0 * ortho)


def test_the_history_of_a_family_is_a_distance(ortho):
    figure = tm.plots.objective_history(ortho)
    assert figure.layout.yaxis.title.text == "distance |z − z₀| (residual-stream units)"
    assert figure.layout.xaxis.title.text == "gradient evaluations"
    assert figure.data[0].x[0] == 1
