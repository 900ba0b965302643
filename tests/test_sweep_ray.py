"""Sweeps on Ray: two nodes on the loopback, and everything in them killed in mid-search."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import tiny_hf, tokenizer

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="two nodes need two loopback addresses"),
]

ROOT = Path(__file__).resolve().parent.parent
HEAD, OTHER = "127.0.0.2", "127.0.0.3"
DRIVER = """
import json, sys, ray
import tl_melbo as tm
address, grid, out = sys.argv[1:]
ray.init(address=address, _node_ip_address=address.split(":")[0], log_to_driver=False)
tm.sweep(json.loads(grid), out, engine="ray", workers=2)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for seed, name in enumerate(("tiny-a", "tiny-b")):
        folder = tmp_path_factory.mktemp("models") / name
        tiny_hf("llama", seed=seed).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What Ray's processes find around them; without it, its workers are nice to all others."""
    chosen = {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
    }  # fmt: skip
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for each in chosen.items():
        monkeypatch.setenv(*each)
    return chosen


def grid(models: list[str], **settings: Any) -> dict[str, Any]:
    place = {"source_layer": [0, 1], "target_layer": 4, "chat": False, "dtype": "float64"}
    return {"model": models, "prompt": "Tell me about yourself.", "radius": 3.0} | place | settings


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Bit for bit, but for how long it took."""
    some = [pd.DataFrame(table).drop(columns="seconds") for table in (one, other)]
    pd.testing.assert_frame_equal(*some, check_exact=True)


def test_two_workers_find_what_one_process_finds(
    models: list[str], tmp_path: Path, surroundings: dict[str, str]
) -> None:
    asked = grid(models, n_vectors=3, steps=4, max_new_tokens=3)
    local = tm.sweep(asked, tmp_path / "local", threads=1)
    seen: list[tuple[float, float]] = []
    table = tm.sweep(
        asked, tmp_path / "ray", engine="ray", workers=2,
        on_progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    assert [*table["status"]] == ["done"] * 4
    assert_same(table, local)
    assert_same(pd.read_parquet(tmp_path / "ray" / "sweep.parquet"), local)
    assert seen[-1] == (12.0, 12.0)
    assert seen == sorted(seen)
    for folder in table["folder"]:
        one, other = (
            tm.SteeringVectors.load(tmp_path / engine / folder / "vectors.safetensors")
            for engine in ("local", "ray")
        )
        assert torch.equal(one.vectors, other.vectors)


def test_a_cluster_that_is_not_there_or_has_no_room(
    models: list[str], tmp_path: Path, surroundings: dict[str, str]
) -> None:
    asked = grid(models[:1], n_vectors=1, steps=1)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind((HEAD, 0))
        address = f"{HEAD}:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"address={address}: no cluster answers"):
            tm.sweep(asked, tmp_path / "none", engine="ray", address=address)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="gpus=64: no node of the cluster has room"):
        tm.sweep(asked, tmp_path, engine="ray", workers=1, gpus=64)
    # A place that only this process has.
    with pytest.raises(ValueError, match=r"out: node .* does not see the files"):
        tm.sweep(asked, "memory://mine", engine="ray", workers=1)
    table = tm.sweep(asked, tmp_path, threads=1)
    assert [*table["status"]] == ["done", "done"], "the same folder goes on"


@pytest.fixture
def start(
    tmp_path_factory: pytest.TempPathFactory, surroundings: dict[str, str]
) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start processes that end with the test, and all that they have started."""
    started: list[subprocess.Popen] = []

    def begin(*command: str) -> subprocess.Popen:
        with (tmp_path_factory.mktemp("logs") / "log").open("w") as log:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
        started.append(process)
        return process

    yield begin
    for process in started:
        kill(process)


@pytest.fixture
def sockets() -> Iterator[list[str]]:
    """Two folders for Ray; the paths of its sockets must be short."""
    with TemporaryDirectory(dir="/tmp") as one, TemporaryDirectory(dir="/tmp") as other:
        yield [one, other]


def tree(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen) -> None:
    for each in tree(process):
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait(30)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() in (None, 0), "the driver ended"
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.1)
    return found


def node(start: Callable[..., subprocess.Popen], *options: str) -> subprocess.Popen:
    common = ("--num-cpus=1", "--block", "--object-store-memory=100000000", "--num-gpus=0")
    return start("-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *common, *options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HEAD, 0))
        return probe.getsockname()[1]


def searching(*nodes: subprocess.Popen) -> list[psutil.Process]:
    """The workers of these nodes that run a cell."""
    workers = [each for every in nodes for each in tree(every)]
    return [each for each in workers if "_RayWorker" in " ".join(name(each))]


def name(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def counts(out: Path) -> dict[str, int]:
    """The vectors that each cell has on disk."""
    paths = out.glob("*/vectors.safetensors")
    return {path.parent.name: len(tm.SteeringVectors.load(path)) for path in paths}


def test_killed_workers_node_and_driver_lose_one_vector_at_most(
    models: list[str],
    tmp_path: Path,
    start: Callable[..., subprocess.Popen],
    sockets: list[str],
) -> None:
    asked = grid(models, n_vectors=10, steps=60, optimiser="adamw")
    whole = tm.sweep(asked, tmp_path / "undisturbed", threads=1)
    out, address = tmp_path / "out", f"{HEAD}:{free_port()}"
    head = node(
        start, "--head", f"--node-ip-address={HEAD}", f"--port={address.split(':')[1]}",
        "--include-dashboard=false", f"--temp-dir={sockets[0]}",
    )  # fmt: skip
    wait_for(lambda: answers(address), head)
    other = node(
        start, f"--address={address}", f"--node-ip-address={OTHER}", f"--temp-dir={sockets[1]}"
    )
    command = ("-c", DRIVER, address, json.dumps(asked), str(out))
    driver = start(*command)
    kept: dict[str, tm.SteeringVectors] = {}

    def remember() -> int:
        for path in out.glob("*/vectors.safetensors"):
            kept[path.parent.name] = tm.SteeringVectors.load(path)
        return sum(map(len, kept.values()))

    def more_than(n_vectors: int) -> Callable[[], bool]:
        return lambda: sum(counts(out).values()) > n_vectors

    wait_for(more_than(2), driver)
    wait_for(lambda: len(searching(head, other)) == 2, driver)
    searching(head)[0].send_signal(signal.SIGKILL)
    before = remember()
    wait_for(more_than(before + 4), driver)
    kill(other)
    before = remember()
    wait_for(more_than(before + 4), driver)
    kill(driver)
    before = remember()
    assert before < 4 * 10, "the driver was killed too late"
    driver = start(*command)
    wait_for(lambda: driver.poll() is not None, driver, 400)
    assert driver.returncode == 0
    table = pd.read_parquet(out / "sweep.parquet")
    assert [*table["status"]] == ["done"] * 4
    assert_same(table, pd.DataFrame(whole))
    for folder, earlier in kept.items():
        found = tm.SteeringVectors.load(out / folder / "vectors.safetensors")
        # Not begun anew: the metadata are those of the first process.
        assert found.story["date"] == earlier.story["date"]
        assert torch.equal(found.vectors[: len(earlier)], earlier.vectors)


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True
