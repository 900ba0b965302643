"""SteeringVectors: slicing, arithmetic, the file, and files that are not ours."""

import copy
import json
import math
import pickle
import random
import resource
import struct
import time

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import tl_melbo as tm
from tl_melbo.story import make as make_story


def library(n_vectors=5, d_model=8, seed=0, **facts):
    generator = torch.Generator().manual_seed(seed)
    history = torch.randn(n_vectors, 3, generator=generator).double()
    history[0, -1] = math.nan
    return tm.SteeringVectors(
        torch.randn(n_vectors, d_model, generator=generator),
        make_story("melbo", **{"model": "m", "source_layer": 8, "target_layer": 16, **facts}),
        {"objective": torch.arange(float(n_vectors)), "evaluations": torch.full((n_vectors,), 3.0)},
        history,
    )


def same(a, b):
    assert torch.equal(a.vectors, b.vectors)
    assert dict(a.story) == dict(b.story)
    assert a.columns.keys() == b.columns.keys()
    for name in a.columns:
        assert torch.equal(a.columns[name], b.columns[name])
    torch.testing.assert_close(a.history, b.history, rtol=0, atol=0, equal_nan=True)


def test_indexing_keeps_numbers_and_story():
    found = library()
    one = found[3]
    assert len(one) == 1
    assert torch.equal(one.vectors[0], found.vectors[3])
    assert one.objective.tolist() == [3.0]
    assert one.table()["index"].tolist() == [3]
    assert found[-1].table()["index"].tolist() == [4]
    assert found[1:3].table()["index"].tolist() == [1, 2]
    assert found[::-1].table()["index"].tolist() == [4, 3, 2, 1, 0]
    assert found[[4, 0]].table()["index"].tolist() == [4, 0]
    assert found[found.objective > 2].table()["index"].tolist() == [3, 4]
    assert [len(v) for v in found] == [1] * 5
    assert len(found[:0]) == 0
    assert dict(one.story) == dict(found.story)


def test_the_columns_keep_their_order_on_disk(tmp_path):
    codes, numbers = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    columns = {"objective": numbers, "evaluations": codes, "gain": numbers, "converged": codes}
    story = {"categories": {"converged": ["no"]}}
    found = tm.SteeringVectors(torch.ones(2, 3), story, columns, torch.ones(2, 4))
    found.save(tmp_path / "vectors.safetensors")
    loaded = tm.SteeringVectors.load(tmp_path / "vectors.safetensors")
    assert [*loaded.table()] == [*found.table()]
    assert [*loaded.columns] == ["index", "objective", "evaluations", "gain", "converged"]


@pytest.mark.parametrize("order", ["7", '{"vectors": 1}', "[1, 2]", "[", '[["vectors"]]'])
def test_an_order_of_columns_that_makes_no_sense_is_damage(tmp_path, order):
    path = tmp_path / "vectors.safetensors"
    metadata = {"format": "tl_melbo.vectors", "format_version": "1", "story": "{}"}
    save_file({"vectors": torch.ones(2, 3)}, path, {**metadata, "order": order})
    with pytest.raises(tm.errors.Damaged):
        tm.SteeringVectors.load(path)
    # Names of columns that are not there do no harm.
    save_file({"vectors": torch.ones(2, 3)}, path, {**metadata, "order": '["x", "vectors", "x"]'})
    assert len(tm.SteeringVectors.load(path)) == 2


@pytest.mark.parametrize("index", [5, -6, [0, 9]])
def test_index_outside_is_named(index):
    with pytest.raises(IndexError, match="the library holds 5 vectors, numbered 0 to 4"):
        library()[index]


@pytest.mark.parametrize("index", [True, 1.5, "a"])
def test_index_of_another_type_is_refused(index):
    with pytest.raises(TypeError):
        library()[index]


@given(scale=st.floats(-100, 100).filter(lambda s: abs(s) > 1e-3))
def test_arithmetic(scale):
    found = library()
    assert torch.equal((scale * found).vectors, found.vectors * scale)
    assert torch.equal((found * scale).vectors, (scale * found).vectors)
    torch.testing.assert_close((found / scale).vectors, found.vectors / scale)
    assert torch.equal((-found).vectors, -found.vectors)
    # What was measured of the unscaled vectors does not hold for the scaled ones.
    assert (scale * found).objective is None
    assert (scale * found).history is None
    assert (2 * (scale * found)).table()["scale"].tolist() == pytest.approx([2 * scale] * 5)


