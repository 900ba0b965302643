"""Sweeps in one process: what a grid is, what is kept, what a failure or an end costs."""

import errno
import json
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

import tl_melbo as tm
from tests.conftest import PROMPT, wait_for
from tests.tiny_models import tiny_hf, tokenizer
from tl_melbo import plots
from tl_melbo.cli import app
from tl_melbo.sweeps._cell import take
from tl_melbo.sweeps._grid import cells_of, read_grid
from tl_melbo.sweeps._ray import _connected
from tl_melbo.sweeps._store import Store, failed

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("cached_models")


def asked(model: Any, **more: Any) -> dict[str, Any]:
    small = {"source_layer": 1, "target_layer": 4, "n_vectors": 2, "steps": 2, "radius": 4.0}
    return {"model": str(model), "prompt": PROMPT} | small | more


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such small searches."""
    monkeypatch.setattr("tl_melbo.sweeps._sweep._write_page", lambda *_: None)


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Bit for bit, but for how long it took."""
    some = [pd.DataFrame(table).drop(columns="seconds") for table in (one, other)]
    pd.testing.assert_frame_equal(*some, check_exact=True)


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> tuple[Path, dict[str, Any], pd.DataFrame]:
    """Four searches, of which one fails: no vector so short changes anything."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    grid = asked(model_folder, source_layer=[1, 2], radius=[2.0, 4.0], max_new_tokens=2)
    grid = [grid, asked(model_folder, radius=1e-30)]
    return out, grid, tm.sweep(grid, out)


def test_a_grid_is_all_combinations_in_its_order() -> None:
    grid = {"prompt": ["a", ["b", "c"]], "source_layer": [1, 4], "target_layer": [2, 5], "seed": 3}
    cells = cells_of(grid)
    told = [(c.facts["prompt"], c.facts["source_layer"], c.facts["target_layer"]) for c in cells]
    pairs = [(1, 2), (1, 5), (4, 5)]  # from 4 to 2 there is nothing to search
    assert told == [(prompt, *pair) for prompt in (["a"], ["b", "c"]) for pair in pairs]
    assert {cell.settings["seed"] for cell in cells} == {3}
    assert len({cell.folder for cell in cells}) == len(cells)
    # The same search has the same folder, whatever else is searched, and however it is written.
    again = [{"prompt": "z"}, {"seed": "3", "prompt": "a", "source_layer": 4, "target_layer": 5}]
    assert cells_of(again)[1].folder == cells[2].folder
    # More vectors, or completions, are more of the same search.
    more = cells_of({**again[1], "n_vectors": 64, "max_new_tokens": 9})[0]
    assert (more.folder, more.n_vectors, more.max_new_tokens) == (cells[2].folder, 64, 9)
    python = {"prompt": "a", "positions": slice(-3, None), "radius": 4}
    shell = {"prompt": "a", "positions": "-3:", "radius": "4.0"}
    assert cells_of(python) == cells_of(shell)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "grid: expected options"),
        ({"source_layer": 3}, "grid: needs a prompt"),
        ({"prompt": "a", "radus": 3}, "grid: no option 'radus' .* did you mean 'radius'"),
        ({"prompt": "a", "previous": 3}, "no option 'previous'"),
        ([{"prompt": "a"}, {"prompts": "a"}], r"grid\[1\]: no option 'prompts'.*'prompt'"),
        ({"prompt": "a", "method": "melbow"}, "grid: method='melbow': did you mean 'melbo'"),
        ({"prompt": "a", "method": "melbo_ortho"}, "needs theta0"),
        ({"prompt": "a", "method": ["melbo", "jacobian"], "steps": 3}, "jacobian.*no such setting"),
        ({"prompt": "a", "radius": ["x", 2]}, r"grid with radius='x': radius='x': expected"),
        ({"prompt": "a", "radius": -1}, "radius=-1"),
        ({"prompt": "a", "seed": [*range(9999)], "radius": [1, 2, 3]}, "29,997 searches; at most"),
        ({"prompt": "a", "seed": []}, "seed is an empty list"),
        ({"prompt": " "}, r"grid: prompt\[0\]=' ': a text needs"),
        ({"prompt": 3}, "prompt=3: expected a text, or a list"),
        ({"prompt": "a", "chat": "maybe"}, "chat='maybe': expected true or false"),
        ({"prompt": "a", "dtype": "int8"}, "dtype='int8': expected"),
        ({"prompt": "a", "model": 3}, "model=3: a hub id"),
        ({"prompt": "a", "source_layer": 9, "target_layer": 9}, "the source comes before"),
        ({"prompt": "a", "source_layer": -1, "target_layer": [2, 3]}, "the first layer is 0"),
        ({"prompt": "a", "source_layer": [8, 9], "target_layer": 3}, "comes before any target"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"prompt": "a", "name": "../b"}, "name='../b': names a folder"),
        ({"prompt": "a", "name": "Sweep.html"}, "no 'sweep.' at the start"),
        ({"prompt": "a", "n_vectors": [2, 3]}, r"n_vectors=2 and .*n_vectors=3: both are kept"),
        (
            [{"prompt": "a", "name": "b"}, {"prompt": "b", "name": "b"}],
            "both are kept in 'b', their name; .* give each",
        ),
    ],
)
def test_a_bad_grid_is_told_before_any_work(grid: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tm.sweep(grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vectors_are_those_of_the_method(
    swept: tuple[Path, dict, pd.DataFrame], model_folder: Path
) -> None:
    out, _, table = swept
    assert [*table["status"]] == ["done"] * 4 + ["failed"]
    assert "ValueError: radius: a random vector of this norm" in table["error"].iloc[-1]
    assert table["kl_max"].isna().tolist() == [False] * 4 + [True]
    model = tm.load_model(model_folder)
    for row in table.iloc[:4].to_dict("records"):
        layers = row["source_layer"], row["target_layer"]
        f = tm.ActivationMap.from_prompts(model, PROMPT, *layers, chat=True)
        expected = tm.melbo(f, 2, row["radius"], steps=2)
        found = tm.SteeringVectors.load(out / row["folder"] / "vectors.safetensors")
        assert torch.equal(found.vectors, expected.vectors)
        assert row["measure_max"] == float(expected.columns["objective"].max())
        kl = tm.analysis.kl_divergence(model, PROMPT, expected)
        assert row["kl_max"] == float(kl.max())
        texts = pd.read_csv(out / row["folder"] / "completions.csv")
        strongest = texts[(texts["vector"] == int(kl.argmax())) & (texts["scale"] == 1)]
        assert row["completion"] == strongest["completion"].fillna("").iloc[0]
    # A row of the table is a run of its own.
    run = tm.Run(out / table["folder"].iloc[0])
    assert len(run.found) == 2
    assert run.load()[1].target_layer == 4


@pytest.mark.usefixtures("no_page")
def test_the_same_call_searches_only_what_lacks(
    swept: tuple[Path, dict, pd.DataFrame], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, grid, table = shutil.copytree(swept[0], tmp_path / "out"), *swept[1:]
    assert_same(pd.read_parquet(out / "sweep.parquet"), pd.DataFrame(table))
    searched = []
    keep = tm.Run.keep
    monkeypatch.setattr(
        tm.Run, "keep", lambda *a, **b: searched.append(a[0].folder) or keep(*a, **b)
    )
    again = tm.sweep(grid, out)
    assert [path.name for path in searched] == [table["folder"].iloc[-1]], "the one that failed"
    assert_same(again, table)
    searched.clear()
    some = tm.sweep({**grid[0], "n_vectors": 3, "radius": 4.0, "source_layer": 1}, out)
    assert len(searched) == 1
    assert some["found"].tolist() == [3]
    before = tm.sweep(grid[0], out, progress=False)["vectors_sha256"]
    assert before.equals(table["vectors_sha256"].iloc[:4]), "three are more of the two"


class Stop(BaseException):
    """As Ctrl-C comes, at a moment of our choice."""


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("place", ["folder", "memory://"])
def test_a_sweep_that_was_stopped_goes_on(place: str, model_folder: Path, tmp_path: Path) -> None:
    grid = asked(model_folder, seed=[0, 1], n_vectors=3)
    whole = tm.sweep(grid, tmp_path / "whole")
    out = f"{place}{tmp_path}/out" if "://" in place else str(tmp_path / "out")
    told: list[tuple[float, float]] = []

    def stop(done: float, total: float) -> None:
        told.append((done, total))
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        tm.sweep(grid, out, on_progress=stop)
    assert told[0] == (0, 6)
    assert all(one <= other for one, other in pairwise(told))
    store, second = Store(out), whole["folder"].iloc[1]
    status = [*pd.read_parquet(_fetched(store, "sweep.parquet", tmp_path))["status"]]
    assert status == ["done", "waiting"]
    with store.folder(second) as (folder, _):
        kept = tm.SteeringVectors.load(folder / "vectors.safetensors")
    assert len(kept) == 2, "every vector is kept as it is found"
    told.clear()
    assert_same(tm.sweep(grid, out, on_progress=lambda *c: told.append(c)), whole)
    assert told[0] == (3, 6)
    assert told[-1] == (6, 6)
    with store.folder(second) as (folder, _):
        found = tm.SteeringVectors.load(folder / "vectors.safetensors")
    assert found.story["date"] == kept.story["date"], "begun anew"
    assert store.read("missing") is None


@pytest.mark.usefixtures("no_page")
def test_damaged_vectors_of_a_search_that_never_ended_are_set_aside(
    model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    grid, store = asked(model_folder, seed=[0]), Store(out)
    table = tm.sweep(grid, out)
    (folder,) = table["folder"]
    data = store.read(f"{folder}/vectors.safetensors") or b""
    store.write(f"{folder}/vectors.safetensors", data[:-4])
    (out / folder / "cell.json").unlink()
    with pytest.warns(UserWarning, match="missing, damaged or changed; they are searched"):
        assert_same(tm.sweep(grid, out), table)
    assert store.read(f"{folder}/vectors.safetensors.damaged") == data[:-4]


@pytest.mark.usefixtures("no_page")
def test_vectors_that_were_lost_are_searched_again_and_told(
    model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    grid, store = asked(model_folder, seed=[0, 1, 2]), Store(out)
    table = tm.sweep(grid, out)
    names = [f"{folder}/vectors.safetensors" for folder in table["folder"]]
    first, second, _ = (store.read(name) or b"" for name in names)
    store.set_aside(names[0])
    store.write(names[1], second[:-4])
    store.write(names[2], first)  # another search's

    def stop(done: float, _: float) -> None:
        if done == 1:
            raise Stop

    with (
        pytest.warns(UserWarning, match="missing, damaged or changed; they are searched") as told,
        pytest.raises(Stop),
    ):
        tm.sweep(grid, out, on_progress=stop)
    assert all(folder in str(told[0].message) for folder in table["folder"])
    assert store.read(names[1] + ".damaged") == second[:-4]
    begun = store.read(names[0]) or b""
    assert begun not in (b"", first)
    counts: list[tuple[float, float]] = []
    # Not lost again, since some vectors of a new search are there; nobody is warned.
    assert_same(tm.sweep(grid, out, on_progress=lambda *c: counts.append(c)), table)
    assert counts[0] == (0, 6)
    assert _date(store.read(names[0]) or b"", tmp_path) == _date(begun, tmp_path)
    assert_same(tm.sweep(grid, out), table)


def _date(data: bytes, folder: Path) -> str:
    path = folder / "read.safetensors"
    path.write_bytes(data)
    return tm.SteeringVectors.load(path).story["date"]


@pytest.mark.usefixtures("no_page")
def test_a_name_that_another_search_has_leaves_its_record(
    swept: tuple[Path, dict, pd.DataFrame], tmp_path: Path
) -> None:
    out, grid, table = shutil.copytree(swept[0], tmp_path / "out"), *swept[1:]
    name = table["folder"].iloc[0]
    before = (out / name / "cell.json").read_bytes()
    again = tm.sweep({**grid[0], "radius": 5.0, "source_layer": 1, "name": name}, out)
    assert "holds vectors of another search" in again["error"].iloc[0]
    assert (out / name / "cell.json").read_bytes() == before


@pytest.mark.usefixtures("no_page")
def test_a_search_that_was_given_up_says_why_and_is_tried_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(cells: Any, *_: Any) -> Any:
        for cell in cells:  # as a worker that dies leaves it: without a word, or a folder
            yield cell, {"cell": dict(cell.facts), **failed(RuntimeError("its worker died"))}

    grid, out = asked(model_folder, n_vectors=1), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tl_melbo.sweeps._sweep.run_local", killed)
        folder = tm.sweep(grid, out)["folder"].iloc[0]
    record = json.loads((out / folder / "cell.json").read_text())
    assert record["error"] == "RuntimeError: its worker died"
    seen: list[str] = []

    def look(*_: float) -> None:
        record = Store(out).record(folder) or {}
        seen.append(record["status"])

    assert [*tm.sweep(grid, out, on_progress=look)["status"]] == ["done"]
    assert seen[0] == "failed"
    assert (Store(out).record(folder) or {})["status"] == "done"


def test_a_place_of_fsspec_replaces_files_whole(tmp_path: Path) -> None:
    store, there = Store(f"file://{tmp_path}/there"), tmp_path / "there" / "a"
    for text in (b"one", b"two"):
        store.write("a/b", text)
        assert store.read("a/b") == text
    assert [path.name for path in there.iterdir()] == ["b"]
    with store.folder("a") as (folder, send):
        assert (folder / "b").read_text() == "two"
        for name in ("c", "cell.json", ".lock"):
            (folder / name).write_text("{}")
        send()
    assert sorted(path.name for path in there.iterdir()) == ["b", "c", "cell.json"]
    with store.folder("a", "c") as (folder, _):
        assert [path.name for path in folder.iterdir()] == ["c"]
    for name in ("a/c", "a/missing"):
        store.set_aside(name)
    assert (store.read("a/c"), store.read("a/c.damaged")) == (None, b"{}")
    for place in (store, Store(tmp_path / "there")):  # what was set aside before stays
        place.write("a/c", b"[]")
        place.set_aside("a/c")
        assert place.read("a/c.damaged") == b"{}"
    aside = [path.read_bytes() for path in there.iterdir() if path.name.startswith("c.")]
    assert sorted(aside) == [b"[]", b"[]", b"{}"]


def test_a_record_is_known_as_it_was_kept_and_not_as_it_was_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = {
        "cell": {"prompt": ["Ü\n\ud800"], "settings": {"radius": 1 / 3, 10: 5e-324, 9: None}},
        "status": "done", "row": {"kl_max": 0.1}, "tags": [(0, "a", "b", "c")], "seconds": 2.0,
    }  # fmt: skip
    assert store.keep("a", record) is record
    known = store.record("a")
    assert known == json.loads(json.dumps(record))
    text = (store.read("a/cell.json") or b"").decode()
    # Written anew by an editor, it is the same.
    store.write("a/cell.json", json.dumps(json.loads(text)).encode())
    assert store.record("a") == known
    changed = [text.replace(*each) for each in (("0.1", '"x"'), (" 0,", " [],"), ("done", "other"))]
    assert text not in changed
    # And what no sweep has written.
    for each in (*changed, "", "{", "[]", "{}", '"a"', "null", '{"sha256": {}}', "[" * 100_000):
        store.write("a/cell.json", each.encode())
        assert store.record("a") is None, each


def _fetched(store: Store, name: str, folder: Path) -> Path:
    (folder / name).write_bytes(store.read(name) or b"")
    return folder / name


@pytest.mark.usefixtures("no_page")
def test_a_full_disk_costs_what_was_searched_then(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = asked(model_folder, seed=[0, 1])
    from tl_melbo import vectors_file

    n_saved, save = 0, vectors_file.save_file

    def fills(*arguments: Any, **more: Any) -> None:
        nonlocal n_saved
        n_saved += 1
        if n_saved > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(vectors_file, "save_file", fills)
        table = tm.sweep(grid, tmp_path / "out")
    assert [*table["status"]] == ["done", "failed"]
    assert "No space left on device" in table["error"].iloc[1]
    folder = tmp_path / "out" / table["folder"].iloc[1]
    assert len(tm.SteeringVectors.load(folder / "vectors.safetensors")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", fills)
        with pytest.raises(OSError, match="No space left"):
            tm.sweep(grid, tmp_path / "out")
    assert_same(tm.sweep(grid, tmp_path / "out"), tm.sweep(grid, tmp_path / "whole"))


@pytest.mark.usefixtures("no_page")
@pytest.mark.slow
def test_each_model_is_loaded_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    tiny_hf("llama", seed=1).save_pretrained(other)
    tokenizer().save_pretrained(other)
    loaded, load = [], tm.load_model
    monkeypatch.setattr(tm, "load_model", lambda n, **o: loaded.append(n) or load(n, **o))
    grid = asked(None, seed=[0, 1], n_vectors=1)
    grid["model"] = [str(model_folder), str(other), "./missing"]
    names = list(reversed(grid))  # the model varies fastest
    table = tm.sweep({name: grid[name] for name in names}, tmp_path / "out")
    assert loaded == [str(model_folder), str(other), "./missing", "./missing"]
    assert [*table["status"]] == ["done", "done", "failed"] * 2
    assert "no such file or folder" in table["error"].iloc[2]
    assert table["vectors_sha256"].nunique() == 4


def test_a_worker_takes_cells_of_its_own_model_first() -> None:
    grid = {"prompt": "a", "model": ["a", "b"], "seed": [0, 1, 2]}
    queue = cells_of(grid) + cells_of({"prompt": "a", "model": "c"})
    taken = [take(queue, ("b", "float32"), []).facts["model"] for _ in range(3)]
    assert taken == ["b", "b", "b"]
    # Three of a are left, and one of c; another worker has a.
    assert take(queue, None, [("a", "float32")] * 1).facts["model"] == "a"
    assert take(queue, None, [("a", "float32")] * 3).facts["model"] == "c"


@pytest.mark.usefixtures("no_page")
@pytest.mark.slow
def test_a_model_may_be_spread(model_folder: Path, tmp_path: Path) -> None:
    """On a machine where all of it has room, nothing is; a .gguf file cannot be."""
    grid = [asked(model_folder, n_vectors=1), asked(tmp_path / "a.gguf")]
    (tmp_path / "a.gguf").touch()
    spread, plain = (tm.sweep(grid, tmp_path / d, device=d) for d in ("auto", "cpu"))
    assert [*spread["status"]] == ["done", "failed"]
    assert "device_map: " in spread["error"].iloc[1]
    for column in ("measure_max", "kl_max"):
        assert spread[column].iloc[0] == pytest.approx(plain[column].iloc[0], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2}, "workers=2: of engine='ray'"),
        ({"engine": "ray", "gpus": 1.5}, "gpus=1.5: a share of one GPU"),
        ({"engine": "ray", "address": "ray://a:1"}, "expected host:port"),
        ({"threads": 0}, "threads=0: at least 1"),
    ],
)
def test_bad_engines(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tm.sweep({"prompt": "a"}, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="out='nowhere://x'"):
        tm.sweep({"prompt": "a"}, "nowhere://x")
    with pytest.raises(ValueError, match="choose a name without them"):
        tm.sweep({"prompt": "a"}, "memory://a[1]/out")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a file is in the way"):
        tm.sweep({"prompt": "a"}, tmp_path / "file")


def test_a_cluster_that_does_not_answer_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="no cluster answers"):
            tm.sweep({"prompt": "a"}, tmp_path / "out", engine="ray", address=address)
    assert not (tmp_path / "out").exists()


def test_an_address_is_not_ignored_where_a_cluster_was_joined() -> None:
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    for address in (None, "auto", "10.0.0.1:6379"):
        with _connected(ray, address, 1, None):
            pass
    with (
        pytest.raises(ValueError, match=r"has joined the cluster at '10\.0\.0\.1:6379'"),
        _connected(ray, "10.0.0.2:6379", 1, None),
    ):
        pass


@pytest.mark.usefixtures("no_page")
def test_the_command(model_folder: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "sweep.yaml"
    good, bad = asked(model_folder, n_vectors=1), asked(model_folder, radius=1e-30)
    file.write_text(json.dumps([good, bad]))
    command = ["sweep", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    assert result.stdout.splitlines()[-1] == str(out / "sweep.html")
    assert "1 search of 2 failed" in result.stderr
    for cell in cells_of([good, bad]):  # each row tells its folder
        assert f" *{cell.folder[-10:]} " in result.stdout
    file.write_text(json.dumps(good))
    assert CliRunner().invoke(app, command).exit_code == 0
    for text, message in (("positions: -3:", "not YAML"), ("", "expected options")):
        file.write_text(text)
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, [*command, "--workers=2"])
    assert result.exit_code == 1
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "none.yaml"), "--out", str(out)])
    # Nothing over it: no search has begun.
    assert result.stderr.startswith("Error: grid=")
    assert "no such file" in result.stderr


def test_figures_tell_what_they_show(swept: tuple[Path, dict, pd.DataFrame]) -> None:
    table = swept[2]
    layers = plots.sweep_layers(table, "kl_max")
    values = table.iloc[:4].groupby("source_layer")["kl_max"].median()
    assert layers.data[0].z.tolist() == [values.tolist()]
    assert "2 pairs of layers" in layers.layout.meta["alt"]
    radius = plots.sweep_radius(table, "measure_median")
    assert [[*trace.x] for trace in radius.data] == [[2.0, 4.0]] * 2
    assert [trace.name for trace in radius.data] == ["1 → 4", "2 → 4"]
    assert "median objective against radius. 1 → 4: " in radius.layout.meta["alt"]
    with pytest.raises(ValueError, match="no search of it has kl_max"):
        plots.sweep_layers(table.iloc[4:], "kl_max")
    with pytest.raises(ValueError, match=r"pass the table that tm\.sweep returns"):
        plots.sweep_radius(pd.DataFrame({"a": [1]}))


@pytest.mark.browser
def test_the_page_draws_itself_and_asks_nobody(
    driver: Any, swept: tuple[Path, dict, pd.DataFrame]
) -> None:
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get((swept[0] / "sweep.html").as_uri())
    wait_for(driver, "return document.documentElement.dataset.ready !== undefined")
    assert driver.get_log("browser") == []
    asked = [
        event["params"]["request"]["url"]
        for entry in driver.get_log("performance")
        if (event := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert not [url for url in asked if url.startswith(("http", "ws"))]
    drawn = (
        "return [...document.querySelectorAll('.plot')].filter(p => p.querySelector('svg')).length"
    )
    assert driver.execute_script(drawn) == 7
    rows = driver.execute_script("return document.querySelectorAll('#searches tbody tr').length")
    assert rows == 5
    grid = "return document.querySelector('.plot').layout.xaxis.gridcolor"
    day = driver.execute_script(grid)
    night = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", night)
    try:
        wait_for(driver, f"{grid} !== '{day}'")
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_examples_are_what_they_say() -> None:
    folder = ROOT / "examples" / "sweep"
    cells = cells_of(read_grid(folder / "sweep.yaml"))
    assert len(cells) > 20
    for script in ("slurm.sh", "submit.sh"):
        subprocess.run(["bash", "-n", str(folder / script)], check=True)
        assert "tl-melbo sweep sweep.yaml" in (folder / script).read_text(encoding="utf-8")
    task = yaml.safe_load((folder / "sky.yaml").read_text(encoding="utf-8"))
    assert {"resources", "num_nodes", "setup", "run", "file_mounts"} <= {*task}
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    for path in folder.iterdir():
        assert f"examples/sweep/{path.name}" in page
