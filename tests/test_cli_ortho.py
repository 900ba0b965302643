"""`tl-melbo ortho`: continues what discover left, keeps each vector, and extends the page."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import tl_melbo as tm
from tests.conftest import PROMPT
from tests.test_cli import discover, names, one_line
from tl_melbo import runs
from tl_melbo.cli import app

pytestmark = pytest.mark.usefixtures("cached_models", "by_words")

FAMILY = ["composition.csv", "family.csv", "theta0.safetensors", "vectors.safetensors"]
DATA = r'<script type="application/json" id="data">(.*?)</script>'
HOSTILE = ['=HYPERLINK("x")', "'=1", "''+1", "'plain", "NA", "", "a\rb\r\nc\n", 'x"y', "-1"]


@pytest.fixture(scope="module")
def discovered(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "me"
    assert discover(model_folder, out).exit_code == 0
    return out


@pytest.fixture
def run(discovered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(discovered, tmp_path / "run"))


def ortho(run: Path, *arguments: str, n_vectors: int | None = 3) -> Result:
    options = ["--vector=1", "--steps=4", "--max-new-tokens=3"]
    if n_vectors is not None:
        options.append(f"--n-vectors={n_vectors}")
    return CliRunner().invoke(app, ["ortho", str(run), *options, *arguments])


def test_it_writes_beside_and_extends_the_page(run: Path, loads_anew: None) -> None:
    before = (run / "report.html").read_text(encoding="utf-8")
    completions = (run / "completions.csv").read_bytes()
    result = ortho(run)
    assert result.exit_code == 0, result.output
    assert names(run / "ortho-1") == FAMILY
    assert result.stdout.splitlines()[-1] == str(run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "The family of vector 1" in page
    assert "The family of vector 1" not in before
    assert (run / "completions.csv").read_bytes() == completions
    # The library's own part stays as it was.
    own, earlier = (json.loads(re.findall(DATA, text)[0]) for text in (page, before))
    assert own["rows"] == earlier["rows"]
    assert own["texts"] == earlier["texts"]
    found = tm.SteeringVectors.load(run / "vectors.safetensors")
    family = tm.SteeringVectors.load(run / "ortho-1" / "vectors.safetensors")
    f = tm.ActivationMap.from_prompts(
        tm.load_model(json.loads((run / "settings.json").read_text())["model"]),
        PROMPT, source_layer=1, target_layer=4, chat=True,
    )  # fmt: skip
    expected = tm.melbo_ortho(f, found[1], 3, steps=4)
    assert torch.equal(family.vectors, expected.vectors)
    assert family.table().equals(expected.table())
    with (run / "ortho-1" / "family.csv").open(encoding="utf-8", newline="") as file:
        kinds = [row["kind"] for row in csv.DictReader(file)]
    assert kinds == ["unsteered", "reference", *3 * ["family"], *3 * ["rescaled"], *3 * ["random"]]


@pytest.mark.slow
def test_interrupted_and_continued_is_the_same_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    assert ortho(whole, n_vectors=4).exit_code == 0
    save, saved = tm.SteeringVectors.save, []

    def interrupted(self: tm.SteeringVectors, path: Path) -> None:
        save(self, path)
        saved.append(path)
        if len(saved) == 3:  # theta0, one vector, two vectors
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tm.SteeringVectors, "save", interrupted)
        result = ortho(run, n_vectors=4)
    assert result.exit_code == 130
    assert "2 vectors are kept" in one_line(result.stderr)
    assert "Traceback" not in result.output
    assert len(tm.SteeringVectors.load(run / "ortho-1" / "vectors.safetensors")) == 2
    # What is not measured yet is left out of the page, and nothing stumbles over it.
    assert ortho(run, "--vector=0", n_vectors=1).exit_code == 0
    assert "The family of vector 1" not in (run / "report.html").read_text(encoding="utf-8")
    assert ortho(run, n_vectors=4).exit_code == 0
    one, other = (
        tm.SteeringVectors.load(folder / "ortho-1" / "vectors.safetensors")
        for folder in (run, whole)
    )
    assert torch.equal(one.vectors, other.vectors)
    assert one.table().equals(other.table())
    assert one.story["hyperparameters"] == other.story["hyperparameters"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "The family of vector 0" in page
    assert "The family of vector 1" in page


@pytest.mark.slow
def test_the_same_command_again_searches_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ortho(run).exit_code == 0
    before = (run / "ortho-1" / "vectors.safetensors").read_bytes()
    monkeypatch.setattr(tm, "iter_melbo_ortho", lambda *_, **__: pytest.fail("searched"))
    assert ortho(run).exit_code == 0
    assert (run / "ortho-1" / "vectors.safetensors").read_bytes() == before


@pytest.mark.slow
def test_another_question_refuses_or_overwrites(run: Path) -> None:
    assert ortho(run).exit_code == 0
    before = (run / "ortho-1" / "vectors.safetensors").read_bytes()
    result = ortho(run, "--norm-penalty=0.1")
    assert result.exit_code == 1
    assert "--norm-penalty=0.0 (here 0.1)" in one_line(result.stderr)
    assert "pass --overwrite" in one_line(result.stderr)
    assert (run / "ortho-1" / "vectors.safetensors").read_bytes() == before
    assert ortho(run, "--norm-penalty=0.1", "--overwrite", n_vectors=1).exit_code == 0
    assert len(tm.SteeringVectors.load(run / "ortho-1" / "vectors.safetensors")) == 1


@pytest.mark.slow
def test_a_family_of_vectors_that_were_replaced_is_not_shown_as_theirs(
    run: Path,
    model_folder: Path,
) -> None:
    assert ortho(run).exit_code == 0
    assert discover(model_folder, run, "--seed=5", "--overwrite").exit_code == 0
    result = ortho(run)
    assert result.exit_code == 1
    assert "--overwrite to begin anew" in one_line(result.stderr)
    assert ortho(run, "--vector=0", n_vectors=1).exit_code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "The family of vector 0" in page
    assert "The family of vector 1" not in page


@pytest.mark.slow
def test_all_goes_on_until_nothing_is_left(run: Path) -> None:
    result = ortho(run, "--all", "--steps=3", n_vectors=None)
    assert result.exit_code == 0, result.output
    family = tm.SteeringVectors.load(run / "ortho-1" / "vectors.safetensors")
    assert 3 < len(family) <= 31
    everything = torch.cat(
        [tm.SteeringVectors.load(run / "vectors.safetensors")[1].vectors, family.vectors]
    ).double()
    units = everything / everything.norm(dim=1, keepdim=True)
    assert float((units @ units.T - torch.eye(len(units))).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vector=9"], "--vector=9: "),
        (
            ["--n-vectors=32"],
            "--n-vectors=32: vectors orthogonal to one (--all: as many as there are), from 1 to 31",
        ),
        (
            ["--n-vectors=0"],
            "--n-vectors=0: vectors orthogonal to one (--all: as many as there are), from 1 to 31",
        ),
        (["--all"], "--all, --n-vectors=3: the one or the other"),
        (["--norm-penalty=-1"], "--norm-penalty=-1"),
        (["--norm-penalty=nan"], "--norm-penalty=nan"),
        (["--steps=1"], "--steps=1: at least 2"),
        (["--max-new-tokens=0"], "--max-new-tokens=0: at least 1"),
        (["--model=./nowhere"], "--model=./nowhere: the vectors in"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Path, arguments: list[str], message: str
) -> None:
    before = names(run)
    result = ortho(run, *arguments)
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert message in one_line(result.stderr)
    assert names(run) == before


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    result = ortho(tmp_path)
    assert result.exit_code == 1
    assert "holds no vectors.safetensors; name a folder that" in one_line(result.stderr)


def test_vectors_from_nowhere_are_refused(tmp_path: Path) -> None:
    tm.SteeringVectors.from_tensor(torch.ones(2, 32)).save(tmp_path / "vectors.safetensors")
    result = ortho(tmp_path)
    assert result.exit_code == 1
    assert "its story does not tell model, prompts, source_layer" in one_line(result.stderr)


@pytest.mark.slow
def test_damaged_files_are_named(run: Path) -> None:
    assert ortho(run).exit_code == 0
    for name, content, message in (
        ("ortho-1/vectors.safetensors", b"cut", "vectors.safetensors: not a safetensors file"),
        ("settings.json", b"[", "settings.json: damaged"),
        ("completions.csv", b'vector,"scale', "completions.csv: not a table that tl-melbo wrote"),
    ):
        kept = (run / name).read_bytes()
        (run / name).write_bytes(content)
        result = ortho(run)
        assert result.exit_code == 1, name
        assert message in one_line(result.stderr)
        assert "Traceback" not in result.output
        (run / name).write_bytes(kept)
    assert ortho(run).exit_code == 0
    (run / "ortho-1" / "theta0.safetensors").unlink()
    result = ortho(run)
    assert result.exit_code == 1
    assert "lacks theta0.safetensors; pass --overwrite" in one_line(result.stderr)


def test_texts_come_back_from_a_table_as_they_were(tmp_path: Path) -> None:
    import pandas as pd

    table = pd.DataFrame(
        {
            "size": range(len(HOSTILE)),
            "members": [tuple(range(i)) for i in range(len(HOSTILE))],
            "kl": [0.1] * (len(HOSTILE) - 1) + [float("nan")],
            "completion": HOSTILE,
        }
    )
    runs.save_table(tmp_path / "t.csv", table)
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        cells = [row["completion"] for row in csv.DictReader(file)]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    limit = csv.field_size_limit()
    pd.testing.assert_frame_equal(runs.load_table(tmp_path / "t.csv", ["size"]), table)
    assert csv.field_size_limit() == limit
    with (tmp_path / "t.csv").open("a", encoding="utf-8") as file:
        file.write("1,")
    with pytest.raises(tm.errors.Damaged, match="a row is cut"):
        runs.load_table(tmp_path / "t.csv", ["size"])


@pytest.mark.slow
def test_paths_in_a_story_decide_nothing(run: Path, tmp_path: Path) -> None:
    library = tm.SteeringVectors.load(run / "vectors.safetensors")
    evil = {name: str(tmp_path / "evil") for name in ("path", "folder", "out", "date", "method")}
    versions = {"../evil": "../../evil"}
    story = {**library.story, **evil, "versions": versions}
    replace(library, story=story).save(run / "vectors.safetensors")
    result = ortho(run, n_vectors=1)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert names(run / "ortho-1") == FAMILY


@pytest.mark.slow
def test_a_damaged_family_can_be_begun_anew(run: Path) -> None:
    assert ortho(run).exit_code == 0
    for name in FAMILY:
        (run / "ortho-1" / name).write_bytes(b'"cut')
        result = CliRunner().invoke(app, ["page", str(run)])
        assert result.exit_code == 1
        told = one_line(result.stderr)
        assert "delete the folder ortho-1, or find that family anew with --overwrite" in told
        assert ortho(run, "--overwrite").exit_code == 0, name
    assert "The family of vector 1" in (run / "report.html").read_text(encoding="utf-8")
