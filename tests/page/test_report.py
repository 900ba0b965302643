"""The page as a file: whole, self-contained, and safe whatever the model wrote."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tests.conftest import PROMPT
from tests.page.conftest import PROMPTS
from tl_melbo import report
from tl_melbo.text import printable

pytestmark = pytest.mark.usefixtures("by_words")

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202etxt</td></table>&amp;\x00"


def data_of(path: Path) -> dict[str, Any]:
    """What the page's script builds its rows from."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>',
        path.read_text(encoding="utf-8"),
    )
    return json.loads(text)


def with_text(completions: pd.DataFrame, text: str) -> pd.DataFrame:
    return completions.assign(completion=text)


def test_control_characters_become_visible() -> None:
    text = "a\r\nb\tc\rd\x00\x1b[2J\x7f\x9b\u2066e\ud800"
    assert printable(text) == "a\nb\tc␍d␀␛[2J\\x7f\\x9b[U+2066]e\ufffd"


def test_completions_are_those_of_generate(
    tiny_llama: torch.nn.Module, found: tm.SteeringVectors, unchanged
) -> None:
    unchanged(tiny_llama)
    done = []
    frame = report.collect_completions(
        tiny_llama, PROMPTS, found, max_new_tokens=3, batch_size=4,
        on_batch=lambda *count: done.append(count),
    )  # fmt: skip
    assert [there for there, _ in done] == [1, 2, 6, 10, 12, 16, 20, 22]
    assert {wanted for _, wanted in done} == {22}
    assert list(frame.columns) == ["vector", "scale", "prompt", "completion"]
    assert frame["vector"].tolist() == 2 * [-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert frame["scale"].tolist()[:5] == [0, 1, -1, 1, -1]
    expected = tm.generate(tiny_llama, PROMPTS, found, scales=[1.0, -1.0], max_new_tokens=3)
    both = frame.merge(expected, on=["vector", "scale", "prompt"])
    assert len(both) == len(expected)
    assert both["completion_x"].tolist() == both["completion_y"].tolist()
    unsteered = tm.generate(tiny_llama, PROMPTS, chat=True, max_new_tokens=3)
    assert frame[frame["vector"] == -1]["completion"].tolist() == unsteered["completion"].tolist()


def test_a_judge_names_the_behaviours(
    tiny_llama: torch.nn.Module, found: tm.SteeringVectors, completions: pd.DataFrame,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    every = functools.partial(tm.analysis.behaviours, largest_perplexity=math.inf)
    monkeypatch.setattr("tl_melbo.report._page.behaviours", every)
    cooking = completions["completion"].where(completions["vector"] < 0, "Boil the pasta now.")
    report.write(
        tmp_path / "page.html", tiny_llama, found,
        completions=completions.assign(completion=cooking),
        judge=lambda question: "cooks" if "six words" in question else "none of these",
    )  # fmt: skip
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "cooks" in page
    assert "A judge told stances and gave names." in page
    monkeypatch.setattr("tl_melbo.report._page.collect_completions", pytest.fail)
    with pytest.raises(TypeError, match="judge: got a model, expected a function"):
        report.write(tmp_path / "none.html", tiny_llama, found, judge=tiny_llama)
    assert not (tmp_path / "none.html").exists()


def test_everything_is_computed_that_is_not_given(
    tiny_llama: torch.nn.Module, found: tm.SteeringVectors, tmp_path: Path, unchanged
) -> None:
    unchanged(tiny_llama)
    told = []
    table = report.write(
        tmp_path / "page.html", tiny_llama, found, max_new_tokens=2,
        on_batch=lambda *count: told.append(count),
    )  # fmt: skip
    # Texts of two prompts, written and read, what follows each prompt, and the vectors drawn. The
    # same text is read once.
    assert {wanted for _, wanted in told} == {22 + 20 + 22 + 5}
    assert [there for there, _ in told] == sorted(there for there, _ in told)
    assert told[-1] == (69, 69)
    expected = [
        "index", "prompt", "objective", "kl", "behaviour", "completion", "negated_completion",
    ]  # fmt: skip
    assert list(table.columns) == expected
    assert len(table) == len(found) * len(PROMPTS)
    kl = tm.analysis.kl_divergence(tiny_llama, PROMPTS[1], found)
    assert table["kl"].tolist()[5:] == pytest.approx(kl.tolist())
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_page_says_what_it_is(
    tiny_llama: torch.nn.Module,
    f: tm.ActivationMap,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, found, completions=completions, activation_map=f)
    page = path.read_text(encoding="utf-8")
    for words in (*PROMPTS, "tiny-llama", "1 → 4", "orthogonal", "-3:", "versions: torch"):
        assert words in page
    assert page.count('class="plot') == 3
    # The prompts as the model saw them, in its chat template.
    for prompt in PROMPTS:
        assert f"user\n{prompt}" in page


def test_the_page_loads_nothing(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, found, completions=completions)
    page = path.read_text(encoding="utf-8")
    markup = re.sub(r"<(script|style)\b[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(src|href|srcset|action)\s*=\s*[\"'](?!data:|#)", markup)
    assert "connect-src" not in page
    assert "default-src 'none'" in page


def test_text_from_the_model_is_escaped(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.html"
    hostile = with_text(completions, HOSTILE)
    report.write(path, tiny_llama, found, completions=hostile, title=HOSTILE)
    page = path.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert not set("\x00\x1b\u202e") & set(page)
    shown = "&lt;script&gt;alert(1)&lt;/script&gt;␛[31m[U+202E]txt&lt;/td&gt;"
    # The title is shown twice; what many vectors write is there once.
    assert page.count(shown) == 2
    (text,) = data_of(path)["texts"]
    assert text == printable(HOSTILE)


def test_a_story_cannot_inject_either(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    story = {**found.story, "model": HOSTILE[:24], "</dl><script>alert(2)</script>": [HOSTILE[:8]]}
    library = tm.SteeringVectors(found.vectors, story, found.columns, found.history)
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, library, completions=completions)
    assert "<script>alert" not in path.read_text(encoding="utf-8")


def test_a_megabyte_is_cut(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.html"
    long = completions.copy()
    long.loc[0, "completion"] = "x" * 2**20
    report.write(path, tiny_llama, found, completions=long)
    page = path.read_text(encoding="utf-8")
    assert "[cut: 1,048,576 characters in all]" in page
    assert max(len(run) for run in re.findall("x+", page)) < 2**15


def test_vectors_without_a_story_need_a_prompt_and_a_layer(
    tiny_llama: torch.nn.Module, tmp_path: Path
) -> None:
    bare = tm.SteeringVectors.from_tensor(torch.randn(2, 32))
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="prompts: none given"):
        report.write(path, tiny_llama, bare)
    with pytest.raises(ValueError, match="layer"):
        report.write(path, tiny_llama, bare, prompts=PROMPT)
    assert not list(tmp_path.iterdir())
    table = report.write(path, tiny_llama, bare, prompts=PROMPT, layer=2, max_new_tokens=2)
    assert "objective" not in table.columns
    assert "<h2>Search" not in path.read_text(encoding="utf-8")


def test_slices_keep_their_vectors_names(
    tiny_llama: torch.nn.Module, found: tm.SteeringVectors, tmp_path: Path
) -> None:
    table = report.write(tmp_path / "page.html", tiny_llama, found[[4, 2]], max_new_tokens=2)
    assert table["index"].tolist() == [4, 2, 4, 2]


def test_missing_texts_leave_gaps(
    tiny_llama: torch.nn.Module, found: tm.SteeringVectors, tmp_path: Path
) -> None:
    completions = tm.generate(tiny_llama, PROMPT, found[:2], max_new_tokens=2)
    path = tmp_path / "page.html"
    table = report.write(path, tiny_llama, found, completions=completions)
    assert table["completion"].isna().tolist() == [False, False, True, True, True]
    data = data_of(path)
    assert [row["sign"] for row in data["rows"]] == [1] * 5
    assert [len(row["texts"]) for row in data["rows"]] == [1, 1, 0, 0, 0]
    assert "<h2>Unsteered" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (pd.DataFrame({"vector": [0]}), "lacks the columns"),
        (pd.DataFrame(columns=["vector", "scale", "prompt", "completion"]), "is empty"),
        (
            pd.DataFrame({"vector": [5], "scale": 1.0, "prompt": "a", "completion": "b"}),
            r"texts of vectors \[5\]",
        ),
    ],
)
def test_other_completions_are_refused(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    tmp_path: Path,
    completions: pd.DataFrame,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=f"completions: .*{message}"):
        report.write(tmp_path / "page.html", tiny_llama, found, completions=completions)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vector": -1}, "unsteered texts"),
        ({"prompt": "Another one"}, "texts after 'Another one', no prompt of the page"),
        ({"sample": 0}, "a column sample where completions has none"),
    ],
)
def test_a_control_of_something_else_is_refused(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
    changed: dict[str, object],
    message: str,
) -> None:
    steered = completions[completions["vector"] == 0]
    with pytest.raises(ValueError, match=f"random_texts: has {message}"):
        report.write(
            tmp_path / "page.html", tiny_llama, found, completions=completions,
            random_texts=steered.assign(**changed),
        )  # fmt: skip


