"""What the page holds beside its first table: samples, baselines, tokens, adapters, figures."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from plotly.offline import get_plotlyjs_version
from scipy.stats import binomtest

import tl_melbo as tm
from tests.conftest import PROMPT
from tests.page.conftest import PROMPTS
from tests.page.test_report import HOSTILE, data_of
from tl_melbo import report
from tl_melbo.analysis import Behaviours
from tl_melbo.report import _data, _facts
from tl_melbo.report._render import PLOTLY
from tl_melbo.text import printable

pytestmark = pytest.mark.usefixtures("by_words")


def test_negatives_samples_and_scales_are_rows_and_texts(
    tiny_llama: torch.nn.Module, f: tm.ActivationMap, found: tm.SteeringVectors, tmp_path: Path
) -> None:
    completions = report.collect_completions(
        tiny_llama, PROMPTS, found, max_new_tokens=3, scales=[0.5, -0.5], n_samples=2
    )
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, found, completions=completions, activation_map=f)
    data = data_of(path)
    keys = [f"{v}{sign}{p}" for p in ("", "p2") for v in range(5) for sign in ("", "-")]
    assert [row["key"] for row in data["rows"]] == keys
    assert data["scales"] == ["0.5", "1"]
    texts = {key: [printable(text) for text in some] for key, some in _texts_by_key(completions)}
    for row in data["rows"]:
        for scale, places in row["texts"].items():
            at = (PROMPTS[row["prompt"]], row["vector"], row["sign"] * float(scale))
            assert [data["texts"][place] for place in places] == texts[at]
    negative = tm.analysis.kl_divergence(tiny_llama, PROMPTS[0], -found)
    shown = [row["values"]["kl"] for row in data["rows"][1:10:2]]
    assert shown == pytest.approx(negative.tolist(), rel=1e-4)


def _texts_by_key(completions: pd.DataFrame):
    for key, some in completions.groupby(["prompt", "vector", "scale"]):
        yield key, some.sort_values("sample")["completion"].tolist()


def test_random_vectors_stand_beside(
    tiny_llama: torch.nn.Module,
    f: tm.ActivationMap,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, found, completions=completions, activation_map=f)
    random = tm.random_vectors(f, 8, radius=4.0)
    expected = tm.melbo_objective(f.delta(random.vectors, slice(-3, None))).median()
    ratio = float(found.objective[0] / expected)
    assert data_of(path)["rows"][0]["times"] == pytest.approx(ratio, rel=0.05)
    kl = torch.cat([tm.analysis.kl_divergence(tiny_llama, text, random) for text in PROMPTS])
    assert (
        f"Random vectors of this norm: KL {kl.double().quantile(0.5):.2g} nats"
        in path.read_text(encoding="utf-8")
    )
    # Vectors of different norms have no random ones of theirs.
    mixed = tm.concatenate([found[0], 2.0 * found[1]])
    report.write(path, tiny_llama, mixed, prompts=PROMPT, max_new_tokens=2, activation_map=f)
    assert "Random vectors of this norm" not in path.read_text(encoding="utf-8")


def test_the_page_tells_how_to_go_on(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    count = [*found.table()["converged"]].count("no")
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, found, completions=completions)
    told = f"{count} of 5 still gained more than 1% in their last step; --steps 9 raises"
    assert count, "three steps were enough: take fewer"
    assert told in path.read_text(encoding="utf-8")


def test_adapters_get_a_part(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    from tl_melbo.adapters import Adapter

    torch.manual_seed(0)
    adapter = Adapter.from_tensor(torch.randn(2, 1, 32, 2), torch.randn(2, 1, 2, 32), [1, 2])
    texts = pd.DataFrame({"vector": [-1, 0, 1], "prompt": "Hi", "completion": ["a", "b", HOSTILE]})
    path = tmp_path / "page.html"
    report.write(
        path, tiny_llama, found, completions=completions, adapters=adapter, adapter_texts=texts
    )
    tables = data_of(path)["tables"]
    assert [row[0] for row in tables["adapters"]["rows"]] == [0, 1]
    assert tables["adapter-texts"]["rows"][0] == ["unsteered", "Hi", "a"]
    assert tables["adapter-texts"]["rows"][2] == ["1", "Hi", printable(HOSTILE)]
    assert "<h2>Adapters" in path.read_text(encoding="utf-8")


def test_frames_of_tokens_are_checked(
    tiny_llama: torch.nn.Module, found: tm.SteeringVectors, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"vector": [0]})
    with pytest.raises(ValueError, match="token_divergence: lacks the columns"):
        report.write(tmp_path / "p.html", tiny_llama, found, token_divergence=frame)


@pytest.mark.slow
def test_the_plotly_on_the_page_is_that_of_the_figures(
    tiny_llama: torch.nn.Module,
    f: tm.ActivationMap,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    source = PLOTLY.read_text(encoding="utf-8")
    (version,) = re.findall(r"plotly\.js \(cartesian - minified\) v(\d+)\.", source[:200])
    assert version == get_plotlyjs_version().split(".")[0]
    assert hashlib.sha256(PLOTLY.read_bytes()).hexdigest() in PLOTLY.with_name(
        "README.md"
    ).read_text(encoding="utf-8")
    known = {*re.findall(r'moduleType:"trace",name:"(\w+)"', source)}
    path = tmp_path / "page.html"
    ortho = tm.melbo_ortho(f, found[3], 3, steps=4)
    family = report.collect_family(tiny_llama, f, ortho, found[3], sizes=(2,), max_new_tokens=3)
    report.write(
        path, tiny_llama, found, completions=completions, activation_map=f, families=[family]
    )
    page = path.read_text(encoding="utf-8")
    figures = re.findall(
        r'<div class="plot [^>]*><script type="application/json">(.*?)</script>', page
    )
    drawn = {trace["type"] for text in figures for trace in json.loads(text)["data"]}
    assert drawn == {"scatter", "heatmap"}
    assert drawn <= known
    assert len(page) < 2_500_000


def test_cards_tell_tags_and_rates() -> None:
    """As `behaviours` gives them: by vector, sign and prompt, with intervals."""
    found = tm.SteeringVectors.from_tensor(torch.eye(2, 8), source_layer=1)
    rows = [(-1, 0.0), (0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0)]
    texts = pd.DataFrame(rows, columns=["vector", "scale"]).assign(
        prompt="p", completion=["a", "b <i>", "a", "b", "xx"], behaviour=[0, 1, 0, 1, -1],
        filtered_out=[""] * 4 + ["repeats itself"], stance=["", "refuses", "", "refuses", ""],
        baseline=[True, False, True, False, False], perplexity=3.0,
    )  # fmt: skip
    unsteered = texts.iloc[[0] * 7].assign(behaviour=[1] + [0] * 6)
    texts = pd.concat([texts, unsteered], ignore_index=True)
    groups = pd.DataFrame(
        {
            "behaviour": [0, 1], "name": ["≈ baseline", "b <b>"], "prompt": "p",
            "example": ["a", "b"], "stance": ["", "refuses"], "negatives": [[0], []],
        }
    )  # fmt: skip
    rates = pd.DataFrame(
        [(1, 1.0, 1, 6, 8, 0.75, 0.41, 0.93)],
        columns=["vector", "scale", "behaviour", "n", "n_samples", "rate", "low", "high"],
    ).assign(prompt="p")
    grouped: Any = SimpleNamespace(texts=texts, groups=groups, of_vectors=rates)
    kl = {("p", sign): [0.5, float("inf")] for sign in (1, -1)}
    data = _data.rows_data(found, ["p"], texts, grouped, _data.Measured(kl, None, None))
    baseline, card = data["behaviours"]
    assert (baseline["baseline"], baseline["rows"]) == (True, ["0-"])
    assert (card["key"], card["tags"], card["rows"]) == ("b1", {"stance": "refuses"}, ["0", "1"])
    counts = {"n": 6, "n_samples": 8, "rate": 0.75, "low": 0.40928, "high": 0.92852}
    assert card["rates"] == [{"key": "1", **counts}]
    assert (card["unsteered"]["n"], card["unsteered"]["n_samples"]) == (1, 8)
    by_key = {row["key"]: row for row in data["rows"]}
    assert by_key["0-"]["baseline"]
    assert by_key["1-"]["filtered"] == "repeats itself"
    assert by_key["1"]["tags"] == {"stance": "refuses"}
    assert by_key["1"]["values"]["kl"] == "∞"


def test_a_behaviour_of_samples_alone_has_a_card_and_is_counted() -> None:
    found = tm.SteeringVectors.from_tensor(torch.eye(1, 8), source_layer=1)
    rows = [(-1, 0.0, 0, "a", 0), (0, 1.0, 2, "c", 2), (0, 1.0, 0, "b", 1), (0, 1.0, 1, "x", -1)]
    rows.append((-1, 0.0, 1, "c too", 2))
    texts = pd.DataFrame(
        rows, columns=["vector", "scale", "sample", "completion", "behaviour"]
    ).assign(prompt="p", baseline=False, stance="", perplexity=3.0)
    texts["coherent"] = [True, True, True, False, True]
    texts["filtered_out"] = ["", "", "", "repeats itself", ""]
    groups = pd.DataFrame({"behaviour": [0, 1, 2], "name": ["a", "b", "c"], "prompt": "p"})
    grouped = Behaviours(texts, groups.assign(example="a", stance=""), "words")
    kl = {("p", sign): [0.5] for sign in (1, -1)}
    data = _data.rows_data(found, ["p"], texts, grouped, _data.Measured(kl, None, None))
    assert [(card["key"], card["rows"], card["samples"]) for card in data["behaviours"]] == [
        ("b1", ["0"], []),
        ("b2", [], ["0s2"]),
    ]
    assert data["texts"][data["rows"][0]["texts"]["1"][2]] == "c"
    assert data["behaviours"][1]["rates"][0]["n"] == 1
    told = _facts.groups_told(grouped, data, len(found))
    # The row's own completion is coherent: what was filtered out is a sample.
    assert (told["n_distinct"], told["n_incoherent"]) == (2, 0)
    # The unsteered model's one sample shows the second.
    assert [card["unsteered"]["n"] for card in data["behaviours"]] == [0, 1]
    assert data["behaviours"][1]["unsteered"]["n_samples"] == told["n_known"] == 1


def test_random_vectors_are_the_control_and_have_no_cards() -> None:
    found = tm.SteeringVectors.from_tensor(torch.eye(1, 8), source_layer=1)
    rows = [(-1, 0.0, "a", 0), (0, 1.0, "b", 1), (0, -1.0, "b", 1)]
    # Under two random vectors: one text that the library has, too, and one that it has not.
    rows += [(1, 1.0, "b, at random", 1), (1, -1.0, "a", 0), (2, 1.0, "c", 2), (2, -1.0, "a", 0)]
    texts = pd.DataFrame(rows, columns=["vector", "scale", "completion", "behaviour"]).assign(
        prompt="p", baseline=False, coherent=True, stance="", filtered_out="",
        perplexity=[3.0, 5.0, 4.0, 1.0, 3.0, 1.0, 3.0],
    )  # fmt: skip
    groups = pd.DataFrame({"behaviour": [0, 1, 2], "name": ["a", "b", "c"], "prompt": "p"})
    grouped = Behaviours(texts, groups.assign(example="b", stance=""), "words")
    kl = {("p", sign): [0.5] for sign in (1, -1)}
    written = texts[texts["vector"] < 1]
    data = _data.rows_data(found, ["p"], written, grouped, _data.Measured(kl, None, None))
    (card,) = data["behaviours"]
    assert (card["key"], card["rows"]) == ("b1", ["0", "0-"])
    assert (card["random"]["n"], card["random"]["n_samples"]) == (1, 4)
    low, high = binomtest(1, 4).proportion_ci(method="wilson")
    assert card["random"]["low"] == pytest.approx(low, rel=1e-3)
    assert card["random"]["high"] == pytest.approx(high, rel=1e-3)
    assert data["texts"][card["example"]] == "b"
    told = _facts.groups_told(grouped, data, len(found))
    counts = ("n_distinct", "n_texts", "n_random", "n_random_texts", "n_of_random")
    assert [told[name] for name in counts] == [1, 2, 2, 4, 2]
