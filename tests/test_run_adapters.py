"""Adapters and gated factors in a run's folder, and adapters from the shell."""

import json

import pytest
import torch
from typer.testing import CliRunner

import tl_melbo as tm
from tests.tiny_models import tiny_bridge
from tl_melbo import cli
from tl_melbo.errors import Damaged, DifferentSearch
from tl_melbo.run._adapters import all_kept

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


def test_factors_are_kept_and_read_back(tiny_llama, tmp_path, monkeypatch):
    run, settings = tm.Run(tmp_path / "run"), {"layers": [0, 1], "target_layer": 3, "steps": 1}
    arguments, path = (tiny_llama, PROMPTS[:2], 3), run.folder / "factors.safetensors"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", stop)
        with pytest.raises(KeyboardInterrupt):
            run.gated_factors(*arguments, **settings)
    assert not run.folder.exists()
    found = run.gated_factors(*arguments, **settings)
    expected = tm.gated_factors(*arguments, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", stop)  # nothing is found again
        again = run.gated_factors(*arguments, **settings)
        with pytest.raises(KeyboardInterrupt):
            run.gated_factors(*arguments, seed=1, overwrite=True, **settings)
    for each in (found, again, tm.GatedFactors.load(path)):
        assert torch.equal(each.A, expected.A)
        assert torch.equal(each.B, expected.B)
        assert torch.equal(each.history, expected.history)
        assert each.columns.keys() == expected.columns.keys()
        assert each.story["hyperparameters"] == expected.story["hyperparameters"]
    for other, told in (({"radius": 2.0}, r"radius=1\.0 \(here 2\.0\)"), ({"seed": 1}, "seed=0")):
        with pytest.raises(DifferentSearch, match=rf"other factors: found with {told}"):
            run.gated_factors(*arguments, **other, **settings)
    with pytest.raises(DifferentSearch, match=r"n_factors=3 \(here 2\)"):
        run.gated_factors(*arguments[:2], 2, **settings)
    with pytest.raises(TypeError, match="did you mean 'radius'"):
        run.gated_factors(*arguments, raduis=1)
    found[:2].save(path)
    with pytest.raises(DifferentSearch, match="not all from 0 on"):
        run.gated_factors(*arguments, **settings)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Damaged, match=r"factors\.safetensors.*pass overwrite=True"):
        run.gated_factors(*arguments, **settings)
    assert len(run.gated_factors(*arguments, overwrite=True, **settings)) == 3


@pytest.mark.parametrize("n_kept", [1, 3])
def test_a_search_for_factors_goes_on_where_it_was_killed(tiny_llama, tmp_path, n_kept):
    arguments = tiny_llama, PROMPTS[:2], 3
    settings = {"layers": [0, 1], "target_layer": 3, "steps": 3}
    expected = tm.gated_factors(*arguments, **settings)
    run, counts = tm.Run(tmp_path / "run"), []
    path = run.folder / "factors.safetensors"

    def die(done, total):
        if done == n_kept:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.gated_factors(*arguments, on_step=die, **settings)
    kept = tm.GatedFactors.load(path)
    assert kept.history.shape == (3, n_kept)
    with pytest.raises(ValueError, match="has not ended"):
        kept.vectors()
    assert all_kept(run.folder)["factors"] is None  # no part of a page yet
    with pytest.raises(DifferentSearch, match="seed=0"):
        run.gated_factors(*arguments, seed=1, **settings)
    count = {"on_step": lambda *c: counts.append(c)}
    found = run.gated_factors(*arguments, **count, **settings)
    assert counts == [(step, 4) for step in range(n_kept, 5)]
    for each in (found, tm.GatedFactors.load(path)):
        assert torch.equal(each.A, expected.A)
        assert torch.equal(each.B, expected.B)
        assert torch.equal(each.history, expected.history)
        assert each.columns.keys() == expected.columns.keys()
        assert all(torch.equal(each.columns[name], expected.columns[name]) for name in each.columns)
    cut = {**kept.columns, "unfinished": kept.columns["unfinished"][:, 1:]}
    with pytest.raises(ValueError, match="'unfinished' is not what a search left"):
        tm.GatedFactors(kept.A, kept.B, story=kept.story, columns=cut, history=kept.history)


