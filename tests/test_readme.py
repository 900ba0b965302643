"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest

import tl_melbo as tm

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.heavy
def test_the_code_runs_as_printed(model, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tm, "load_model", lambda: model)
    exec(compile(code, str(README), "exec"), {})
    assert len(tm.SteeringVectors.load(tmp_path / "me.safetensors")) == 8
    assert len(tm.SteeringVectors.load(tmp_path / "runs" / "mine" / "vectors.safetensors")) == 3
    assert "The family of vector 4" in (tmp_path / "me.html").read_text(encoding="utf-8")
    assert "Once upon a time" in capsys.readouterr().out
