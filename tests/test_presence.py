"""The presence scan: planted directions are found, noise is not, statistics are scipy's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import tl_melbo as tm
from tl_melbo.analysis import presence, presence_statistics
from tl_melbo.analysis._presence import benjamini_hochberg

CODE, PROSE = ["def f(x): return x", "for i in range(3):"], ["Once upon a time there was a king."]


def random_frame(n_vectors, d_model, generator):
    normal = torch.randn(d_model, n_vectors, generator=generator)
    return torch.linalg.qr(normal).Q.T


def test_finds_a_planted_direction():
    generator = torch.Generator().manual_seed(0)
    theta = random_frame(6, 64, generator)
    texts, control = torch.randn(2, 80, 64, generator=generator)
    texts = texts + 2.0 * theta[4]
    frame = presence_statistics(texts, control, 5.0 * theta)
    assert frame.columns.tolist() == [
        "index", "mean_projection", "mean_projection_control", "auroc", "p_value", "p_adjusted",
    ]  # fmt: skip
    assert (frame["p_adjusted"] < 0.05).tolist() == [i == 4 for i in range(6)]
    assert frame["auroc"][4] > 0.8
    assert frame["mean_projection"][4] == pytest.approx(2.0, abs=0.4)
    assert frame["mean_projection_control"].abs().max() < 0.4
    turned = presence_statistics(texts, control, -theta)
    assert turned["auroc"][4] == pytest.approx(1 - frame["auroc"][4])
    assert turned["p_value"][4] == frame["p_value"][4]


def test_reports_noise_as_noise():
    """Over 200 trials at most about one in twenty reports anything: 5% and two standard errors."""
    n_trials, n_reporting, p_values = 200, 0, []
    for trial in range(n_trials):
        generator = torch.Generator().manual_seed(trial)
        texts, control = torch.randn(2, 40, 24, generator=generator)
        theta = random_frame(5, 24, generator)
        frame = presence_statistics(texts, control, theta, n_frames=100, seed=1000 + trial)
        n_reporting += bool((frame["p_adjusted"] < 0.05).any())
        p_values += frame["p_value"].tolist()
    assert n_reporting / n_trials <= 0.08
    # Neither too many small p-values nor, which would hide what is there, too few.
    assert stats.kstest(p_values, "uniform").statistic < 0.06


def test_auroc_and_means_are_those_of_scipy():
    generator = torch.Generator().manual_seed(0)
    # Whole numbers on the axes, so that there are many ties.
    texts = torch.randint(0, 4, (13, 8), generator=generator).float()
    control = torch.randint(0, 5, (7, 8), generator=generator).float()
    frame = presence_statistics(texts, control, torch.eye(8)[:5], n_frames=3)
    for i in range(5):
        result = stats.mannwhitneyu(texts[:, i].double(), control[:, i].double())
        assert frame["auroc"][i] == pytest.approx(result.statistic / (13 * 7), abs=1e-12)
    np.testing.assert_allclose(frame["mean_projection"], texts.mean(0)[:5], rtol=1e-6)
    np.testing.assert_allclose(frame["mean_projection_control"], control.mean(0)[:5], rtol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_adjusted_p_values_are_those_of_scipy(p_values):
    ours = benjamini_hochberg(torch.tensor(p_values, dtype=torch.float64))
    np.testing.assert_allclose(ours, stats.false_discovery_control(p_values), rtol=1e-12)


def test_the_null_follows_the_seed_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    texts, control, theta = torch.randn(3, 9, 8, generator=generator)
    state = torch.random.get_rng_state()

    def p_values(seed):
        return presence_statistics(texts, control, theta, n_frames=20, seed=seed)["p_value"]

    assert p_values(3).equals(p_values(3))
    assert not p_values(3).equals(p_values(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert p_values(3).between(1 / (1 + 20 * 9), 1).all()


def test_scans_the_residual_stream_of_all_but_the_first_token(every_tiny, unchanged):
    unchanged(every_tiny)
    found = tm.SteeringVectors.from_tensor(torch.eye(32)[:4], source_layer=2)
    frame = presence(every_tiny, found[1:], CODE, PROSE, n_frames=10)
    rows = []
    for text in CODE:
        rows.append(tm.ActivationMap.from_prompts(every_tiny, text, 2, 3).x[0, 1:])
    expected = torch.cat(rows)[:, 1:4].mean(0)
    assert frame["index"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(frame["mean_projection"], expected, rtol=1e-4)
    last = presence(every_tiny, found, CODE, PROSE[0], n_frames=10, positions=slice(-1, None))
    expected = torch.stack([row[-1, :4] for row in rows]).mean(0)
    np.testing.assert_allclose(last["mean_projection"], expected, rtol=1e-4)


def test_a_positive_control_is_found_and_changes_no_other_row():
    generator = torch.Generator().manual_seed(0)
    theta = random_frame(6, 64, generator)
    texts, control = torch.randn(2, 80, 64, generator=generator)
    used = torch.randn(64, generator=generator)
    texts = texts + 2.0 * used / used.norm()
    alone = presence_statistics(texts, control, theta)
    both = presence_statistics(texts, control, theta, known_direction=3.0 * used)
    assert both["kind"].tolist() == ["vector"] * 6 + ["control"]
    assert both[:6].drop(columns="kind").equals(alone)
    last = both.iloc[6]
    assert (last["index"], last["p_adjusted"]) == (-1, last["p_value"])
    assert last["auroc"] > 0.8
    assert last["p_value"] < 0.05
    with pytest.raises(ValueError, match="known_direction: vectors \\[0\\] are zero"):
        presence_statistics(texts, control, theta, known_direction=torch.zeros(64))


def test_the_control_is_the_difference_of_means_of_other_texts(tiny_llama):
    found = tm.SteeringVectors.from_tensor(torch.eye(32)[:2], source_layer=2)
    others = ["while True: pass", "import os"], "The sea was calm."
    frame = presence(tiny_llama, found, CODE, PROSE, n_frames=10, other_texts=others)

    def rows(texts):
        maps = [tm.ActivationMap.from_prompts(tiny_llama, text, 2, 3) for text in texts]
        return torch.cat([f.x[0, 1:] for f in maps])

    known = rows(others[0]).mean(0) - rows([others[1]]).mean(0)
    expected = (rows(CODE) @ known / known.norm()).mean()
    assert frame["mean_projection"].iloc[-1] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other_texts": (CODE[0], "a b")}, r"other_texts\[0\]: holds 'def f"),
        ({"other_texts": ("a b", [])}, r"other_texts\[1\]: none given"),
        ({"texts": []}, "texts: none given"),
        ({"texts": ["a b", " "]}, r"texts\[1\]=' ': a text needs"),
        ({"control_texts": ""}, r"control_texts\[0\]=''"),
        ({"control_texts": [*PROSE, "a b"], "positions": slice(4, None)}, r"s\[1\]='a b': . token"),
        ({"positions": slice(0, 9, 0)}, "step cannot be 0"),
        ({"vectors": torch.empty(0, 32)}, "without vectors"),
        ({"vectors": torch.zeros(2, 32)}, r"vectors \[0, 1\] are zero"),
        ({"vectors": torch.ones(1, 31)}, "31 wide"),
        ({"layer": None}, "layer: not given"),
        ({"layer": 9}, "layer=9"),
        ({"n_frames": 0}, "n_frames=0"),
    ],
)
def test_bad_arguments(tiny_llama, change, message):
    given = {"vectors": torch.eye(32)[:2], "texts": CODE, "control_texts": PROSE, "layer": 2}
    with pytest.raises(ValueError, match=message):
        presence(tiny_llama, **{**given, **change})


@pytest.mark.parametrize(
    ("residuals", "message"),
    [
        (torch.empty(0, 4), "residuals: no tokens"),
        (torch.full((2, 4), torch.nan), r"residuals: tokens \[0, 1\] hold values that are not"),
        (torch.ones(2, 5), "residuals: 5 wide, but each vector has d_model=4"),
    ],
)
def test_bad_residuals(residuals, message):
    with pytest.raises(ValueError, match=message):
        presence_statistics(residuals, torch.ones(3, residuals.shape[1]), torch.eye(4))
