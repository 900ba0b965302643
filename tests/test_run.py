"""Runs that survive: killed anywhere and continued, they find what they would have found."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import tiny_bridge
from tl_melbo import run as run_module

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Tell me about yourself."
SETTINGS = {"radius": 2.0, "steps": 6, "seed": 3}


@pytest.fixture
def one_thread():
    """The threads of this process are not there after a fork, so it must not have any."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def f():
    return tm.ActivationMap.from_prompts(tiny_bridge("llama"), PROMPT, 1, 4)


def assert_same(one, other):
    assert torch.equal(one.vectors, other.vectors)
    assert one.columns.keys() == other.columns.keys()
    for name, column in one.columns.items():
        assert torch.equal(column, other.columns[name]), name
    assert torch.equal(one.history.nan_to_num(-1.0), other.history.nan_to_num(-1.0))
    chosen = [library.story["hyperparameters"] for library in (one, other)]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_library_in_parts_is_the_library(f, orthogonal):
    settings = {**SETTINGS, "orthogonal": orthogonal}
    n_vectors = 8 if orthogonal else 70
    whole = tm.melbo(f, n_vectors, **settings)
    parts = list(tm.iter_melbo(f, n_vectors, **settings))
    assert [len(part) for part in parts] == ([1] * 8 if orthogonal else [32, 32, 6])
    assert_same(tm.join_library(parts), whole)
    half = tm.join_library(parts[: len(parts) // 2])
    rest = tm.iter_melbo(f, n_vectors - len(half), previous=half, **settings)
    assert_same(tm.join_library([half, *rest]), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 3.0}, "radius=2.0"),
        ({"seed": 4}, "seed=3"),
        ({"orthogonal": False}, "orthogonal"),
    ],
)
def test_another_search_is_not_continued(f, change, message):
    part = tm.melbo(f, 2, **SETTINGS)
    with pytest.raises(ValueError, match=f"previous: found with.*{message}"):
        tm.iter_melbo(f, 2, previous=part, **{**SETTINGS, **change})
    with pytest.raises(ValueError, match="previous: not in their order"):
        tm.iter_melbo(f, 2, previous=part[[1, 0]], **SETTINGS)
    with pytest.raises(ValueError, match="none twice"):
        tm.join_library([part, part])
    with pytest.raises(tm.errors.DifferentSearch, match=r"previous: holds vectors \[1\], not all"):
        tm.iter_melbo(f, 2, previous=part[1:], **SETTINGS)
    with pytest.raises(tm.errors.DifferentSearch, match="not all from 0 on"):
        tm.iter_melbo(f, 2, previous=tm.melbo(f, 3, **SETTINGS)[[0, 2]], **SETTINGS)


def test_other_arithmetic_goes_on_and_is_told(f, tmp_path):
    run = tm.Run(tmp_path)
    few = run.melbo(f, 2, **SETTINGS)
    whole = tm.melbo(f, 4, **SETTINGS)
    assert few.story["arithmetic"]["threads"] == torch.get_num_threads()
    elsewhere = {**few.story["arithmetic"], "threads": 99, "cpu": "abacus"}
    replace(few, story={**few.story, "arithmetic": elsewhere}).save(run.folder / run_module.VECTORS)
    with pytest.warns(UserWarning, match=r"found with threads=99 \(here \d+\), cpu=abacus \(here"):
        more = run.melbo(f, 4, **SETTINGS)
    assert torch.equal(more.vectors, whole.vectors)
    # Version 0.1 did not tell it, and nothing is to be said.
    known = {name: fact for name, fact in few.story.items() if name not in ("arithmetic", "lost")}
    replace(few, story=known).save(run.folder / run_module.VECTORS)
    assert torch.equal(run.melbo(f, 4, **SETTINGS).vectors, whole.vectors)


