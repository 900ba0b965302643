"""The documentation builds without a broken link, and leaves no public name out."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tl_melbo as tm
from tl_melbo import course

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_every_public_name_has_a_page(site):
    packages = [tm, tm.adapters, tm.analysis, course, tm.engines, tm.evaluation, tm.judges]
    packages += [tm.plots, tm.report]
    modules = {package.__name__.rpartition(".")[2] for package in packages}
    for package in packages:
        folder = package.__name__.rpartition(".")[2]
        listed = (site / "reference" / f"{folder}.html").read_text(encoding="utf-8")
        names = {*package.__all__} - modules
        assert len(names) >= 3
        for name in names:
            assert f'href="{folder}/{name}.html"' in listed, name
            page = (site / "reference" / folder / f"{name}.html").read_text(encoding="utf-8")
            assert f'id="{package.__name__}.{name}"' in page, name
            signatures = re.findall(r'<div class="doc-signature.*?</div>', page, re.DOTALL)
            shown = re.sub(r"<[^>]+>", "", "".join(signatures))
            assert not re.search(r"\b_[a-z]\w*\s*[:=]", shown), f"{name}: private fields"
    for name in ("save", "load", "to_repeng_gguf", "push_to_hub", "table"):
        page = (site / "reference" / "tl_melbo" / "SteeringVectors.html").read_text("utf-8")
        assert f'id="tl_melbo.SteeringVectors.{name}"' in page


@pytest.mark.slow
def test_notebooks_are_pages_with_their_outputs_and_formulas(site):
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        for picture in re.findall(r'<img[^>]* src="([^"]+)"', page):
            assert picture.startswith("data:") or (site / "notebooks" / picture).exists()
        assert "arithmatex" not in page
        assert 'alt="png"' not in page
        assert "&lt;div" not in page
    assert "<math" in (site / "theory.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(https?:[^"]*)', text
        )
        assert fetched == [], page.name


def test_the_table_of_presets_is_true():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip(' `"'): cells for cells in map(split, text.splitlines()) if len(cells) == 9
    }
    for name, preset in tm.PRESETS.items():
        cells, search = rows[name], preset.search
        positions = "all" if search["positions"] == slice(None) else "last three"
        assert float(cells[4]) == search["radius"]
        assert cells[5].strip() == f"{search['p']}, {search['q']}"
        assert cells[6].strip() == positions
        assert (
            cells[7].strip().removesuffix(" (ours)") == f"{search['n_vectors']}, {search['steps']}"
        )


def split(line):
    return line.split("|")


def test_the_code_runs_as_printed(tiny_llama, tmp_path, monkeypatch):
    """With a tiny model instead, and settings that fit it."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    first = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    first = first.replace("source_layer=8, target_layer=16", "source_layer=1, target_layer=4")
    monkeypatch.setattr(tm, "load_model", lambda: tiny_llama)
    names = {}
    exec(compile(first, "index.md", "exec"), names)
    assert len(names["found"]) == 8


@pytest.mark.slow
def test_the_code_about_trust_runs_as_printed(tiny_llama, tmp_path, monkeypatch, capsys, by_words):
    """With a tiny model, fewer vectors, and room for a whole behaviour in its small vocabulary."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    first, sampled, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    first = first.replace("source_layer=8, target_layer=16", "source_layer=1, target_layer=4")
    monkeypatch.setattr(tm, "load_model", lambda: tiny_llama)
    for long, short in (("n_vectors=8", "n_vectors=2"), ("(f, 8,", "(f, 2,")):
        assert long in first
        first = first.replace(long, short)
    names = {}
    exec(compile(first, "trust.md", "exec"), names)
    assert "specificity" in capsys.readouterr().out
    exec(compile(sampled.replace("30", "3"), "trust.md", "exec"), names)
    assert {*names["rates"]["steering"]} == {"unsteered", "random", "vector"}
    planted = SimpleNamespace(model=tiny_llama, backdoors=tm.evaluation.BACKDOORS)
    monkeypatch.setattr(tm.evaluation, "load_planted", lambda: planted)
    second = second.replace("source_layer=7, target_layer=24", "source_layer=1, target_layer=4")
    second = second.replace("n_vectors=100", "n_vectors=2")
    second = second.replace(
        "planted.backdoors, clean", "planted.backdoors, clean, max_new_tokens=32"
    )
    exec(compile(second, "trust.md", "exec"), names)
    assert "exact" in capsys.readouterr().out


@pytest.mark.slow
def test_the_code_about_judges_runs_as_printed(tiny_llama, monkeypatch):
    """With a tiny model, a judge that needs no server, and one prompt."""
    go = pytest.importorskip("plotly.graph_objects")
    text = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    asked, counted, compared, _, _, mixed = re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    class Polite:
        calls = tokens = 0

        def __call__(self, question):
            return "T"

    shown = []
    monkeypatch.setattr(tm.judges, "openai_compatible", lambda *_, **options: Polite())
    monkeypatch.setattr(go.Figure, "show", lambda figure: shown.append(figure))
    counted, n_lists = re.subn(r"prompts = \[.*\]", 'prompts = ["Hi!"]', counted)
    assert n_lists == 1
    counted = counted.replace('text.count("?")\n', 'text.count("?"), max_new_tokens=5\n')
    compared = compared.replace("n_samples=4)", "n_samples=4, max_new_tokens=5)")
    found = tm.SteeringVectors.from_tensor(torch.eye(32)[:4], source_layer=2)
    names = {"model": tiny_llama, "found": found}
    for code in (asked, counted, compared):
        exec(compile(code, "judges.md", "exec"), names)
    assert [len(figure.data) for figure in shown] == [2, 2]
    assert names["compared"].table["tie"].tolist() == [5, 5]
    mixed = mixed.replace("chat=True)", "chat=True, source_layer=1, target_layer=4)")
    mixed = mixed.replace("max_new_tokens=40", "max_new_tokens=5, n_samples=2")
    mixed = mixed.replace("tm.melbo(f, 16,", "tm.melbo(f, 2,")
    exec(compile(mixed, "judges.md", "exec"), names)
    assert len(names["mixed"].coefficients) == 3
    assert len(names["response"].negative_scale()) == 3
