"""Curves over a family of vectors: their numbers, averages, baselines and what hovering shows."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tl_melbo.plots import (
    composition_curves,
    kl_curve,
    moving_average,
    norm_curve,
    presence_points,
    scale_curves,
    token_presence,
    transfer_heatmap,
)


def library(n_vectors: int) -> tm.SteeringVectors:
    vectors = torch.arange(1.0, n_vectors + 1)[:, None] * torch.ones(1, 4)
    return tm.SteeringVectors(vectors, {"method": "melbo_ortho", "theta0": {"norm": 7.0}})


def test_moving_average_trails() -> None:
    values = np.array([4.0, 0.0, 2.0, 6.0])
    np.testing.assert_allclose(moving_average(values, 2), [4, 2, 1, 4])
    np.testing.assert_allclose(moving_average(values, 50), [4, 2, 2, 3])
    np.testing.assert_array_equal(moving_average(values, 1), values)


def test_kl_curve_shows_points_average_and_what_each_writes() -> None:
    kl = torch.tensor([0.5, 1.5, 0.0])
    text = "<script>alert(1)</script> & " + "word " * 100
    figure = kl_curve(kl, library(5)[2:], completions=["a", text, ""], window=2)
    points, average = figure.data
    assert list(points.x) == [2, 3, 4]
    np.testing.assert_allclose(points.y, kl)
    np.testing.assert_allclose(average.y, [0.5, 1.0, 0.75])
    shown = points.customdata[1]
    assert shown.startswith("vector 3<br>KL 1.5<br>norm 8<br>&lt;script&gt;")
    assert "<script" not in shown
    assert "…" in shown
    assert max(map(len, shown.split("<br>"))) < 90
    assert figure.layout.yaxis.title.text == "KL (nats)"


def test_kl_curve_draws_baselines() -> None:
    baselines = {"unsteered": torch.tensor(3.0), "random": torch.tensor([1.0, 3.0])}
    figure = kl_curve(torch.ones(2), baselines=baselines, window=2)
    _, _, unsteered, points, random = figure.data
    assert (unsteered.name, random.name) == ("unsteered", "random")
    assert list(unsteered.y) == [3.0, 3.0]
    assert list(points.y) == [1.0, 3.0]
    assert list(random.y) == [1.0, 2.0]
    assert unsteered.line.dash == random.line.dash == "dash"


def test_a_logarithmic_axis_keeps_zero_in_sight() -> None:
    figure = kl_curve(torch.tensor([0.0, 1.0]), log_y=True, window=1)
    assert figure.layout.yaxis.type == "log"
    assert min(figure.data[0].y) > 0
    assert "KL 0" in figure.data[0].customdata[0]


def test_norm_curve_shows_the_starting_vector() -> None:
    figure = norm_curve(library(3), window=2)
    points, average, start = figure.data
    np.testing.assert_allclose(points.y, [2, 4, 6])
    np.testing.assert_allclose(average.y, [2, 3, 5])
    assert list(start.y) == [7.0, 7.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": torch.empty(0)}, "kl: no values"),
        ({"kl": torch.tensor([-0.1, 0.0])}, "kl: no values, or negative"),
        ({"kl": torch.tensor([torch.nan, 0.0])}, "not finite"),
        ({"found": library(3)}, "found: 3, but kl holds 2"),
        ({"completions": ["a"]}, "completions: 1, but kl holds 2"),
        ({"window": 0}, "window=0: at least 1"),
        ({"baselines": {"random": torch.ones(3)}}, "baselines\\['random'\\]: 3 values"),
    ],
)
def test_bad_arguments(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        kl_curve(**{"kl": torch.ones(2), **change})


def test_norm_curve_needs_vectors() -> None:
    with pytest.raises(ValueError, match="without vectors"):
        norm_curve(library(3)[:0])


def composed(reference: bool = True) -> pd.DataFrame:
    rows = [
        (2, members, subset, combination, scaling)
        for members, subset in (((0, 1), "first"), ((1, 3), "random"))
        for combination in ("mean", "sum")
        for scaling in ("raw", *(["reference norm"] if reference else []), "mean norm")
    ]
    frame = pd.DataFrame(
        rows, columns=["size", "members", "subset", "combination", "scaling"]
    ).assign(norm=1.0, kl_to_reference=0.5, kl_to_unsteered=2.0, distance=3.0, completion="<b>")
    if not reference:
        frame[["kl_to_reference", "distance"]] = float("nan")
    return frame


def test_composition_draws_each_kind_once() -> None:
    figure = composition_curves(composed())
    assert len(figure.data) == 8
    assert {trace.y[0] for trace in figure.data} == {0.5}
    assert "members [0, 1]" in figure.data[0].customdata[0]
    assert "&lt;b&gt;" in figure.data[0].customdata[0]
    assert composition_curves(composed(), "distance").data[0].y[0] == 3.0
    without = composition_curves(composed(reference=False))
    assert len(without.data) == 6
    assert without.data[0].y[0] == 2.0
    with pytest.raises(ValueError, match="measure='distance': not known without a reference"):
        composition_curves(composed(reference=False), "distance")


def test_scale_curves_shade_where_it_is_changed_and_coherent() -> None:
    swept = pd.DataFrame(
        {
            "vector": [0, 0, 0, 0, 1, 1, 1, 1],
            "scale": [-1.0, 0.0, 1.0, 2.0] * 2,
            "norm": 1.0,
            "kl": [0.1, 0.0, 2.0, 5.0, 0.1, 0.0, 3.0, 5.0],
            "repetition": [0.0, 0.0, 0.1, 0.9] * 2,
            "completion": "text",
        }
    )
    figure = scale_curves(swept)
    windows = {(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect"}
    assert windows == {(0.5, 1.5)}
    medians = [trace for trace in figure.data if trace.name == "median"]
    np.testing.assert_allclose(medians[0].y, [0.1, 0.0, 2.5, 5.0])
    np.testing.assert_allclose(medians[1].y, [0.0, 0.0, 0.1, 0.9])
    # Nothing changes much: nothing is shaded.
    assert not [s for s in scale_curves(swept, changed=9.0).layout.shapes if s.type == "rect"]


def test_presence_points_set_apart_what_is_found() -> None:
    columns = ["index", "mean_projection", "mean_projection_control", "auroc", "p_value"]
    scanned = pd.DataFrame([[0, 1.0, 0.0, 0.9, 0.001], [1, 0.0, 0.0, 0.5, 0.9]], columns=columns)
    noise, found = presence_points(scanned.assign(p_adjusted=[0.002, 0.9])).data
    assert (list(noise.x), list(found.x)) == ([1], [0])
    assert list(found.customdata[0]) == [1.0, 0.0, 0.001, 0.002]


def test_transfer_heatmap_has_a_row_a_prompt() -> None:
    frame = pd.DataFrame({"prompt": ["a", "a", "b", "b"], "vector": [0, 1] * 2, "kl": range(4)})
    (heatmap,) = transfer_heatmap(frame.assign(completion="<i>", unsteered_completion="u")).data
    np.testing.assert_array_equal(heatmap.z, [[0, 1], [2, 3]])
    assert heatmap.customdata.shape == (2, 2)
    assert "&lt;i&gt;" in heatmap.customdata[1, 1]


@pytest.mark.parametrize(
    "draw", [composition_curves, scale_curves, presence_points, transfer_heatmap]
)
def test_frames_of_something_else_are_refused(draw) -> None:
    with pytest.raises(ValueError, match="lacks the columns"):
        draw(pd.DataFrame({"a": [1]}))


def test_token_presence_is_offline_and_safe(tiny_llama, unchanged, monkeypatch) -> None:
    unchanged(tiny_llama)

    def refuse(*args, **kwargs):
        raise AssertionError("asked the internet")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    theta = torch.arange(32.0)
    text = "def f(x): </script><b>"
    shown = token_presence(tiny_llama, theta, text, layer=2)
    page = shown._repr_html_()
    assert page == str(shown)
    assert "unpkg.com" not in page
    assert page.count("</script>") == 1
    # Where scripts do not run there is plain text, and none of it is markup.
    static = page.partition("<script")[0]
    assert "&lt;/script&gt;&lt;b&gt;" in re.sub(r"<[^>]*>", "", static)
    assert static.count("<span") == len(tiny_llama.to_tokens(text)[0])
    data = page.rpartition("CircuitsVis.render(")[2].rpartition("</script>")[0]
    assert "<" not in data
    residual = tm.ActivationMap.from_prompts(tiny_llama, text, 2, 3).x[0]
    projection = residual[1:] @ theta / theta.norm()
    values = json.loads(re.search(r'"values": ?(\[.*?\])', data)[1])
    np.testing.assert_allclose(values, [0.0, *projection.tolist()], rtol=1e-4, atol=1e-5)


def test_token_presence_refuses(tiny_llama) -> None:
    with pytest.raises(ValueError, match="vector: 2 vectors, expected exactly one"):
        token_presence(tiny_llama, torch.ones(2, 32), "a b", layer=2)
    with pytest.raises(ValueError, match="layer: not given"):
        token_presence(tiny_llama, torch.ones(32), "a b")
    with pytest.raises(ValueError, match="text"):
        token_presence(tiny_llama, torch.ones(32), "", layer=2)