@pytest.mark.everywhere
def test_a_run_goes_on_where_it_was(f, tmp_path):
    run, seen = tm.Run(tmp_path / "run"), []
    few = run.melbo(f, 3, **SETTINGS, on_vector=lambda *counts: seen.append(counts))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    seen.clear()
    more = run.melbo(f, 5, **SETTINGS, on_vector=lambda *counts: seen.append(counts))
    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert torch.equal(few.vectors, more.vectors[:3])
    assert_same(more, tm.melbo(f, 5, **SETTINGS))
    assert_same(tm.SteeringVectors.load(tmp_path / "run" / "vectors.safetensors"), more)
    assert torch.equal(run.melbo(f, 2, **SETTINGS).vectors, few.vectors[:2])
    with pytest.raises(ValueError, match=r"holds vectors of another search.*radius=2\.0"):
        run.melbo(f, 5, **{**SETTINGS, "radius": 4.0})


@pytest.mark.everywhere
def test_a_family_goes_on_where_it_was(f, tmp_path):
    run = tm.Run(tmp_path)
    found = run.melbo(f, 2, **SETTINGS)
    few = run.melbo_ortho(f, found[1], 2, steps=5)
    more = run.melbo_ortho(f, found[1], 4, steps=5)
    assert torch.equal(few.vectors, more.vectors[:2])
    assert torch.equal(more.vectors, tm.melbo_ortho(f, found[1], 4, steps=5).vectors)
    assert len(run.melbo_ortho(f, found[1], 3, steps=5)) == 3
    assert (tmp_path / "ortho-1" / "vectors.safetensors").is_file()
    with pytest.raises(ValueError, match=r"another search.*steps"):
        run.melbo_ortho(f, found[1], 4, steps=6)
    (tmp_path / "ortho-0").mkdir()
    more.save(tmp_path / "ortho-0" / "vectors.safetensors")
    found[1].save(tmp_path / "ortho-0" / "theta0.safetensors")
    with pytest.raises(ValueError, match="the family of another vector"):
        run.melbo_ortho(f, found[0], 4, steps=5)


def test_one_vector_that_fails_costs_itself_alone(f, tmp_path):
    class Holed:
        """Not finite near one start."""

        def __init__(self, bad):
            self.bad = bad

        def __getattr__(self, name):
            return getattr(f, name)

        def delta(self, theta):
            hit = (theta - self.bad).norm(dim=-1) < 1e-4
            return f.delta(theta) * torch.where(hit, torch.nan, 1.0)[:, None, None, None]

    settings = {**SETTINGS, "orthogonal": False, "steps": 1}
    starts = tm.melbo(f, 5, **settings).vectors
    with pytest.warns(UserWarning, match=r"vectors \[2\]: the effect.*not finite"):
        found = tm.melbo(Holed(starts[2]), 5, **settings)
    assert found.columns["index"].tolist() == [0, 1, 3, 4]
    assert torch.equal(found.vectors, starts[[0, 1, 3, 4]])


WORKER = """
import sys
import tl_melbo as tm
from tests.tiny_models import tiny_bridge
f = tm.ActivationMap.from_prompts(tiny_bridge("llama"), {prompt!r}, 1, 4)
print("ready", flush=True)
tm.Run(sys.argv[1]).melbo(f, 24, radius=2.0, steps=6, seed=3)
print("done", flush=True)
"""


