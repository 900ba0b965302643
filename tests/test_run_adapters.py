"""Adapters in a run's folder, and from the shell."""

import json

import pytest
import torch
from typer.testing import CliRunner

import tl_melbo as tm
from tests.tiny_models import tiny_bridge
from tl_melbo import cli
from tl_melbo.errors import DifferentSearch

PROMPTS = ["Once upon a time", "Hello there, my friend, how", "I"]
PROMPT = PROMPTS[0]
QUICK = {"max_new_tokens": 3, "steps": 2, "batch_size": 2}


def test_kill_and_continue(tmp_path):
    model = tiny_bridge("llama")
    trained = tm.divergence_adapter(model, PROMPTS, 2, **QUICK)

    class Killed(BaseException):
        pass

    def die(number, step, measured):
        if (number, step) == (1, 2):
            raise Killed

    run = tm.Run(tmp_path / "run")
    with pytest.raises(Killed):
        run.adapters(model, 2, PROMPTS, on_step=die, **QUICK)
    assert len(tm.Adapter.load(run.folder / "adapters.safetensors")) == 1
    counts, steps = [], []
    found = run.adapters(
        model, 2, PROMPTS, on_adapter=lambda *c: counts.append(c),
        on_step=lambda *s: steps.append(s[:2]), **QUICK,
    )  # fmt: skip
    assert (counts, steps) == ([(1, 2), (2, 2)], [(1, 1), (1, 2)])
    assert torch.equal(found.B, trained.B)
    assert found.table().equals(trained.table())
    assert torch.equal(run.adapters(model, 1, PROMPTS, **QUICK).B, trained[0].B)
    with pytest.raises(DifferentSearch, match=r"learning_rate=0\.1 \(here 0\.2\)"):
        run.adapters(model, 2, PROMPTS, learning_rate=0.2, **QUICK)
    with pytest.raises(DifferentSearch, match="prompts"):
        run.adapters(model, 2, PROMPT, **QUICK)
    with pytest.raises(TypeError, match="did you mean 'rank'"):
        run.adapters(model, 2, PROMPTS, rnak=1)
    other = run.adapters(model, 1, PROMPTS, seed=5, overwrite=True, **QUICK)
    assert len(tm.Adapter.load(run.folder / "adapters.safetensors")) == len(other) == 1


def test_the_command_trains_keeps_and_writes(model_folder, cached_models, tmp_path):
    runner, out = CliRunner(), tmp_path / "run"
    command = ["adapters", *PROMPTS[:2], "--out", str(out), "--model", str(model_folder)]
    command += ["--n-adapters", "2", "--max-new-tokens", "3", "--steps", "2", "--rank", "1"]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1] == str((out / "adapters.csv").resolve())
    found = tm.Adapter.load(out / "adapters.safetensors")
    assert (len(found), found.rank) == (2, 1)
    assert (out / "adapters.csv").read_text().count(PROMPTS[0]) >= 3
    again = runner.invoke(cli.app, [*command, "--beta", "0.5"])
    assert again.exit_code == 1
    assert "beta=0.3 (here 0.5)" in again.stderr
    neither = runner.invoke(cli.app, ["adapters", "--out", str(out)])
    assert neither.exit_code == 1
    assert "--situations" in neither.stderr


def test_the_page_shows_what_the_folder_holds(tiny_llama, tmp_path, by_words):
    """Notes that a reader put there, and adapters with their texts."""
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
    run = tm.Run(tmp_path / "run")
    run.melbo(f, 2, radius=4.0, steps=2)
    adapter = run.adapters(tiny_llama, 1, PROMPT, max_new_tokens=2, steps=1)
    run.adapter_texts(tiny_llama, adapter, PROMPT, max_new_tokens=2)
    notes = {"version": 1, "vectors": {"1": {"name": "a pirate"}}}
    (run.folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
    run.page(tiny_llama, f, max_new_tokens=2)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    for words in ("a pirate", "<h2>Adapters", '"adapter-texts"', '"folder":"run"'):
        assert words in page
    run.page(tiny_llama, f, notes={"version": 1})
    assert "a pirate" not in (run.folder / "report.html").read_text(encoding="utf-8")
    (run.folder / "notes.json").write_text("no notes", encoding="utf-8")
    with pytest.raises(tm.errors.Damaged, match=r"notes\.json"):
        run.page(tiny_llama, f)
