"""The README's code runs as printed, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

import tl_melbo as tm
from benchmarks import quoted

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FOR_CONTRIBUTORS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")


@pytest.mark.parametrize("size", ["tiny", pytest.param("bundled", marks=pytest.mark.slow)])
def test_the_code_runs_as_printed(size, request, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks)
    if size == "tiny":
        layers = "source_layer=8, target_layer=16"
        assert layers in code
        code = code.replace(layers, "source_layer=1, target_layer=4")
    model = request.getfixturevalue("tiny_llama" if size == "tiny" else "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tm, "load_model", lambda: model)
    exec(compile(code, str(README), "exec"), {})
    assert len(tm.SteeringVectors.load(tmp_path / "me.safetensors")) == 6
    assert len(tm.SteeringVectors.load(tmp_path / "runs" / "mine" / "vectors.safetensors")) == 3
    assert "The family of vector 4" in (tmp_path / "me.html").read_text(encoding="utf-8")
    printed, text = capsys.readouterr().out, README.read_text(encoding="utf-8")
    assert "Once upon a time" in printed
    (shown,) = re.findall(r"<!-- output -->\n```text\n(.*?)```", text, re.DOTALL)
    # A tiny model writes other texts after the same numbers.
    assert shown in printed if size == "bundled" else numbers(shown) == numbers(printed)


def numbers(text):
    """Of lines such as `-1  'a text'`."""
    return re.findall(r"""^([ -]\d)  (?:'.*'|".*")$""", text, re.MULTILINE)


@pytest.mark.parametrize(("file", "name"), quoted.QUOTED)
def test_what_is_quoted_is_what_was_measured(file, name):
    text = (ROOT / file).read_text(encoding="utf-8")
    told = "python -m benchmarks.quoted writes it anew"
    assert quoted.with_quotes(text, name, quoted.QUOTED[file, name]()) == text, told


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", ["README.md", *FOR_CONTRIBUTORS])
def test_what_it_names_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links or name != "README.md"
    named = re.findall(r"`((?:docs|tests|benchmarks|notebooks|tl_melbo)/[\w/.-]*)`", text)
    for link in [*(link for link in links if "://" not in link), *named]:
        path, _, heading = link.partition("#")
        assert (ROOT / path).exists(), path
        if heading:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
            assert heading in {each.lower().replace(" ", "-") for each in headings}, link
