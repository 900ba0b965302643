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
    effect_by_layer,
    kl_curve,
    mechanism,
    moving_average,
    norm_curve,
    presence_points,
    scale_curves,
    token_divergence,
    token_presence,
    top_tokens,
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


def family_frame() -> pd.DataFrame:
    kinds = ["unsteered", "reference", *["family"] * 2, *["rescaled"] * 2, *["random"] * 2]
    return pd.DataFrame(
        {
            "kind": kinds,
            "index": [-1, -1, 3, 4, 3, 4, 3, 4],
            "norm": [0.0, 12.0, 5.0, 6.0, 12.0, 12.0, 5.0, 6.0],
            "kl_to_reference": [3.0, 0.0, 0.5, 1.5, 1.0, 1.0, 2.0, 2.5],
            "completion": ["no", "yes", "<b>", None, None, None, None, None],
        }
    )


def test_kl_curve_takes_the_frame_of_a_family() -> None:
    drawn = kl_curve(family_frame(), window=2)
    by_hand = kl_curve(
        torch.tensor([0.5, 1.5]),
        window=2,
        baselines={
            "unsteered": torch.tensor(3.0),
            "random vectors of the same norms": torch.tensor([2.0, 2.5]),
            "the family at norm 12": torch.tensor([1.0, 1.0]),
        },
    )
    assert [trace.name for trace in drawn.data] == [trace.name for trace in by_hand.data]
    for one, other in zip(drawn.data, by_hand.data, strict=True):
        np.testing.assert_allclose(one.y, other.y)
    assert list(drawn.data[0].x) == [3, 4]
    assert drawn.data[0].customdata[0] == "vector 3<br>KL 0.5<br>norm 5<br>&lt;b&gt;"
    with pytest.raises(ValueError, match="kl: no row is of the kind 'family'"):
        kl_curve(family_frame()[:2])
    with pytest.raises(ValueError, match="kl: lacks the columns"):
        kl_curve(pd.DataFrame({"a": [1]}))


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
        for combination, scaling in (
            ("mean", "raw"),
            *([("mean", "reference norm")] if reference else []),
            ("mean", "mean norm"),
            ("sum", "raw"),
        )
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
    scanned = scanned.assign(p_adjusted=[0.002, 0.9])
    noise, found = presence_points(scanned).data
    assert (list(noise.x), list(found.x)) == ([1], [0])
    assert (noise.name, found.name) == ("n.s. (1)", "adjusted p < 0.05 (1)")
    assert list(found.customdata[0]) == [1.0, 0.0, 0.001, 0.002]
    row = scanned.assign(index=-1, auroc=0.7, kind="control")[:1]
    both = pd.concat([scanned.assign(kind="vector"), row], ignore_index=True)
    *rest, star = presence_points(both).data
    assert [list(trace.x) for trace in rest] == [[1], [0]]
    assert (list(star.x), list(star.y), star.marker.symbol) == ([-1], [0.7], "star")
    assert star.name == "positive control (AUROC 0.70, p 0.001)"
    assert presence_points(both.assign(p_adjusted=0.5)).data[-1].marker.symbol == "star-open"


def test_transfer_heatmap_has_a_row_a_prompt() -> None:
    frame = pd.DataFrame({"prompt": ["a", "a", "b", "b"], "vector": [0, 1] * 2, "kl": range(4)})
    (heatmap,) = transfer_heatmap(frame.assign(completion="<i>", unsteered_completion="u")).data
    np.testing.assert_array_equal(heatmap.z, [[0, 1], [2, 3]])
    assert heatmap.customdata.shape == (2, 2)
    assert "&lt;i&gt;" in heatmap.customdata[1, 1]


@pytest.mark.parametrize(
    "draw",
    [
        composition_curves, scale_curves, presence_points, transfer_heatmap, top_tokens, mechanism,
        effect_by_layer, token_divergence,
    ],
)  # fmt: skip
def test_frames_of_something_else_are_refused(draw) -> None:
    with pytest.raises(ValueError, match="lacks the columns"):
        draw(pd.DataFrame({"a": [1]}))


