"""The documentation builds without a broken link, and leaves no public name out."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tl_melbo as tm

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "analysis": tm.analysis,
    "evaluation": tm.evaluation,
    "judges": tm.judges,
    "plots": tm.plots,
    "report": tm.report,
}


def public(module):
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return [name for name in names if callable(getattr(module, name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_public_name_is_there(site):
    main = (site / "reference" / "tl_melbo.html").read_text(encoding="utf-8")
    for name in {*tm.__all__} - {*MODULES, "adapters"}:
        assert shown(main, "tl_melbo", name, getattr(tm, name)), name
    for method in ("from_prompts", "delta", "position_mask", "path"):
        assert f'id="tl_melbo.ActivationMap.{method}"' in main
    for method in ("save", "load", "to_repeng_gguf", "push_to_hub", "table"):
        assert f'id="tl_melbo.SteeringVectors.{method}"' in main
    for name in {*tm.adapters.__all__} - {*tm.__all__}:
        assert shown(main, "tl_melbo.adapters", name, getattr(tm.adapters, name)), name
    for name, module in MODULES.items():
        page = (site / "reference" / f"{name}.html").read_text(encoding="utf-8")
        assert len(public(module)) >= 4
        for member in public(module):
            assert shown(page, f"tl_melbo.{name}", member, getattr(module, member)), member


def shown(page, place, name, member):
    """By its public name, or, where a module is called so, by the name of its definition."""
    defined = f"{getattr(member, '__module__', '')}.{name}"
    return f'id="{place}.{name}"' in page or f'id="{defined}"' in page


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
    monkeypatch.setattr(tm.evaluation, "load_planted", lambda folder: planted)
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
    asked, counted, compared, _, mixed = re.findall(r"```python\n(.*?)```", text, re.DOTALL)

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