def start(folder):
    script = textwrap.dedent(WORKER.format(prompt=PROMPT))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("n_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_continued_is_bit_for_bit_the_same(
    f, tmp_path, n_kills, one_thread
):
    """At a random moment of the search, or in the middle of a write.

    The promise: the same machine, the same number of threads, the same versions of the libraries.
    """
    whole = tm.melbo(f, 24, **SETTINGS)
    clock = random.Random(0)
    kills, folder, known, longest = 0, tmp_path / "run", [0], 0.25
    context = torch.multiprocessing.get_context("fork")

    def search():
        tm.Run(folder).melbo(f, 24, **SETTINGS)
        os._exit(0)

    # On a busy machine many kills fall before the first new vector: then there are more of them.
    while kills < n_kills or (len(set(known)) <= n_kills // 4 and kills < 5 * n_kills):
        process = context.Process(target=search)
        process.start()
        time.sleep(clock.uniform(0.0, longest))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        path, n_kept = folder / "vectors.safetensors", known[-1]
        if path.is_file():
            kept = tm.SteeringVectors.load(path)
            assert torch.equal(kept.vectors, whole.vectors[: len(kept)])
            known.append(len(kept))
            if len(kept) == 24:
                path.unlink()
        if known[-1] == n_kept:
            longest *= 1.3  # a slow machine: the kill fell before the first new vector
    assert len(set(known)) > n_kills // 4, "the kills did not fall into the search"
    assert_same(tm.Run(folder).melbo(f, 24, **SETTINGS), whole)
    assert not list(folder.rglob("*.partial"))


@pytest.mark.slow
def test_two_processes_on_one_folder(f, tmp_path):
    process = start(tmp_path)
    try:
        with tm.Run(tmp_path).writing():
            assert process.stdout.readline() == "ready\n"
            assert process.wait(60) != 0
        held = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(f"""
                import time, tl_melbo as tm
                with tm.Run({str(tmp_path)!r}).writing():
                    print("mine", flush=True)
                    time.sleep(600)
            """)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert held.stdout.readline() == "mine\n"
        with pytest.raises(BlockingIOError, match="another process is writing here"):
            tm.Run(tmp_path).melbo(f, 2, **SETTINGS)
        held.kill()
        held.wait()
        assert len(tm.Run(tmp_path).melbo(f, 2, **SETTINGS)) == 2, "a dead process kept the lock"
    finally:
        process.kill()


def test_a_folder_that_is_deleted_meanwhile_hides_no_error_and_is_given_back(tmp_path):
    run = tm.Run(tmp_path / "run")

    def fail():
        with run.writing():
            shutil.rmtree(run.folder)
            raise KeyError("the user's")

    with pytest.raises(KeyError, match="the user's"):
        fail()
    with run.writing(), pytest.raises(BlockingIOError), tm.Run(run.folder).writing():
        pass


def test_a_full_disk_leaves_what_was_there(f, tmp_path, monkeypatch):
    run = tm.Run(tmp_path)
    run.melbo(f, 2, **SETTINGS)
    before = (tmp_path / "vectors.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tl_melbo.vectors_file.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run.melbo(f, 4, **SETTINGS)
    assert (tmp_path / "vectors.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))
    assert_same(run.melbo(f, 4, **SETTINGS), tm.melbo(f, 4, **SETTINGS))


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_a_disk_that_fills_up(f, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        ballast = disk / "ballast"
        run = tm.Run(disk / "run")
        run.melbo(f, 2, **SETTINGS)
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(512))
        with pytest.raises(OSError, match=r"[Nn]o space left"):
            run.melbo(f, 4, **SETTINGS)
        assert len(tm.SteeringVectors.load(disk / "run" / "vectors.safetensors")) == 2
        ballast.unlink()
        assert_same(run.melbo(f, 4, **SETTINGS), tm.melbo(f, 4, **SETTINGS))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.everywhere
def test_what_ran_before_does_not_matter(f):
    """Neither other searches, nor other maps of the model, nor the global random state."""
    first = tm.melbo(f, 3, **SETTINGS)
    torch.manual_seed(5)
    torch.rand(7)
    other = tm.ActivationMap.from_prompts(f.model, ["Bye.", "Hello there!"], 0, 5)
    tm.melbo(other, 2, 1.0)
    list(tm.iter_melbo_ortho(f, first[0], 2, steps=3))
    assert_same(tm.melbo(f, 3, **SETTINGS), first)
    with f.model.hooks(fwd_hooks=[("blocks.3.hook_resid_post", lambda resid, hook: 1.1 * resid)]):
        hooked = tm.melbo(f, 3, **SETTINGS)
        assert not torch.equal(hooked.vectors, first.vectors)
    assert_same(tm.melbo(f, 3, **SETTINGS), first)


def test_mistaken_calls_are_named_and_leave_nothing(f, tmp_path):
    run = tm.Run(tmp_path / "run")
    with pytest.raises(TypeError, match=r"melbo\(\): .* 'radus'; did you mean 'radius'"):
        run.melbo(f, 2, radus=2.0)
    with pytest.raises(TypeError, match=r"melbo_ortho\(\) got multiple .* 'previous'"):
        run.melbo_ortho(f, tm.melbo(f, 1, 2.0, steps=1), 2, previous=None)
    with pytest.raises(ValueError, match=r"radius=-1.0"):
        run.melbo(f, 2, radius=-1.0)
    with pytest.raises(TypeError, match=r"'folder' is None"):
        tm.Run(None)
    assert not (tmp_path / "run").exists()


def test_overwrite_begins_anew_once_the_arguments_are_checked(f, tmp_path):
    run = tm.Run(tmp_path)
    found = run.melbo(f, 3, **SETTINGS)
    family = run.melbo_ortho(f, found[1], 2, steps=4)
    with pytest.raises(ValueError, match="steps=0"):
        run.melbo(f, 3, radius=2.0, steps=0, overwrite=True)
    with pytest.raises(ValueError, match="norm_penalty=-1"):
        run.melbo_ortho(f, found[1], 2, norm_penalty=-1.0, overwrite=True)
    assert torch.equal(run.melbo(f, 3, **SETTINGS).vectors, found.vectors)
    assert torch.equal(run.melbo_ortho(f, found[1], 2, steps=4).vectors, family.vectors)
    other = run.melbo(f, 2, **{**SETTINGS, "seed": SETTINGS["seed"] + 1}, overwrite=True)
    kept = tm.SteeringVectors.load(tmp_path / "vectors.safetensors")
    assert torch.equal(kept.vectors, other.vectors)
    with pytest.raises(ValueError, match="another vector of that number"):
        run.melbo_ortho(f, other[1], 2, steps=4)
    again = run.melbo_ortho(f, other[1], 2, steps=4, overwrite=True)
    assert torch.equal(again.vectors, tm.melbo_ortho(f, other[1], 2, steps=4).vectors)


def test_a_whole_family_is_there(f, tmp_path):
    run = tm.Run(tmp_path)
    theta0 = tm.melbo(f, 1, 20.0, steps=3)
    family = run.melbo_ortho(f, theta0, None, steps=2)
    for n_vectors in (None, len(family), 1):
        again = run.melbo_ortho(f, theta0, n_vectors, steps=2)
        assert torch.equal(again.vectors, family.vectors[:n_vectors])


def test_lost_vectors_do_not_stop_a_run_that_is_continued(f, tmp_path):
    """Also where they are the last ones, or more of them than a search gives up after."""
    settings = {**SETTINGS, "orthogonal": False, "steps": 1}
    starts = tm.melbo(f, 10, **settings).vectors

    class Holed:
        def __init__(self, everywhere=False):
            self.everywhere = everywhere

        def __getattr__(self, name):
            return getattr(f, name)

        def delta(self, theta):
            hit = (torch.cdist(theta, starts[[3, 4, 5, 9]]) < 1e-4).any(-1) | self.everywhere
            return f.delta(theta) * torch.where(hit, torch.nan, 1.0)[:, None, None, None]

    run = tm.Run(tmp_path)
    for n_vectors in (3, 10, 10):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = run.melbo(Holed(), n_vectors, **settings)
        assert any("left out" in str(each.message) for each in caught) == (n_vectors == 10)
    assert found.columns["index"].tolist() == [0, 1, 2, 6, 7, 8]
    assert torch.equal(found.vectors, starts[[0, 1, 2, 6, 7, 8]])
    with pytest.raises(FloatingPointError, match=r"vectors \[0\]: the effect"):
        tm.melbo(Holed(everywhere=True), 1, **settings)


@pytest.mark.everywhere
def test_what_overwrites_replaces_only_what_it_has(f, tmp_path):
    run = tm.Run(tmp_path)
    found = run.melbo(f, 2, **SETTINGS)
    family = run.melbo_ortho(f, found[1], 1, steps=4)
    with pytest.raises(ValueError, match="radius: a random vector of this norm changes nothing"):
        run.melbo(f, 2, radius=1e-30, overwrite=True)
    with pytest.raises(ValueError, match="nothing orthogonal"):
        run.melbo_ortho(f, found[1], 1, norm_penalty=1e9, steps=4, overwrite=True)
    kept = [
        tm.SteeringVectors.load(tmp_path / name / "vectors.safetensors") for name in ("", "ortho-1")
    ]
    assert torch.equal(kept[0].vectors, found.vectors)
    assert torch.equal(kept[1].vectors, family.vectors)


def test_other_peoples_files_stay(f, tmp_path):
    theirs = [tmp_path / ".download.partial", tmp_path / "sub" / f".x.{'0' * 32}.partial"]
    (tmp_path / "sub").mkdir()
    (tmp_path / f".dir.{'0' * 32}.partial").mkdir()
    for path in theirs:
        path.write_text("theirs")
    ours = tmp_path / f".vectors.safetensors.{'0' * 32}.partial"
    ours.write_text("left by a killed process")
    tm.Run(tmp_path).melbo(f, 1, **SETTINGS)
    assert all(path.read_text() == "theirs" for path in theirs)
    assert not ours.exists()


def test_another_model_of_the_same_name_is_refused(tmp_path):
    run = tm.Run(tmp_path)
    for seed in (0, 0, 1):
        f = tm.ActivationMap.from_prompts(tiny_bridge("llama", seed=seed), PROMPT, 1, 4)
        if seed == 0:
            run.melbo(f, 2, **SETTINGS)
            continue
        with pytest.raises(
            ValueError, match="holds vectors of another search, found with weights="
        ):
            run.melbo(f, 4, **SETTINGS)


def test_what_differs_is_told_whole(tmp_path):
    model = tiny_bridge("llama")
    first, second = (
        tm.ActivationMap.from_prompts(model, prompt, 1, 4) for prompt in ("Hi; you", "Hi; me")
    )
    run = tm.Run(tmp_path)
    run.melbo(first, 1, **SETTINGS)
    with pytest.raises(
        ValueError, match=r"prompts=\['Hi; you'\] \(here \['Hi; me'\]\); .*overwrite"
    ):
        run.melbo(second, 1, **SETTINGS)
    (tmp_path / "vectors.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"vectors.safetensors.*pass overwrite=True"):
        run.melbo(first, 1, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"index": torch.tensor([0, 10**12])}}, "not in their order"),
        ({"columns": {"index": torch.tensor([0, 1])}}, "without the columns objective"),
        ({"vectors": torch.ones(2, 32)}, "not orthogonal to each other"),
        ({"vectors": torch.eye(2, 7)}, "7 wide, where the residual stream is 32 wide"),
    ],
)
def test_crafted_libraries_are_not_continued(f, tmp_path, change, message):
    run = tm.Run(tmp_path)
    found = run.melbo(f, 2, **SETTINGS)
    replace(found, **change).save(tmp_path / "vectors.safetensors")
    with pytest.raises(ValueError, match=message):
        run.melbo(f, 3, **SETTINGS)


