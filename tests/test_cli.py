"""The command, run in this process on a tiny model that lies in a folder."""

import csv
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tl_melbo as tm
import tl_melbo.analysis  # by_words replaces what is in it
from tests.conftest import PROFILE, PROMPT
from tests.tiny_models import tiny_hf, tokenizer
from tl_melbo.cli import app
from tl_melbo.terminal import Stages, print_found

pytestmark = pytest.mark.usefixtures("cached_models", "by_words")

FILES = [
    "completions.csv", "random_completions.csv", "report.html", "settings.json",
    "vectors.safetensors",
]  # fmt: skip


def discover(model_folder: Path, out: Path, *arguments: str, prompts: tuple = (PROMPT,)) -> Result:
    small = ("--source-layer=1", "--target-layer=4", "--n-vectors=3", "--steps=3")
    options = (f"--model={model_folder}", "--radius=4", "--max-new-tokens=3", "--out", str(out))
    return CliRunner().invoke(app, ["discover", *prompts, *small, *options, *arguments])


def names(folder: Path) -> list[str]:
    """What a run left, but for its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.boundary
def test_a_run_leaves_its_files_and_says_where_the_page_is(
    model_folder: Path, tmp_path: Path, loads_anew: None
) -> None:
    out = tmp_path / "runs" / "me"
    result = discover(model_folder, out)
    assert result.exit_code == 0, result.output
    assert names(out) == FILES
    assert result.stdout.splitlines()[-1] == str(out / "report.html")
    assert "Finding vectors" in result.stderr
    assert PROMPT in (out / "report.html").read_text(encoding="utf-8")
    found = tm.SteeringVectors.load(out / "vectors.safetensors")
    assert len(found) == 3
    assert found.story["prompts"] == [PROMPT]
    assert found.story["chat"] is True
    with (out / "completions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["vector", "scale", "prompt", "completion"]
    assert [row["vector"] for row in rows] == ["-1", "0", "0", "1", "1", "2", "2"]


def test_every_option_reaches_the_search(
    model_folder: Path, tmp_path: Path, loads_anew: None
) -> None:
    out = tmp_path / "run"
    result = discover(
        model_folder, out,
        "--positions", "-2:", "--p=4", "--q=1", "--norm=lp", "--independent",
        "--optimiser=adamw", "--seed=7", "--no-chat", "--dtype=float64", "--device=cpu",
        prompts=(PROMPT, "Name a colour."),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    story = tm.SteeringVectors.load(out / "vectors.safetensors").story
    assert story["prompts"] == [PROMPT, "Name a colour."]
    assert (story["seed"], story["chat"], story["dtype"]) == (7, False, "float64")
    expected = {
        "n_vectors": 3, "radius": 4.0, "p": 4.0, "q": 1.0, "norm": "lp",
        "positions": [-2, None, None], "orthogonal": False, "optimiser": "adamw", "steps": 3,
    }  # fmt: skip
    assert dict(story["hyperparameters"]) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--radius=-1", "radius=-1"),
        ("--radius=wide", "--radius='wide': expected a number, or 'auto'"),
        ("--target-layer=99", "--target-layer=99: tiny has 6 layers"),
        ("--n-vectors=33", "--n-vectors=33: must be from 1 to 32; at most d_model=32"),
        ("--p=0.5", "p=0.5"),
        ("--positions=last", "--positions='last': expected start:stop"),
        ("--positions=500:", "picks no token"),
        ("--max-new-tokens=0", "--max-new-tokens=0: at least 1"),
        ("--model=./nowhere", "no such file or folder"),
        ("--device=nonsense", "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    model_folder: Path, tmp_path: Path, argument: str, message: str
) -> None:
    out = tmp_path / "run"
    result = discover(model_folder, out, argument)
    assert result.exit_code == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error
    assert "Traceback" not in result.output
    assert not out.exists()


@pytest.mark.parametrize("argument", ["--optimiser=sgd", "--n-vectors=many", "--what"])
def test_wrong_usage_exits_with_2(model_folder: Path, tmp_path: Path, argument: str) -> None:
    assert discover(model_folder, tmp_path / "run", argument).exit_code == 2
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_is_refused(model_folder: Path, tmp_path: Path) -> None:
    result = discover(model_folder, tmp_path / "run", prompts=(" ",))
    assert result.exit_code == 1
    assert "a text needs at least one visible" in one_line(result.stderr)


def test_the_folder_is_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tm, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("in the way")
    result = discover(tmp_path, tmp_path / "file" / "run")
    assert result.exit_code == 1
    assert "a file is in the way" in one_line(result.stderr)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--radius=-1", "--radius=-1.0: must be a positive"),
        ("--radius=nan", "--radius=nan"),
        ("--n-vectors=0", "--n-vectors=0: must be from 1"),
        ("--p=0.5", "--p=0.5"),
        ("--q=inf", "--q=inf"),
        ("--steps=0", "--steps=0"),
        ("--seed=-1", "--seed=-1"),
        ("--source-layer=5", "--source-layer=5, --target-layer=4: the source comes before"),
        ("--positions=1:2:3", "--positions='1:2:3'"),
        ("", "a text needs at least one visible"),
    ],
)
def test_numbers_are_checked_before_the_model_is_loaded(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    message: str,
) -> None:
    monkeypatch.setattr(tm, "load_model", lambda *_, **__: pytest.fail("loaded"))
    result = discover(model_folder, tmp_path / "run", argument)
    assert result.exit_code == 1
    assert message in one_line(result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_and_says_what_is_kept(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-c", "from tl_melbo.cli import app; app()", "discover", "Hi there!"),
        f"--model={model_folder}",
        *(f"--out={out}", "--source-layer=1", "--target-layer=4", "--radius=2", "--n-vectors=30"),
        *("--optimiser=adamw", "--steps=200", "--max-new-tokens=3"),
    ]
    # Whoever runs the tests in the background may ignore the signal, and so would the child.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        deadline = time.monotonic() + 120
        while not (out / "vectors.safetensors").is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    kept = len(tm.SteeringVectors.load(out / "vectors.safetensors"))
    assert 1 <= kept < 30
    plural = "vector is" if kept == 1 else "vectors are"
    assert f"Interrupted; {kept} {plural} kept in" in one_line(stderr)


def test_an_earlier_run_is_not_overwritten_unasked(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vectors.safetensors").write_text("precious")
    (tmp_path / "report.html").write_text("old")
    result = discover(model_folder, tmp_path)
    assert result.exit_code == 1
    assert "pass --overwrite to replace it" in one_line(result.stderr)
    assert (tmp_path / "vectors.safetensors").read_text() == "precious"
    assert discover(model_folder, tmp_path, "--overwrite").exit_code == 0
    assert names(tmp_path) == FILES


def test_an_interrupted_run_keeps_what_is_finished(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tm.report, "collect_completions", interrupted)
        result = discover(model_folder, tmp_path)
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert "Traceback" not in result.output
    assert names(tmp_path) == ["settings.json", "vectors.safetensors"]
    assert discover(model_folder, tmp_path).exit_code == 0
    page, texts = ((tmp_path / name).read_bytes() for name in ("report.html", "completions.csv"))
    # More vectors: what is there stays until there is more.
    with monkeypatch.context() as patch:
        patch.setattr(tm.report, "collect_completions", interrupted)
        assert discover(model_folder, tmp_path, "--n-vectors=4").exit_code == 130
    assert len(tm.SteeringVectors.load(tmp_path / "vectors.safetensors")) == 4
    assert (tmp_path / "report.html").read_bytes() == page
    assert (tmp_path / "completions.csv").read_bytes() == texts
    with monkeypatch.context() as patch:
        patch.setattr(tm.Run, "keep", interrupted)
        assert discover(model_folder, tmp_path / "new").exit_code == 130
    assert not (tmp_path / "new").exists()


def interrupt_after_two_vectors(patch: pytest.MonkeyPatch) -> None:
    """Let the second time that vectors are on disk be followed by Ctrl-C."""
    save, saved = tm.SteeringVectors.save, []

    def save_two(library: tm.SteeringVectors, path: Path) -> None:
        save(library, path)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    patch.setattr(tm.SteeringVectors, "save", save_two)


@pytest.mark.slow
def test_an_interrupted_search_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert discover(model_folder, whole).exit_code == 0
    with monkeypatch.context() as patch:
        interrupt_after_two_vectors(patch)
        result = discover(model_folder, out)
    assert result.exit_code == 130
    assert "2 vectors are kept in" in one_line(result.stderr)
    result = discover(model_folder, out, "--seed=1")
    assert result.exit_code == 1
    assert "seed=0 (here 1)" in one_line(result.stderr)
    result = discover(model_folder, out)
    assert result.exit_code == 0, result.output
    assert "holds 2 vectors of this search." in one_line(result.stderr)
    found, expected = (
        tm.SteeringVectors.load(folder / "vectors.safetensors") for folder in (out, whole)
    )
    assert torch.equal(found.vectors, expected.vectors)
    assert (out / "completions.csv").read_text() == (whole / "completions.csv").read_text()
    # A third time: nothing is left to do but the page.
    written = (out / "completions.csv").stat().st_mtime_ns
    assert discover(model_folder, out).exit_code == 0
    assert (out / "completions.csv").stat().st_mtime_ns == written
    assert discover(model_folder, out, "--max-new-tokens=2").exit_code == 0
    assert (out / "completions.csv").stat().st_mtime_ns != written


@pytest.mark.slow
def test_side_effects_are_measured_once_and_belong_to_their_vectors(
    model_folder: Path, tmp_path: Path
) -> None:
    table, page = tmp_path / "side_effects.csv", tmp_path / "report.html"
    assert discover(model_folder, tmp_path, "--side-effects").exit_code == 0
    assert len(pd.read_csv(table)) == 3
    assert "<h2>Side effects" in page.read_text()
    assert "Specificity" in page.read_text()
    written = table.stat().st_mtime_ns
    # They stay on the page, and are not measured again.
    assert discover(model_folder, tmp_path).exit_code == 0
    assert table.stat().st_mtime_ns == written
    assert "<h2>Side effects" in page.read_text()
    # More vectors: those are measured, too.
    assert discover(model_folder, tmp_path, "--n-vectors=4").exit_code == 0
    assert len(pd.read_csv(table)) == 4
    # Others: what is known of the old ones goes with them.
    assert discover(model_folder, tmp_path, "--seed=1", "--overwrite").exit_code == 0
    assert not table.exists()
    assert "<h2>Side effects" not in page.read_text()
    assert discover(model_folder, tmp_path, "--seed=1").exit_code == 0
    assert not table.exists()


@pytest.mark.slow
def test_side_effects_of_other_vectors_go_when_the_new_ones_come(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, table = tmp_path / "run", tmp_path / "run" / "side_effects.csv"
    assert discover(model_folder, out, "--side-effects").exit_code == 0
    # Of another model: the settings are replaced, and the table must not stay.
    other = tmp_path / "other"
    tiny_hf("llama", seed=1).save_pretrained(other)
    tokenizer().save_pretrained(other)
    assert discover(other, out, "--overwrite").exit_code == 0
    assert not table.exists()
    # Interrupted, and continued: nothing is measured unasked.
    assert discover(model_folder, out, "--overwrite", "--side-effects").exit_code == 0
    with monkeypatch.context() as patch:
        interrupt_after_two_vectors(patch)
        assert discover(model_folder, out, "--overwrite", "--seed=1").exit_code == 130
    assert discover(model_folder, out, "--seed=1").exit_code == 0
    assert not table.exists()


@pytest.mark.slow
def test_a_table_that_no_run_left_is_not_replaced(model_folder: Path, tmp_path: Path) -> None:
    assert discover(model_folder, tmp_path).exit_code == 0
    table = tmp_path / "side_effects.csv"
    table.write_text("my own notes")
    result = discover(model_folder, tmp_path, "--side-effects")
    assert result.exit_code == 1
    assert "no run left it" in one_line(result.stderr)
    assert discover(model_folder, tmp_path).exit_code == 0
    assert table.read_text() == "my own notes"
    assert discover(model_folder, tmp_path, "--side-effects", "--overwrite").exit_code == 0
    assert len(pd.read_csv(table)) == 3


@pytest.mark.slow
def test_a_damaged_table_of_side_effects_is_named(model_folder: Path, tmp_path: Path) -> None:
    assert discover(model_folder, tmp_path, "--side-effects").exit_code == 0
    (tmp_path / "side_effects.csv").write_text('"vector","specificity"\n0,much\n')
    result = discover(model_folder, tmp_path)
    assert result.exit_code == 1
    assert "side_effects.csv" in one_line(result.stderr)
    assert "damaged" in one_line(result.stderr)
    assert "Finding vectors" not in result.stderr  # told before the work
    assert discover(model_folder, tmp_path, "--overwrite", "--side-effects").exit_code == 0


def test_csv_cells_are_no_formulas(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a=1"]
    collect = tm.report.collect_completions
    monkeypatch.setattr(
        tm.report,
        "collect_completions",
        lambda *a, **k: collect(*a, **k).assign(completion=hostile),
    )
    assert discover(model_folder, tmp_path, prompts=("=1+1",)).exit_code == 0
    with (tmp_path / "completions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["completion"] for row in rows] == [f"'{text}" for text in hostile[:-1]] + ["a=1"]
    assert {row["prompt"] for row in rows} == {"'=1+1"}
    assert rows[0]["vector"] == "-1"


def test_the_table_shows_what_the_model_wrote_and_obeys_none_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"index": 3, "prompt": "p", "objective": 178.0, "kl": 0.5}
    completion = "[red]a[/]\x1b[31m\nb\\" + "c" * 100
    print_found(
        pd.DataFrame([{**row, "completion": completion, "negated_completion": ""}]),
        {"column": "objective"},
    )
    shown = capsys.readouterr().out
    assert "[red]a[/]␛[31m b\\cc" in shown
    assert "\x1b" not in shown
    assert all(number in shown for number in ("3", "178.0", "0.500"))


def test_warnings_of_the_package_are_readable(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tm.Run.keep

    def warning(*arguments: object, **options: object) -> tm.SteeringVectors:
        warnings.warn("mind [this]", UserWarning, stacklevel=1)
        warnings.warn("not yours", FutureWarning, stacklevel=1)
        return keep(*arguments, **options)

    monkeypatch.setattr(tm.Run, "keep", warning)
    result = discover(model_folder, tmp_path)
    assert result.exit_code == 0
    assert "Warning: mind [this]" in result.stderr
    assert "not yours" not in result.stderr
    assert "UserWarning" not in result.stderr


def test_version_and_help_answer() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.strip() == f"tl-melbo {tm.__version__}"
    assert "discover" in CliRunner().invoke(app, ["--help"]).stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["discover", "--help"]).stdout)
    words = " ".join(plain.replace("│", " ").split())
    # They differ between methods: contrastive measures its radius, at the last token.
    for option in ("--radius", "--positions"):
        told = words[words.index(option) :].partition("[default: ")[2].partition("]")[0]
        assert told == "(the method's own)"


def test_the_package_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tl_melbo", "--version"])
    with pytest.raises(SystemExit) as ended:  # `python -m tl_melbo --version`
        runpy.run_module("tl_melbo", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"tl-melbo {tm.__version__}"


def test_times_of_a_stage_say_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages() as stages:
        stages.begin("Searching")
        stages.count(1, 2)
    assert re.search(r"50% \S+ left, 0:00:\d\d elapsed", capsys.readouterr().err)


def test_help_does_not_load_what_it_does_not_need() -> None:
    code = (
        "import sys, tl_melbo.cli;"
        "print([m for m in ('plotly', 'transformer_lens.model_bridge') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


NUMBERS = st.sampled_from(
    ["-1", "0", "1", "2", "nan", "inf", "-inf", "1e39", "1e-39", "x", "", "0.5", str(10**30), "½"]
)
OPTIONS = {
    "--n-vectors": st.sampled_from(["-1", "0", "1", "33", "x", "", str(10**30)]),
    "--radius": st.one_of(NUMBERS, st.just("auto")),
    "--source-layer": NUMBERS, "--target-layer": NUMBERS, "--p": NUMBERS,
    "--q": NUMBERS, "--steps": NUMBERS, "--seed": NUMBERS, "--max-new-tokens": NUMBERS,
    "--positions": st.sampled_from(["", ":", "::", "-1:", "5:2", "a:b", "99:", f"{10**30}:"]),
    "--norm": st.sampled_from(["l2", "lp", "l1", ""]),
    "--optimiser": st.sampled_from(["ascent", "sgd"]),
    "--dtype": st.sampled_from(["float32", "bfloat16", "int8", ""]),
    "--device": st.sampled_from(["cpu", "meta", "cpu:7", "", "nonsense"]),
}  # fmt: skip


@pytest.mark.slow
@settings(
    max_examples=40 if PROFILE == "nightly" else 15,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_options_end_in_a_page_or_one_line(
    model_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    names_ = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=2, unique=True))
    arguments = [f"{name}={data.draw(OPTIONS[name])}" for name in names_]
    prompt = data.draw(st.sampled_from([PROMPT, "", "\x00", "\ud800", "--", "<script>"]))
    out = tmp_path / "run"
    result = discover(model_folder, out, *arguments, prompts=(prompt,))
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.output
    if result.exit_code == 0:
        assert result.stdout.splitlines()[-1] == str(out / "report.html")
        shutil.rmtree(out)
    else:
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.exit_code == 2 or "Error: " in result.stderr
        if out.exists():
            shutil.rmtree(out)
            pytest.fail(f"{arguments}, {prompt!r} left a folder after {result.stderr[-300:]!r}")


def test_files_of_somebody_else_are_not_replaced(model_folder: Path, tmp_path: Path) -> None:
    theirs = {"report.html": "my thesis", "completions.csv": "hand labelled"}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    result = discover(model_folder, tmp_path)
    assert result.exit_code == 1
    assert "so not the rest of a run; choose another folder" in one_line(result.stderr)
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == theirs
    assert discover(model_folder, tmp_path, "--overwrite").exit_code == 0


@pytest.mark.slow
def test_texts_are_those_of_the_vectors_that_are_there(model_folder: Path, tmp_path: Path) -> None:
    """Also after Python changed the vectors, or found more."""
    assert discover(model_folder, tmp_path).exit_code == 0
    settings_ = {"radius": 4.0, "steps": 3, "seed": 9}
    f = tm.ActivationMap.from_prompts(tm.load_model(model_folder), PROMPT, 1, 4, chat=True)
    found = tm.Run(tmp_path).melbo(f, 3, overwrite=True, **settings_)
    assert discover(model_folder, tmp_path, "--seed=9").exit_code == 0
    expected = tm.report.collect_completions(f.model, PROMPT, found, max_new_tokens=3)
    texts = pd.read_csv(tmp_path / "completions.csv", keep_default_na=False)["completion"]
    assert texts.str.lstrip("'").tolist() == [text.lstrip("'") for text in expected["completion"]]
    tm.Run(tmp_path).melbo(f, 4, **settings_)
    assert discover(model_folder, tmp_path, "--seed=9", "--n-vectors=4").exit_code == 0
    assert set(pd.read_csv(tmp_path / "completions.csv")["vector"]) == {-1, 0, 1, 2, 3}


def test_samples_and_scales_are_asked_for_by_name(model_folder: Path, tmp_path: Path) -> None:
    options = ("--samples=2", "--temperature=1.5", "--scales=nine")
    assert discover(model_folder, tmp_path, *options).exit_code == 0
    rows = pd.read_csv(tmp_path / "completions.csv")
    assert sorted(rows["scale"].unique()) == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert rows.groupby("sample").size().tolist()[1:] == 2 * [1 + 2 * rows["vector"].max() + 2]
    result = discover(model_folder, tmp_path / "other", "--temperature=1.5")
    assert "temperature=1.5: of samples; pass --samples, too" in one_line(result.stderr)
    result = discover(model_folder, tmp_path / "other", "--scales=1;2")
    assert "--scales='1;2': expected numbers with commas" in one_line(result.stderr)


def test_a_search_that_fails_leaves_the_run_that_was_there(
    model_folder: Path, tmp_path: Path
) -> None:
    assert discover(model_folder, tmp_path).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = discover(model_folder, tmp_path, "--overwrite", "--radius=1e-30")
    assert result.exit_code == 1
    assert "changes nothing" in one_line(result.stderr)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_radius_is_calibrated_once(model_folder: Path, tmp_path: Path) -> None:
    first = discover(model_folder, tmp_path, "--radius=auto")
    assert first.exit_code == 0, first.output
    found = tm.SteeringVectors.load(tmp_path / "vectors.safetensors")
    f = tm.ActivationMap.from_prompts(tm.load_model(model_folder), PROMPT, 1, 4, chat=True)
    radius = tm.calibrate_radius(f)
    assert found.story["hyperparameters"]["radius"] == radius
    assert f"Radius {radius:g}, calibrated." in one_line(first.stderr)
    assert "(calibrated)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    again = discover(model_folder, tmp_path, "--radius=auto", "--n-vectors=4")
    assert again.exit_code == 0, again.output
    more = tm.SteeringVectors.load(tmp_path / "vectors.safetensors")
    assert len(more) == 4
    torch.testing.assert_close(more.vectors[:3], found.vectors)
    other = discover(model_folder, tmp_path, "--radius=4")
    assert other.exit_code == 1
    assert f"--radius={radius}" in one_line(other.stderr)


def test_auto_does_not_continue_a_radius_that_was_chosen(
    model_folder: Path, tmp_path: Path
) -> None:
    assert discover(model_folder, tmp_path).exit_code == 0
    result = discover(model_folder, tmp_path, "--radius=auto")
    assert result.exit_code == 1
    assert "--radius=4.0 (here 'auto')" in one_line(result.stderr)


def run_command(name: str, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [name, str(out), *arguments])


def test_what_has_not_converged_is_told(model_folder: Path, tmp_path: Path) -> None:
    result = discover(model_folder, tmp_path)
    table = tm.SteeringVectors.load(tmp_path / "vectors.safetensors").table()
    count = [*table["converged"]].count("no")
    assert count, "three steps were enough: take fewer"
    line = f"{count} of 3 still gained more than 1% in their last step; --steps 9 raises"
    assert line in one_line(result.stderr)
    assert line in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_folder_of_version_0_1_is_shown_and_continued(model_folder: Path, tmp_path: Path) -> None:
    """A library with its side effects, and the family of its vector 1."""
    recorded = Path(__file__).parent / "data" / "run_of_version_0_1"
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    run, place = tm.Run(tmp_path), tmp_path / "ortho-1"
    run.note(model=str(model_folder))
    # Random weights may differ in their last digit from one processor to another.
    f = tm.ActivationMap.from_prompts(tm.load_model(model_folder), PROMPT, 1, 4, chat=True)
    weights = {"weights": f.story().get("weights")}
    for path in (tmp_path / "vectors.safetensors", place / "vectors.safetensors"):
        library = tm.SteeringVectors.load(path)
        replace(library, story={**library.story, **weights}).save(path)
    old, family = run.found, tm.SteeringVectors.load(place / "vectors.safetensors")
    tables = ("completions.csv", "side_effects.csv", "ortho-1/family.csv")
    before = [(tmp_path / name).read_bytes() for name in tables]
    result = run_command("page", tmp_path)
    assert result.exit_code == 0, result.output
    assert [(tmp_path / name).read_bytes() for name in tables] == before
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for shown in ("(MELBO)", "<h2>Side effects", "The family of vector 1"):
        assert shown in page
    # One more vector, whose side effects are measured as those of the others were.
    assert discover(model_folder, tmp_path).exit_code == 0
    assert len(run.found) == 3
    assert torch.equal(run.found.vectors[:2], old.vectors)
    assert pd.read_csv(tmp_path / "side_effects.csv")["vector"].tolist() == [0, 1, 2]
    follow = ("--vector=1", "--n-vectors=3", "--steps=4", "--max-new-tokens=3")
    result = run_command("ortho", tmp_path, *follow)
    assert result.exit_code == 0, result.output
    more = tm.SteeringVectors.load(place / "vectors.safetensors")
    assert len(more) == 3
    assert torch.equal(more.vectors[:2], family.vectors)
    assert (pd.read_csv(place / "family.csv")["kind"] == "family").sum() == 3
    assert [part.number for part in run.families()] == [1]


SETTING = "--method=dct", "--set"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=sgd"], "--method='sgd': known are"),
        (
            ["--method=divergence_adapter"],
            "known are contrastive, dct, jacobian, melbo, melbo_ortho",
        ),
        (["--method=random_vector"], "--method='random_vector': did you mean 'random_vectors'?"),
        (["--method=melbo_ortho", "--p=2"], "--p: --method melbo_ortho has no such setting"),
        (["--method=melbo_ortho"], "needs theta0; use tl-melbo ortho"),
        (["--method=jacobian", "--optimiser=ascent"], "--optimiser: --method jacobian has no such"),
        (["--method=jacobian", "--seed=1"], "it has n_vectors, radius, positions"),
        (
            ["--method=dct", "--independent"],
            "--orthogonal: expected 'hard', or 'soft' for --method",
        ),
        (
            [*SETTING, "ordr=linear"],
            "--set ordr: --method dct has no such setting; did you mean 'o",
        ),
        ([*SETTING, "order=cubic"], "expected 'linear', 'quadratic', or 'exponential'"),
        ([*SETTING, "order=quadratc"], "; did you mean 'quadratic'?"),
        ([*SETTING, "order"], "--set 'order': expected NAME=VALUE"),
        ([*SETTING, "steps=3", "--set", "steps=4"], "--set steps: given twice"),
        ([*SETTING, "steps=3", "--steps=3"], "--set steps: given twice, --steps before"),
        ([*SETTING, "steps=few"], "--set steps='few': expected a whole number"),
        ([*SETTING, "steps=2.5"], "--set steps='2.5': expected a whole number"),
        (
            [*SETTING, "radius=wide"],
            "--set radius='wide': expected a number, or 'auto'",
        ),
        ([*SETTING, "positions=last"], "--set positions='last': expected start:stop"),
        ([*SETTING, "on_step=print"], "--set on_step: --method dct has no such setting"),
        ([*SETTING, "steps=0"], "--steps=0: at least 1"),
        (["--set=orthogonal=hard"], "--set orthogonal='hard': expected true or false"),
        (["--set=q=two"], "--set q='two': expected a number, or none"),
        (["--other=Hi!"], "--other: --method melbo takes no other prompts"),
        (["--other=Hi!"], "a method that does: contrastive"),
        (["--method=contrastive"], "--method contrastive: needs other prompts, to compare with"),
        (["--method=contrastive", "--other= "], "other[0]=' ': a text needs"),
        (["--method=contrastive", "--other=Hi!", "--n-vectors=2"], "--n-vectors=2: there is one"),
    ],
)
def test_a_method_and_its_settings_are_checked_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(tm, "load_model", lambda *_, **__: pytest.fail("loaded"))
    out = tmp_path / "run"
    result = run_command("discover", Path(PROMPT), f"--out={out}", *arguments)
    assert result.exit_code == 1
    assert message in one_line(result.stderr)
    assert not out.exists()


@pytest.mark.slow
def test_any_setting_of_a_method_can_be_given_and_is_known_again(
    model_folder: Path, tmp_path: Path
) -> None:
    words = ("order=quadratic", "orthogonal=soft", "start=jacobian", "positions=-2:", "seed=3")
    arguments = ["--method=dct", *(f"--set={word}" for word in words)]
    result = discover(model_folder, tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    path = tmp_path / "vectors.safetensors"
    found = tm.SteeringVectors.load(path)
    expected = {
        "n_vectors": 3, "order": "quadratic", "orthogonal": "soft", "radius": 4.0,
        "positions": [-2, None, None], "steps": 3, "start": "jacobian",
    }  # fmt: skip
    assert dict(found.story["hyperparameters"]) == expected
    assert found.story["seed"] == 3
    f = tm.ActivationMap.from_prompts(tm.load_model(model_folder), PROMPT, 1, 4, chat=True)
    same = {"positions": slice(-2, None), "steps": 3, "start": "jacobian", "seed": 3}
    python = tm.dct(f, 3, "quadratic", "soft", radius=4.0, **same)
    torch.testing.assert_close(found.vectors, python.vectors)
    written = path.stat().st_mtime_ns
    again = discover(model_folder, tmp_path, *arguments)
    assert again.exit_code == 0, again.output
    assert "holds 3 vectors of this search." in one_line(again.stderr)
    assert path.stat().st_mtime_ns == written
    other = discover(model_folder, tmp_path, *arguments[:-1], "--set=seed=4")
    assert other.exit_code == 1
    assert "seed=3 (here 4)" in one_line(other.stderr)
    assert "Finding vectors" not in other.stderr  # told before the work
    other = discover(model_folder, tmp_path, "--method=dct", "--set=order=linear")
    assert "order='quadratic' (here 'linear')" in one_line(other.stderr)


@pytest.mark.filterwarnings("ignore:the mean cosine")
def test_a_contrastive_vector_from_the_shell(model_folder: Path, tmp_path: Path) -> None:
    without = ("What a horrid day!", "This is awful.")
    prompts = ("What a lovely day!", "This is great.")

    def contrast(*arguments: str, other: tuple[str, ...] = without) -> Result:
        options = [
            f"--model={model_folder}", "--source-layer=1", "--target-layer=4", "--out",
            str(tmp_path), "--max-new-tokens=3", *(f"--other={text}" for text in other),
        ]  # fmt: skip
        command = ["discover", *prompts, "--method=contrastive", *options, *arguments]
        return CliRunner().invoke(app, command)

    result = contrast("--set=estimator=principal")
    assert result.exit_code == 0, result.output
    found = tm.SteeringVectors.load(tmp_path / "vectors.safetensors")
    model = tm.load_model(model_folder)
    maps = [
        tm.ActivationMap.from_prompts(model, list(some), 1, 4, chat=True)
        for some in (prompts, without)
    ]
    torch.testing.assert_close(found.vectors, tm.contrastive(*maps, "principal").vectors)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in without)
    again = contrast("--set=estimator=principal")
    assert again.exit_code == 0, again.output
    assert "holds 1 vector of this search." in one_line(again.stderr)
    others = contrast("--set=estimator=principal", other=("This is bad.", "No."))
    assert others.exit_code == 1
    assert "(here ['This is bad.', 'No.'])" in one_line(others.stderr)
    assert "Loading" not in others.stderr
    # From Python, too.
    elsewhere = tm.ActivationMap.from_prompts(model, ["This is bad.", "No."], 1, 4, chat=True)
    with pytest.raises(tm.errors.DifferentSearch, match="other="):
        tm.Run(tmp_path).keep(tm.contrastive, maps[0], 1, other=elsewhere, estimator="principal")
    assert contrast("--set=estimator=mean").exit_code == 1


@pytest.mark.slow
def test_measuring_and_the_page_need_no_search(model_folder: Path, tmp_path: Path) -> None:
    assert discover(model_folder, tmp_path).exit_code == 0
    result = run_command("page", tmp_path, "--side-effects")
    assert result.exit_code == 0, result.output
    measured = pd.read_csv(tmp_path / "side_effects.csv")
    header, *rows = [line for line in result.stdout.splitlines() if "│" in line or "┃" in line]
    assert "specificity" in header
    assert "loss (nats)" in header
    for row, specificity in zip(rows, measured["specificity"], strict=True):
        assert f"{specificity:#.3g}" in row
    run = tm.Run(tmp_path)
    model, _ = run.load()
    written = (tmp_path / "side_effects.csv").stat().st_mtime_ns
    assert run.side_effects(model)["vector"].tolist() == [0, 1, 2]
    assert (tmp_path / "side_effects.csv").stat().st_mtime_ns == written
    (tmp_path / "report.html").unlink()
    result = run_command("page", tmp_path, "--max-new-tokens=2")
    assert result.exit_code == 0, result.output
    assert "<h2>Side effects" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert tm.Run(tmp_path).settings["max_new_tokens"] == 2
    assert run_command("page", tmp_path / "nowhere").exit_code == 1
    assert not (tmp_path / "nowhere").exists()


def test_numbers_that_are_not_finite_end_in_one_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise FloatingPointError("f: not finite")

    monkeypatch.setattr(tm.Run, "keep", fails)
    result = discover(model_folder, tmp_path)
    assert isinstance(result.exception, SystemExit)
    assert "Error: f: not finite" in result.stderr
