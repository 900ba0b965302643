"""The method that the documentation writes, outside the package: everything else takes it."""

import re
from pathlib import Path

import pytest
import torch

import tl_melbo as tm

PAGE = Path(__file__).parents[1] / "docs" / "add-a-method.md"


@pytest.fixture(scope="module")
def mean_difference():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {"__name__": "outside"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["mean_difference"]


@pytest.fixture
def maps(tiny_llama):
    return [
        tm.ActivationMap.from_prompts(tiny_llama, prompts, 1, 4)
        for prompts in (["Write a poem.", "Sing a song."], ["Add one and two.", "Count to ten."])
    ]


def test_it_finds_what_it_says(mean_difference, maps):
    f, g = maps
    found = mean_difference(f, other=g, radius=3.0)
    expected = f.x[:, -1].mean(0) - g.x[:, -1].mean(0)
    torch.testing.assert_close(found.vectors[0], 3.0 * expected / expected.norm())
    assert found.table()["distance"].tolist() == pytest.approx([float(expected.norm())])
    (part,) = mean_difference.parts(f, other=g, radius=3.0)
    assert torch.equal(part.vectors, found.vectors)
    assert mean_difference.parts(f, other=g).story["method"] == "mean_difference"


def test_its_arguments_are_checked(mean_difference, maps):
    with pytest.raises(ValueError, match="other: not given"):
        mean_difference(maps[0])
    with pytest.raises(TypeError, match="radius"):
        mean_difference(maps[0], other=maps[1], radius="long")
    with pytest.raises(TypeError, match="did you mean 'radius'"):
        mean_difference(maps[0], other=maps[1], radios=1.0)


def test_a_run_keeps_it_and_refuses_another_search(mean_difference, maps, tmp_path):
    f, g = maps
    run = tm.Run(tmp_path / "run")
    kept = run.keep(mean_difference, f, 1, other=g)
    again = run.keep(mean_difference, f, 1, other=g)
    assert torch.equal(kept.vectors, again.vectors)
    assert torch.equal(
        tm.SteeringVectors.load(run.folder / "vectors.safetensors").vectors, kept.vectors
    )
    with pytest.raises(tm.errors.DifferentSearch, match=r"radius=12\.0") as caught:
        run.keep(mean_difference, f, 1, other=g, radius=2.0)
    assert [difference.name for difference in caught.value.differences] == ["radius"]
    with pytest.raises(ValueError, match="mean_difference"):
        run.keep(tm.random_vectors, f, 2, radius=12.0)


def test_table_plots_page_and_card_show_it(mean_difference, maps, tiny_llama, tmp_path):
    f, g = maps
    found = mean_difference(f, other=g)
    both = tm.concatenate([found, tm.random_vectors(f, 2, 12.0)])
    assert both.table()["distance"].notna().tolist() == [True, False, False]
    assert tm.plots.cosine_heatmap(tm.analysis.cosine_similarity(both)).data
    path = tmp_path / "page.html"
    table = tm.report.write(path, tiny_llama, found, prompts="Hi!", max_new_tokens=4)
    page = path.read_text(encoding="utf-8")
    assert "distance" in table.columns
    assert "from the prompts without the behaviour" in page
    assert "distance of the means" in page.lower()