def test_token_presence_is_centred_offline_and_safe(tiny_llama, unchanged, monkeypatch) -> None:
    unchanged(tiny_llama)

    def refuse(*args, **kwargs):
        raise AssertionError("asked the internet")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    theta, text = torch.arange(32.0), "def f(x): </script><b>"
    shown = token_presence(tiny_llama, theta, text, layer=2)
    page = shown._repr_html_()
    assert page == str(shown)
    assert "unpkg.com" not in page
    assert page.count("</script>") == 1
    # Where scripts do not run there is plain text, and none of it is markup.
    static = page.partition("<script")[0]
    assert "&lt;/script&gt;&lt;b&gt;" in re.sub(r"<[^>]*>", "", static)
    data = page.rpartition("CircuitsVis.render(")[2].rpartition("</script>")[0]
    assert "<" not in data
    in_script = json.loads(re.search(r'"values": ?(\[.*?\])', data)[1])

    def projections(some: str) -> torch.Tensor:
        residual = tm.ActivationMap.from_prompts(tiny_llama, some, 2, 3).x[0]
        return residual[1:] @ theta / theta.norm()

    prose = torch.cat([projections(passage) for passage in tm.evaluation.PASSAGES])
    expected = (projections(text) - prose.mean()) / prose.std()
    values = [float(value) for value in re.findall(r'title="([^ "]*) sd"', static)]
    np.testing.assert_allclose(in_script, [0.0, *expected.tolist()], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(values, [0.0, *expected.tolist()], atol=0.006)
    # Red is along the vector, blue against it, white the first token.
    colours = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\);color", static)
    assert colours[0] == ("255", "255", "255")
    signs = [int(red) > int(blue) for red, _, blue in colours[1:]]
    assert signs == [value > 0 for value in expected.tolist()]
    assert "sd: along" in page


def test_token_presence_refuses(tiny_llama) -> None:
    with pytest.raises(ValueError, match="vector: 2 vectors, expected exactly one"):
        token_presence(tiny_llama, torch.ones(2, 32), "a b", layer=2)
    with pytest.raises(ValueError, match="layer: not given"):
        token_presence(tiny_llama, torch.ones(32), "a b")
    with pytest.raises(ValueError, match="text"):
        token_presence(tiny_llama, torch.ones(32), "", layer=2)


def test_token_divergence_shows_both_models_and_is_safe() -> None:
    top = (("<b>", 0.9), (" a", 0.1))
    frame = pd.DataFrame(
        {
            "vector": 4, "position": [0, 1, 0], "token": ["<i>", " am", "x"], "kl": [2.0, 0.0, 9.0],
            "log_prob": -1.0, "unsteered_log_prob": -3.0, "top": [top] * 3,
            "unsteered_top": [top] * 3,
        }
    )  # fmt: skip
    page = str(token_divergence(frame, 4))
    # The first completion alone: the largest KL there is 2.
    assert re.sub(r"<[^>]*>", "", page).startswith("&lt;i&gt; am")
    assert page.count("title=") == 2
    assert "<b>" not in page
    assert "KL 2 nats\nlog-prob -1.00, unsteered -3.00\nsteered: " in page
    assert "&#x27;&lt;b&gt;&#x27; 90%, &#x27; a&#x27; 10%" in page
    assert "background:rgb(255,255,255);color:black" in page
    with pytest.raises(ValueError, match=r"vector=1: the frame has \[4\]"):
        token_divergence(frame, 1)