@pytest.mark.slow
def test_side_effects_get_columns_and_a_figure(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    measured = tm.evaluation.side_effects(
        tiny_llama, found, PROMPTS, unrelated="Bye.", passages="One two three."
    )
    path = tmp_path / "page.html"
    table = report.write(
        path, tiny_llama, found, completions=completions, side_effects=measured
    )  # fmt: skip
    assert table["specificity"].tolist() == 2 * measured["specificity"].tolist()
    assert table["loss_increase"].tolist() == 2 * measured["loss_increase"].tolist()
    assert "<h2>Side effects" in path.read_text(encoding="utf-8")
    # Where no number is finite there is nothing to draw, and the table says so.
    lost = measured.assign(specificity=float("nan"))
    report.write(path, tiny_llama, found, completions=completions, side_effects=lost)
    assert "<h2>Side effects" not in path.read_text(encoding="utf-8")
    for wrong, message in (
        (measured.drop(columns="kl_target"), "lacks the columns"),
        (measured.assign(kl_unrelated="much"), "lacks the columns .*holds no numbers"),
        (measured[:2], "2 rows that are not those of vectors 0 to 4"),
    ):
        with pytest.raises(ValueError, match=f"side_effects: {message}"):
            report.write(tmp_path / "p.html", tiny_llama, found, side_effects=wrong)
    assert not (tmp_path / "p.html").exists()


def test_bad_places_and_libraries_are_refused(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.write(tmp_path / "no" / "p.html", tiny_llama, found, completions=completions)
    with pytest.raises(ValueError, match="found: holds no vectors"):
        report.write(tmp_path / "p.html", tiny_llama, found[:0])


def test_numbers_that_are_not_finite_are_shown(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    objective = found.objective.clone()
    objective[0] = math.nan
    library = tm.SteeringVectors(found.vectors, found.story, {"objective": objective})
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, library, completions=completions)
    rows = data_of(path)["rows"]
    assert rows[0]["values"]["objective"] is None
    assert rows[2]["values"]["objective"] == pytest.approx(float(objective[1]), rel=1e-4)


@pytest.fixture(scope="module")
def family(
    tiny_llama: torch.nn.Module, f: tm.ActivationMap, found: tm.SteeringVectors
) -> report.Family:
    ortho = tm.melbo_ortho(f, found[3], 3, steps=4)
    return report.collect_family(tiny_llama, f, ortho, found[3], sizes=(2, 20), max_new_tokens=3)


def test_a_family_gets_its_part_of_the_page(
    tiny_llama: torch.nn.Module,
    f: tm.ActivationMap,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    family: report.Family,
    tmp_path: Path,
) -> None:
    assert family.number == 3
    assert set(family.composition["size"]) == {2}
    paths = [tmp_path / "without.html", tmp_path / "with.html"]
    for path, families in zip(paths, ([], [family]), strict=True):
        report.write(
            path, tiny_llama, found,
            completions=completions, activation_map=f, families=families,
        )  # fmt: skip
    without, page = (path.read_text(encoding="utf-8") for path in paths)
    assert "MELBO-ortho" not in without
    assert "The family of vector 3" in page
    assert page.count('class="plot') == without.count('class="plot') + 5
    table = data_of(paths[1])["tables"]["family-3-vectors"]
    names = [column["name"] for column in table["columns"]]
    own = family.table[family.table["kind"] == "family"]
    for name in ("distance", "kl_to_reference", "norm"):
        shown = [row[names.index(name)] for row in table["rows"]]
        assert shown == pytest.approx(own[name].tolist(), rel=1e-4)
    # Without the map there are no effects to compare.
    report.write(paths[0], tiny_llama, found, completions=completions, families=[family])
    assert (
        paths[0].read_text(encoding="utf-8").count('class="plot') == page.count('class="plot') - 3
    )


def test_texts_of_a_family_are_escaped(
    tiny_llama: torch.nn.Module,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    family: report.Family,
    tmp_path: Path,
) -> None:
    hostile = report.Family(
        family.reference,
        family.vectors,
        with_text(family.table, HOSTILE),
        with_text(family.composition, HOSTILE),
    )
    path = tmp_path / "page.html"
    report.write(path, tiny_llama, found, completions=completions, families=[hostile])
    page = path.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert not set("\x00\x1b\u202e") & set(page)


@pytest.mark.slow
def test_a_family_of_one_is_a_family(
    tiny_llama: torch.nn.Module,
    f: tm.ActivationMap,
    found: tm.SteeringVectors,
    completions: pd.DataFrame,
    tmp_path: Path,
) -> None:
    ortho = tm.melbo_ortho(f, found[0], 1, steps=3)
    family = report.collect_family(tiny_llama, f, ortho, found[0], max_new_tokens=2)
    assert set(family.composition["size"]) == {1}
    path = tmp_path / "page.html"
    report.write(
        path, tiny_llama, found, completions=completions, activation_map=f, families=[family]
    )
    assert "1 more vector, each" in path.read_text(encoding="utf-8")


def test_what_is_not_known_to_have_converged_is_told_apart(found: tm.SteeringVectors) -> None:
    codes = torch.tensor([0, -1, 1, -1, -1])
    story = {**found.story, "categories": {"converged": ["no", "yes"]}}
    library = tm.SteeringVectors(found.vectors, story, {**found.columns, "converged": codes})
    told = "1 of 2 still gained more than 1% in their last step; of 3 more it is not known; "
    assert report.not_converged(library).startswith(f"{told}--steps 9 raises")
    assert not report.not_converged(tm.SteeringVectors(found.vectors, story))