def test_an_empty_library_is_continued(f, tmp_path):
    found = tm.melbo(f, 2, **SETTINGS)
    found[:0].save(tmp_path / "vectors.safetensors")
    assert torch.equal(tm.Run(tmp_path).melbo(f, 2, **SETTINGS).vectors, found.vectors)


@pytest.mark.everywhere
@pytest.mark.parametrize("search", ["melbo", "melbo_ortho"])
def test_surroundings_do_not_matter(f, search):
    theta0 = tm.melbo(f, 1, **SETTINGS)

    def run():
        if search == "melbo":
            return tm.melbo(f, 2, **SETTINGS).vectors
        return tm.melbo_ortho(f, theta0, 2, steps=5).vectors

    expected = run()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        found = run()
    assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), expected)
    with torch.no_grad():
        assert torch.equal(run(), expected)


def test_a_method_that_finds_all_at_once_tells_its_share(f, tmp_path):
    shares = []
    run = tm.Run(tmp_path)
    run.keep(tm.dct, f, 2, radius=4.0, steps=3, on_share=shares.append)
    assert len(shares) >= 3
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert tm.dct.parts(f, 2, radius=4.0, steps=3).collect().vectors.equal(run.found.vectors)


def test_texts_with_samples_and_scales_are_written_once(tiny_llama, f, tmp_path):
    run, told = tm.Run(tmp_path / "run"), []
    run.melbo(f, 2, **SETTINGS)
    asked = {"max_new_tokens": 2, "n_samples": 2, "temperature": 1.5, "scales": [0.5]}
    texts = run.texts(tiny_llama, on_batch=lambda *counts: told.append(counts), **asked)
    assert len(texts) == 3 + 2 * (2 * 3 + 1)
    written = len(told)
    # What is there is asked for again, or in part, or not at all.
    for some in (asked, {"scales": [0.5]}, {"n_samples": 2}, {}):
        again = tm.Run(run.folder).texts(tiny_llama, on_batch=lambda *c: told.append(c), **some)
        assert again.equals(texts)
    assert len(told) == written
    other = tm.Run(tmp_path / "other")
    other.melbo(f, 2, **SETTINGS)
    drawn = other.texts(tiny_llama, max_new_tokens=2, n_samples=1)
    assert other.texts(tiny_llama, temperature=0.7, on_batch=lambda *c: told.append(c)).equals(
        drawn
    )
    assert len(told) == written
    more = run.texts(tiny_llama, n_samples=3)
    assert len(more) == 4 + 2 * (2 * 4 + 1)
    assert len(run.page(tiny_llama, f)) == 2
    page = run.folder / "report.html"
    assert "nats; steered" not in page.read_text()
    run.page(tiny_llama, f, token_divergence=True)
    assert "nats; steered" in page.read_text()
    # As generate notes it, so that the analyses take the texts for what they are.
    assert texts.attrs == again.attrs == {"chat": texts.attrs["chat"]}
    with pytest.raises(TypeError, match="judge: got a model"):
        run.page(tiny_llama, f, judge=tiny_llama)