def test_top_tokens_are_drawn_from_both_ends() -> None:
    frame = pd.DataFrame(
        {
            "vector": [7, 7, 7, 8], "direction": ["promoted", "promoted", "suppressed", "promoted"],
            "rank": [1, 2, 1, 1], "token": [" a", "<b>", "c", "d"],
            "log_prob_change": [3.0, 1.0, -2.0, 4.0], "probability": 0.5,
            "unsteered_probability": 0.1,
        }
    )  # fmt: skip
    figure = top_tokens(frame)
    (heatmap,) = figure.data
    assert heatmap.text.tolist() == [["·a", "&lt;b&gt;", "", "c"], ["d", "", "", ""]]
    np.testing.assert_array_equal(heatmap.z[0], [3.0, 1.0, np.nan, -2.0])
    assert (heatmap.zmin, heatmap.zmax) == (-4.0, 4.0)
    assert "vector 7: ' a', '<b>'" in figure.layout.meta["alt"]
    layers = frame.assign(layer=[3, 3, 3, 4])
    assert list(top_tokens(layers, 8).data[0].y) == ["4"]
    assert list(top_tokens(layers).data[0].y) == ["3"]


def test_mechanism_has_a_column_a_head_and_one_for_mlps() -> None:
    rows = [("all", 8, -1, 1.0), ("direct", 10, -1, 0.1)]
    rows += [("head", layer, head, 0.1 * head) for layer in (9, 10) for head in (0, 1)]
    rows += [("mlp", 9, -1, 0.5), ("mlp", 10, -1, -0.2)]
    frame = pd.DataFrame(rows, columns=["component", "layer", "head", "share"])
    figure = mechanism(frame.assign(vector=2, kl=1.0))
    (heatmap,) = figure.data
    np.testing.assert_allclose(heatmap.z, [[0, 0.1, np.nan, 0.5], [0, 0.1, np.nan, -0.2]])
    assert "layer 9 MLP 0.5" in figure.layout.meta["alt"]
    assert "direct path 0.1" in figure.layout.title.text


@pytest.mark.parametrize("draw", ["mechanism", "top_tokens"])
def test_a_long_title_gets_lines_and_the_figure_their_height(draw) -> None:
    rows = [("all", 8, -1), ("direct", 10, -1), ("head", 9, 0), ("mlp", 10, -1)]
    parts = pd.DataFrame(rows, columns=["component", "layer", "head"])
    words = {"direction": "promoted", "rank": 1, "token": " a", "log_prob_change": 1.0}
    frame = parts.assign(vector=2, share=0.5, kl=1.0, **words, probability=0.1,
                         unsteered_probability=0.1)  # fmt: skip
    plot = {"mechanism": mechanism, "top_tokens": top_tokens}[draw]
    figure, short = plot(frame), plot(frame, title="Short")
    lines = figure.layout.title.text.split("<br>")
    # In DejaVu Sans, which is wide, a letter of 18 pixels takes about 10 of them.
    assert max(map(len, lines)) <= figure.layout.width / 10
    assert len(lines) > 1
    more = figure.layout.height - short.layout.height
    assert more == figure.layout.margin.t - short.layout.margin.t > 0
    assert short.layout.title.text == "Short"
    assert plot(frame, title="<b>" + "long " * 40 + "</b>").layout.title.text.startswith("<b>")


def test_effects_by_layer_are_a_line_a_vector() -> None:
    frame = pd.DataFrame(
        {
            "vectors": ["MELBO"] * 4 + ["random"] * 2, "vector": [0, 0, 1, 1, 0, 0], "norm": 2.0,
            "layer": [1, 2] * 3, "effect": [2.0, 8.0, 2.0, 9.0, 2.0, 3.0],
        }
    )  # fmt: skip
    figure = effect_by_layer(frame)
    found, random = figure.data
    np.testing.assert_array_equal(found.y, [2.0, 8.0, np.nan, 2.0, 9.0, np.nan])
    np.testing.assert_array_equal(random.y, [2.0, 3.0, np.nan])
    assert figure.layout.title.text == "Effect size by layer: MELBO vs random, ‖θ‖ = 2"
    assert figure.layout.yaxis.type == "log"
