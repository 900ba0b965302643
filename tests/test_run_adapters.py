"""Adapters in a run's folder, and from the shell."""

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