def test_arithmetic_refuses_what_is_not_a_number():
    for bad in ("2", True, torch.ones(5), None):
        with pytest.raises(TypeError):
            library() * bad
    with pytest.raises(ValueError, match="scale=nan"):
        library() * math.nan
    with pytest.raises(ZeroDivisionError):
        library() / 0


def test_is_frozen_and_owns_its_tensors():
    vectors = torch.ones(2, 3)
    found = tm.SteeringVectors.from_tensor(vectors)
    vectors.zero_()
    assert (found.vectors == 1).all()
    with pytest.raises(AttributeError):
        found.vectors = vectors
    with pytest.raises(TypeError):
        found.story["model"] = "x"


def test_concatenate():
    both = tm.concatenate([library(2), library(3, seed=1)])
    assert len(both) == 5
    assert both.table()["index"].tolist() == [0, 1, 2, 3, 4]
    assert both.objective.tolist() == [0, 1, 0, 1, 2]
    assert both.story["source_layer"] == 8
    assert [p["n_vectors"] for p in both.story["parts"]] == [
        2,
        3,
    ]
    mixed = tm.concatenate([library(1), tm.SteeringVectors.from_tensor(torch.ones(8))])
    assert mixed.objective.isnan().tolist() == [False, True]
    assert mixed.story["model"] == "m"
    assert mixed.history.shape == (2, 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (library(model="other"), r"differ in model: \['m', 'other'\]"),
        (library(source_layer=3), r"differ in source_layer"),
        (library(d_model=4), r"differ in d_model"),
    ],
)
def test_concatenate_refuses_vectors_of_different_places(other, message):
    with pytest.raises(ValueError, match=message):
        tm.concatenate([library(), other])


def test_concatenate_refuses_nothing_and_tensors():
    with pytest.raises(ValueError, match="none given"):
        tm.concatenate([])
    with pytest.raises(TypeError, match=r"libraries\[1\] is a tensor float32"):
        tm.concatenate([library(), torch.ones(1, 8)])


def test_save_and_load_give_the_same_back(tmp_path):
    found = library(prompts=["Ünïcode ☃", "\n"])
    found.save(tmp_path / "v.safetensors")
    same(tm.SteeringVectors.load(tmp_path / "v.safetensors"), found)
    scaled = -0.5 * found[1:3]
    scaled.save(tmp_path / "v.safetensors")
    loaded = tm.SteeringVectors.load(tmp_path / "v.safetensors")
    assert loaded.table().equals(scaled.table())
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v.safetensors"
    library().save(path)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tl_melbo.vectors_file.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        library(seed=1).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_save_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="create the folder first"):
        library().save(tmp_path / "no" / "v.safetensors")
    with pytest.raises(IsADirectoryError):
        library().save(tmp_path)


def test_load_names_what_is_wrong(tmp_path):
    path = tmp_path / "v.safetensors"
    load = tm.SteeringVectors.load
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(path)
    save_file({"vectors": torch.ones(2, 3)}, path)
    with pytest.raises(ValueError, match="not one that tl_melbo saved"):
        load(path)
    metadata = {"format": "tl_melbo.vectors", "format_version": "1"}
    save_file({"vectors": torch.ones(2, 3)}, path, metadata)
    with pytest.raises(ValueError, match="lacks its story"):
        load(path)
    save_file({"vectors": torch.ones(2, 3)}, path, {**metadata, "format_version": "2"})
    with pytest.raises(ValueError, match="upgrade tl_melbo"):
        load(path)
    for story in ("{", "[]", '{"method": 1}', "[" * 100_000):
        save_file({"vectors": torch.ones(2, 3)}, path, {**metadata, "story": story})
        with pytest.raises(ValueError, match="safetensors"):
            load(path)
    story = json.dumps({"method": "melbo"})
    for tensors in (
        {"other": torch.ones(2, 3)},
        {"vectors": torch.ones(3)},
        {"vectors": torch.ones(2, 3, dtype=torch.int64)},
        {"vectors": torch.full((2, 3), math.nan)},
        {"vectors": torch.ones(2, 3), "column.objective": torch.ones(3)},
        {"vectors": torch.ones(2, 3), "history": torch.ones(3, 3)},
    ):
        save_file(tensors, path, {**metadata, "story": story})
        with pytest.raises(ValueError, match=r"v\.safetensors"):
            load(path)


def test_load_refuses_damaged_files(tmp_path):
    path = tmp_path / "v.safetensors"
    library().save(path)
    whole = path.read_bytes()
    huge = struct.pack("<Q", 2**62) + whole[8:]
    for damaged in (b"", whole[:5], whole[:40], whole[:-4], whole + b"x", huge, b"\x80\x04pickle"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"v\.safetensors"):
            tm.SteeringVectors.load(path)