def test_random_vectors_write_as_the_found_ones_do(tiny_llama, f, tmp_path, monkeypatch):
    run, told = tm.Run(tmp_path), []
    found = run.melbo(f, 2, **SETTINGS)
    run.texts(tiny_llama, max_new_tokens=2, n_samples=1)
    texts = run.random_texts(tiny_llama, f, on_batch=lambda *counts: told.append(counts))
    drawn = tm.random_vectors(f, 4, radius=float(found.norms[0]))
    options = {"scales": [1, -1], "n_samples": 1, "max_new_tokens": 2}
    expected = tm.generate(tiny_llama, PROMPT, drawn, **options)
    assert texts.equals(expected)
    assert told[-1] == (16, 16)
    run.page(tiny_llama, f)
    assert (
        "16 completions under 4 random vectors of the same norm"
        in (tmp_path / "report.html").read_text()
    )
    # Longer ones for longer ones; and nothing is written twice.
    run.texts(tiny_llama, max_new_tokens=3)
    longer = run.random_texts(tiny_llama, f)
    assert not longer["completion"].equals(texts["completion"])
    monkeypatch.setattr("tl_melbo.analysis._random_baseline.generate", pytest.fail)
    again = tm.Run(tmp_path).random_texts(tiny_llama, f)
    assert again["completion"].tolist() == longer["completion"].tolist()