@pytest.mark.parametrize("words", ["mine", "vector,scale,prompt,completion\n0,1.0,mine,mine\n"])
def test_a_table_of_the_users_own_is_not_replaced(tiny_llama, tmp_path, words):
    run, path = tm.Run(tmp_path), tmp_path / "adapters.csv"
    path.write_text(words)
    adapter = run.adapters(tiny_llama, 1, PROMPT, max_new_tokens=2, steps=1)
    with pytest.raises(ValueError, match=r"adapters\.csv: no run left it; move it"):
        run.adapter_texts(tiny_llama, adapter, PROMPT, max_new_tokens=2)
    run.adapters(tiny_llama, 1, PROMPT, max_new_tokens=2, steps=1, seed=1, overwrite=True)
    assert path.read_text() == words
    assert all_kept(run.folder)["adapter_texts"] is None


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


def test_the_command_finds_factors_and_goes_on(model_folder, cached_models, tmp_path, monkeypatch):
    runner, out = CliRunner(), tmp_path / "run"
    command = ["gated", PROMPT, "--out", str(out), "--model", str(model_folder), "--no-chat"]
    command += ["--n-factors", "2", "--layers", "0", "--layers", "1", "--steps", "2"]
    save = tm.GatedFactors.save

    def stop(self, path):
        if self.history.shape[1] == 2:
            raise KeyboardInterrupt
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(tm.GatedFactors, "save", stop)
        result = runner.invoke(cli.app, command)
    assert result.exit_code == 130
    assert "what was finished is kept" in result.stderr
    result = runner.invoke(cli.app, [*command, "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1] == str((out / "factors.csv").resolve())
    found = tm.GatedFactors.load(out / "factors.safetensors")
    assert (len(found), found.layers, found.history.shape[1]) == (2, (0, 1), 3)
    assert (out / "factors.csv").read_text().count(PROMPT) == 3


def test_the_page_shows_what_the_folder_holds(tiny_llama, tmp_path, by_words):
    """Notes that a reader put there, and adapters and factors with their texts."""
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
    run = tm.Run(tmp_path / "run")
    run.melbo(f, 2, radius=4.0, steps=2)
    adapter = run.adapters(tiny_llama, 1, PROMPT, max_new_tokens=2, steps=1)
    told = []
    run.adapter_texts(
        tiny_llama, adapter, PROMPT, max_new_tokens=2, on_batch=lambda *n: told.append(n)
    )
    assert told == [(1, 1 + len(adapter)), (1 + len(adapter), 1 + len(adapter))]
    factors = run.gated_factors(tiny_llama, PROMPT, 2, layers=[0], target_layer=2, steps=1)
    texts = run.factor_texts(tiny_llama, factors, PROMPT, max_new_tokens=2)
    assert texts["vector"].tolist() == [-1, 0, 1]
    assert (run.folder / "factors.csv").read_text(encoding="utf-8").count(PROMPT) == 3
    notes = {"version": 1, "vectors": {"1": {"name": "a pirate"}}}
    (run.folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
    run.page(tiny_llama, f, max_new_tokens=2)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    for words in (
        "a pirate",
        "<h2>Adapters",
        '"adapter-texts"',
        "<h2>Gated factors",
        '"factors":',
        '"factor-texts"',
        '"folder":"run"',
    ):
        assert words in page
    run.page(tiny_llama, f, notes={"version": 1})
    assert "a pirate" not in (run.folder / "report.html").read_text(encoding="utf-8")
    (run.folder / "notes.json").write_text("no notes", encoding="utf-8")
    with pytest.raises(tm.errors.Damaged, match=r"notes\.json"):
        run.page(tiny_llama, f)