def test_two_hundred_mutated_files_are_refused_fast_and_small(tmp_path):
    """Cut, lengthened, and with bytes changed anywhere: our error, or what is still a library."""
    path = tmp_path / "v.safetensors"
    library().save(path)
    whole, clock = path.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    messages, slowest = [], 0.0
    process = psutil.Process()
    before = process.memory_info().rss
    for number in range(200):
        damaged = bytearray(whole)
        if number % 4 == 0:
            del damaged[clock.randrange(len(damaged)) :]
        elif number % 4 == 1:
            at = clock.randrange(len(damaged))
            damaged[at:at] = clock.randbytes(clock.randrange(1, 64))
        else:
            end = header if number % 4 == 2 else len(damaged)
            for _ in range(clock.randrange(1, 9)):
                damaged[clock.randrange(end)] = clock.randrange(256)
        path.write_bytes(damaged)
        start = time.perf_counter()
        try:
            tm.SteeringVectors.load(path)
        except ValueError as error:
            messages.append(str(error))
        slowest = max(slowest, time.perf_counter() - start)
    assert len(messages) > 120
    assert all("v.safetensors" in message for message in messages)
    assert slowest < 1
    assert process.memory_info().rss - before < 100 * 2**20


def test_from_tensor_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match=r"vectors \[1\] hold values that are not finite"):
        tm.SteeringVectors.from_tensor(torch.tensor([[1.0], [math.inf]]))


def test_shows_itself():
    found = library(model="<b>bold</b>")
    assert "5 vectors of width 8" in repr(found)
    assert "layer 8 -> 16" in repr(found)
    page = found._repr_html_()
    assert "&lt;b&gt;bold" in page
    assert "<b>bold" not in page
    assert "<table" in page
    assert "0 vectors" in repr(found[:0])
    assert "<table" in found[:0]._repr_html_()


def test_table_has_the_promised_columns():
    table = library().table()
    assert list(table.columns[:3]) == ["index", "norm", "objective"]
    torch.testing.assert_close(torch.tensor(table["norm"].to_numpy()), library().norms)


def test_copies_and_pickles():
    found = library()
    same(copy.deepcopy(found), found)
    same(pickle.loads(pickle.dumps(found)), found)


@pytest.mark.parametrize("bad", [[[1.0]], torch.ones(3), torch.ones(2, 3, dtype=torch.int64), None])
def test_what_is_not_a_matrix_is_refused(bad):
    with pytest.raises(TypeError, match="vectors"):
        tm.SteeringVectors(bad)


@pytest.mark.parametrize("fact", [object(), math.nan, {1, 2}, torch.ones(1)])
def test_a_story_that_json_cannot_hold_is_named(fact):
    with pytest.raises((TypeError, ValueError), match=r"story: .*; pass what JSON can hold"):
        tm.SteeringVectors(torch.ones(1, 2), {"fact": fact})


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        tm.SteeringVectors(torch.full((1, 3), math.nan))
    with pytest.raises(ValueError, match="scale"):
        library() * 3e38


@pytest.mark.parametrize(
    "fact",
    [
        {"hyperparameters": None},
        {"hyperparameters": {"positions": [0, 0, 0]}},
        {"prompts": 1},
        {"source_layer": "1"},
        {"target_layer": -1},
        {"model": ["a"]},
        {"chat": "yes"},
        {"parts": [1]},
        {"categories": {"stopped": 3}},
    ],
)
def test_load_refuses_a_story_that_makes_no_sense(tmp_path, fact):
    path = tmp_path / "v.safetensors"
    metadata = {"format": "tl_melbo.vectors", "format_version": "1"}
    metadata["story"] = json.dumps({"method": "melbo", **fact})
    save_file({"vectors": torch.ones(2, 3)}, path, metadata)
    with pytest.raises(ValueError, match="make no sense"):
        tm.SteeringVectors.load(path)


def test_load_refuses_columns_that_we_do_not_write(tmp_path):
    path = tmp_path / "v.safetensors"
    metadata = {"format": "tl_melbo.vectors", "format_version": "1", "story": '{"method": "melbo"}'}
    for name, column in (
        ("norm", torch.ones(2)),
        ("objective", torch.ones(2, dtype=torch.bfloat16)),
        ("index", torch.full((2,), math.nan)),
    ):
        save_file({"vectors": torch.ones(2, 3), f"column.{name}": column}, path, metadata)
        with pytest.raises(ValueError, match=f"column '{name}'"):
            tm.SteeringVectors.load(path)
    metadata["story"] = '{"method": "melbo", "seed": ' + "9" * 5000 + "}"
    save_file({"vectors": torch.ones(2, 3)}, path, metadata)
    with pytest.raises(ValueError, match=r"v\.safetensors"):
        tm.SteeringVectors.load(path)