def test_the_control_is_kept_as_other_tables_are(tiny_llama, f, tmp_path):
    run = tm.Run(tmp_path)
    run.melbo(f, 2, **SETTINGS)
    run.texts(tiny_llama, max_new_tokens=2)
    path = tmp_path / "random_completions.csv"
    path.write_text("my own notes")
    for call in (run.check, lambda: run.random_texts(tiny_llama, f)):
        with pytest.raises(ValueError, match=r"random_completions\.csv: no run left it"):
            call()
    assert path.read_text() == "my own notes"
    texts = run.random_texts(tiny_llama, f, overwrite=True)
    path.write_text("vector\n1\n")
    with pytest.raises(tm.errors.Damaged, match="random_completions"):
        run.check()
    anew = run.random_texts(tiny_llama, f, overwrite=True)
    assert anew.equals(texts)
    run.check()
    # Another library's control goes with it.
    run.melbo(f, 2, **{**SETTINGS, "radius": 1.0}, overwrite=True)
    assert not path.exists()
    run.check()


def test_texts_of_replaced_vectors_are_nobodys(f, tmp_path):
    """Also where the settings are gone, which told whose they were."""
    run = tm.Run(tmp_path)
    run.melbo(f, 2, **SETTINGS)
    run.texts(f.model, max_new_tokens=2)
    (tmp_path / "settings.json").unlink()
    found = run.melbo(f, 2, **{**SETTINGS, "seed": 9}, overwrite=True)
    expected = tm.report.collect_completions(f.model, PROMPT, found, max_new_tokens=3)
    texts = run.texts(f.model, max_new_tokens=3)
    assert texts["completion"].tolist() == expected["completion"].tolist()


