"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest

import tl_melbo as tm

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("size", ["tiny", pytest.param("bundled", marks=pytest.mark.slow)])
def test_the_code_runs_as_printed(size, request, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    if size == "tiny":
        layers = "source_layer=8, target_layer=16"
        assert layers in code
        code = code.replace(layers, "source_layer=1, target_layer=4")
    model = request.getfixturevalue("tiny_llama" if size == "tiny" else "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tm, "load_model", lambda: model)
    exec(compile(code, str(README), "exec"), {})
    assert len(tm.SteeringVectors.load(tmp_path / "me.safetensors")) == 8
    assert len(tm.SteeringVectors.load(tmp_path / "runs" / "mine" / "vectors.safetensors")) == 3
    assert "The family of vector 4" in (tmp_path / "me.html").read_text(encoding="utf-8")
    assert "Once upon a time" in capsys.readouterr().out