def crafted(path, header, data=b""):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_what_a_header_promises_is_checked_before_memory_is_taken(tmp_path):
    path = tmp_path / "v.safetensors"
    facts = {"format": "tl_melbo.vectors", "format_version": "1", "story": "{}"}
    flat = {"dtype": "F32", "data_offsets": [0, 0]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for entries in (
        {"vectors": {**flat, "shape": [200_000_000, 0]}},
        {"vectors": {**flat, "shape": [10**13, 0]}},
        {"vectors": {**flat, "shape": [0, 8]}}
        | {f"column.{i}": {**flat, "shape": [0]} for i in range(5000)},
        {"vectors": "none"},
    ):
        crafted(path, {"__metadata__": facts, **entries})
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"v\.safetensors"):
            tm.SteeringVectors.load(path)
        assert time.monotonic() - start < 1
    lists = {**facts, "story": '{"method": "x", "y": [' + "[]," * 5_000_000 + "[]]}"}
    crafted(path, {"__metadata__": lists, "vectors": {**flat, "shape": [0, 8]}})
    with pytest.raises(ValueError, match="not a safetensors file"):
        tm.SteeringVectors.load(path)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000  # kilobytes, the test's own strings included


@pytest.mark.parametrize(
    ("columns", "story", "message"),
    [
        ({"index": torch.tensor([0, -1])}, {}, "'index' does not hold numbers of vectors"),
        ({"stopped": torch.tensor([0, 7])}, {"categories": {"stopped": ["a"]}}, "codes without"),
        ({}, {"theta0": "x"}, "its theta0 make no sense"),
        ({}, {"parts": "x"}, "its parts make no sense"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, columns, story, message):
    path = tmp_path / "v.safetensors"
    tensors = {"vectors": torch.ones(2, 3)} | {f"column.{n}": c for n, c in columns.items()}
    facts = {"format": "tl_melbo.vectors", "format_version": "1", "story": json.dumps(story)}
    save_file(tensors, path, facts)
    with pytest.raises(ValueError, match=message):
        tm.SteeringVectors.load(path)


def test_what_can_be_saved_can_be_loaded(tmp_path):
    path = tmp_path / "v.safetensors"
    columns = {
        "good": torch.tensor([True, False]), "half": torch.ones(2).half(),
        "small": torch.ones(2, dtype=torch.int8), "double": torch.ones(2).double(),
    }  # fmt: skip
    for library_ in (
        tm.SteeringVectors(torch.eye(2)),
        tm.SteeringVectors(torch.eye(2), {}, columns),
    ):
        library_.save(path)
        same(tm.SteeringVectors.load(path), library_)
    for story in ({"source_layer": -1}, {"method": 3}, {"theta0": "x"}):
        with pytest.raises(ValueError, match=r"story: .*; correct it"):
            tm.SteeringVectors(torch.eye(2), story).save(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(2), 5), "'story' is 5 .int., expected Mapping"),
        (
            (torch.eye(2), {}, {"a": [1, 2]}),
            r"'columns' is {'a': \[1, 2\]} \(dict\), expected",
        ),
        ((torch.eye(2), {}, {3: torch.ones(2)}), "'columns' is {3: tensor"),
        ((torch.eye(2), {}, {"norm": torch.ones(2)}), "columns: 'norm' cannot be the name"),
        (
            (torch.eye(2), {}, {"a": torch.ones(2).cfloat()}),
            "a torch.complex64 tensor",
        ),
        ((torch.eye(2), {}, {}, [1]), "history"),
        ((torch.eye(2).to_sparse(),), "vectors: a sparse tensor"),
        ((torch.ones(2, 3, device="meta"),), "vectors: a sparse tensor, or one without numbers"),
        ((torch.ones(2, 0),), "a vector has at least one number"),
    ],
)
def test_a_library_of_something_else_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tm.SteeringVectors(*arguments)


def test_what_a_file_says_cannot_steer_a_terminal():
    found = library(model="evil\x1b]0;title\x07 \u202e")
    assert not {"\x1b", "\x07", "\u202e"} & {*repr(found), *found._repr_html_()}