def test_a_theta0_without_a_number_does_not_replace_the_library(f, tmp_path):
    run = tm.Run(tmp_path)
    found = run.melbo(f, 2, **SETTINGS)
    for theta0 in (found.vectors[1], found):
        with pytest.raises(ValueError, match=r"theta0: .* pass one vector of a library, as found"):
            run.keep(tm.melbo_ortho, f, 2, theta0=theta0, overwrite=True)
    assert torch.equal(run.found.vectors, found.vectors)


def test_damaged_settings_are_told_before_the_search_or_replaced(f, tmp_path, monkeypatch):
    run = tm.Run(tmp_path)
    (tmp_path / "settings.json").write_text("[")
    assert len(run.melbo(f, 1, **SETTINGS, overwrite=True)) == 1
    assert run.settings == {"texts_of": None}
    (tmp_path / "settings.json").write_text("[")
    monkeypatch.setattr(tm.melbo, "parts", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(tm.errors.Damaged, match=r"settings.json: damaged"):
        run.melbo(f, 3, **SETTINGS)


@pytest.mark.parametrize("dtype", ["nope", 3, "int8"])
def test_a_dtype_that_is_none_is_told_with_its_file(f, tmp_path, dtype):
    run = tm.Run(tmp_path)
    found = run.melbo(f, 1, **SETTINGS)
    replace(found, story={**found.story, "dtype": dtype}).save(tmp_path / "vectors.safetensors")
    with pytest.raises(ValueError, match=r"vectors.safetensors: .*a floating-point dtype"):
        run.load()


@pytest.mark.parametrize("settings", [{"model": 3}, {"max_new_tokens": "many"}, {"texts_of": 1}])
def test_settings_of_a_wrong_type_are_told_with_their_file(tmp_path, settings):
    run = tm.Run(tmp_path)
    run.note(**settings)
    name = next(iter(settings))
    with pytest.raises(tm.errors.Damaged, match=rf"settings.json: damaged \('{name}'"):
        run.settings  # noqa: B018


def test_a_model_that_nothing_names_is_asked_for_before_any_is_loaded(f, tmp_path, monkeypatch):
    run = tm.Run(tmp_path)
    run.melbo(f, 1, **SETTINGS)
    monkeypatch.setattr(tm, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"are of tiny-llama, .* as model=\.\.\."):
        run.load()


def test_no_token_is_not_the_known_length(f, tmp_path):
    run = tm.Run(tmp_path)
    run.melbo(f, 1, **SETTINGS)
    run.texts(f.model, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens=0: at least 1"):
        run.texts(f.model, max_new_tokens=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[table["vector"] >= 0], "no baseline"),
        (lambda table: table.assign(scale=float("nan")), "not a finite number"),
        (lambda table: table.assign(prompt=" "), "a prompt is blank"),
    ],
)
def test_completions_that_lack_something_are_damaged(f, tmp_path, change, message):
    run = tm.Run(tmp_path)
    run.melbo(f, 1, **SETTINGS)
    texts = run.texts(f.model, max_new_tokens=2)
    run_module._files.save_table(tmp_path / "completions.csv", change(texts))
    with pytest.raises(tm.errors.Damaged, match=rf"completions.csv: .*{message}"):
        run.texts(f.model)
