"""Searches on a Ray cluster: workers that keep their model, and may die at any moment."""

import logging
import os
import platform
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tl_melbo import checks
from tl_melbo.errors import warn_user
from tl_melbo.sweeps._cell import Tell, Worker, take
from tl_melbo.sweeps._grid import Cell
from tl_melbo.sweeps._store import Store, failed

# A cell whose worker died so often, without a new vector in between, is given up.
_MOST_DEATHS = 3
# A file of this process; a node that does not read it there does not share the sweep's place.
_PROOF = "sweep.proof"
# Seconds: between two looks at the progress; for an answer from the cluster's address; before a
# cluster without room is told of; for which a shared file system may show what was there before.
_TICK, _ANSWER, _ROOM, _STALE = 0.5, 10.0, 300.0, 35.0


class _Board:
    """How far each cell is, in a process of its own: a worker that dies leaves it there."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}

    def note(self, folder: str, done: float) -> None:
        self.done[folder] = done

    def read(self) -> dict[str, float]:
        return self.done


class _RayWorker(Worker):
    def ready(self, proof: bytes) -> tuple[bool, str]:
        """Whether this node reads what the driver wrote; and what the node is called."""
        last = time.monotonic() + _STALE
        while not (same := self.store.read(_PROOF) == proof) and time.monotonic() < last:
            time.sleep(1)
        return same, socket.gethostname()

    def run(self, cell: Cell, board: Any) -> dict[str, Any]:
        return self.search(cell, lambda cell, done: board.note.remote(cell.folder, done))


def run_ray(
    cells: Sequence[Cell], out: str, tell: Tell, *, device: str | None, threads: int | None,
    address: str | None, workers: int | None, gpus: float | None,
) -> Generator[tuple[Cell, dict[str, Any]]]:  # fmt: skip
    """The record of each cell as it ends.

    Ray starts a worker anew that died, wherever there is room; its cell goes back to the queue.
    """
    ray = checks.installed("ray", "engine='ray'", "ray")
    threads = threads or 1
    with _connected(ray, address, threads, workers):
        if gpus is None:
            gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
        device = device or ("auto" if gpus > 1 else "cuda" if gpus else "cpu")
        fit = _room(ray, threads, gpus)
        count = min(len(cells), workers or fit)
        proof = uuid4().hex.encode()
        Store(out).write(_PROOF, proof)
        kept = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        here = kept(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1)
        board = board.remote()
        make = ray.remote(_RayWorker).options(num_cpus=threads, num_gpus=gpus, max_restarts=-1)
        made = [make.remote(out, device, threads) for _ in range(count)]
        crew = _Crew(ray, board, proof, tell, made, [*cells])
        try:
            yield from crew.work()
        finally:
            for actor in (*crew.workers, board):
                with suppress(Exception):  # the cluster may be gone
                    ray.kill(actor)


@dataclass
class _Crew:
    """Workers that are starting, idle or searching, and the cells that are left."""

    ray: Any
    board: Any
    proof: bytes
    tell: Tell
    workers: list[Any]
    queue: list[Cell]
    idle: list[Any] = field(default_factory=list)
    starting: dict[Any, Any] = field(default_factory=dict)
    running: dict[Any, tuple[Any, Cell]] = field(default_factory=dict)
    loaded: dict[Any, Any] = field(default_factory=dict)
    deaths: dict[str, tuple[int, float]] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)

    def work(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Go on until no cell is left."""
        waited = 0.0
        for worker in self.workers:
            self._start(worker)
        while self.queue or self.running:
            self._hand_out()
            refs = [*self.starting, *self.running]
            ready, _ = self.ray.wait(refs, timeout=_TICK)
            for ref in ready:
                if ref in self.starting:
                    self._started(self.starting.pop(ref), ref)
                elif ended := self._ended(*self.running.pop(ref), ref):
                    yield ended
            waited = 0.0 if self.running or ready else waited + _TICK
            if waited == _ROOM:
                warn_user(
                    f"no worker could start for {_ROOM:.0f} seconds; waiting for a node with room"
                )
            with suppress(self.ray.exceptions.RayError):
                self.done |= self.ray.get(self.board.read.remote(), timeout=_ANSWER)
            for _, cell in self.running.values():
                self.tell(cell, self.done.get(cell.folder, 0.0))

    def _start(self, worker: Any) -> None:
        # Tried again while the worker is being started anew; a search is not, but handed out again.
        ready = worker.ready.options(max_task_retries=-1)
        self.starting[ready.remote(self.proof)] = worker

    def _started(self, worker: Any, ref: Any) -> None:
        try:
            same, node = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            self.workers.remove(worker)
            if not self.workers:
                raise RuntimeError(
                    f"no worker can be started: {_told(error)}; is this version of tl_melbo "
                    "installed on every node?"
                ) from None
            return
        if not same:
            raise ValueError(
                f"out: node {node} does not see the files that this process writes there; pass a "
                "folder that all nodes share, or an fsspec URL such as s3://bucket/sweep"
            )
        self.idle.append(worker)

    def _hand_out(self) -> None:
        while self.idle and self.queue:
            worker = self.idle.pop(0)
            others = [self.loaded.get(other) for other, _ in self.running.values()]
            cell = take(self.queue, self.loaded.get(worker), others)
            self.loaded[worker] = cell.model
            self.running[worker.run.remote(cell, self.board)] = worker, cell

    def _ended(self, worker: Any, cell: Cell, ref: Any) -> tuple[Cell, dict[str, Any]] | None:
        try:
            record = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            self.loaded.pop(worker, None)
            self._start(worker)
            done = self.done.get(cell.folder, 0.0)
            count, before = self.deaths.get(cell.folder, (0, done))
            count = count + 1 if done <= before else 1
            self.deaths[cell.folder] = count, done
            if count < _MOST_DEATHS:
                self.queue.insert(0, cell)
                return None
            why = RuntimeError(
                f"its worker died {count} times without a new vector, perhaps for lack of memory "
                f"({_told(error)})"
            )
            return cell, {"cell": dict(cell.facts), "n_vectors": cell.n_vectors, **failed(why)}
        self.idle.append(worker)
        return cell, record


def _told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _room(ray: Any, threads: int, gpus: float) -> int:
    """How many workers fit on the cluster's nodes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = 0
    for node in nodes:
        cpus = int(node.get("CPU", 0) // threads)
        fit += min(cpus, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else cpus
    if not fit:
        there = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise ValueError(
            f"threads={threads}, gpus={gpus:g}: no node of the cluster has room for one worker "
            f"(there are {there or 'none'}); ask for less"
        )
    return fit


@contextmanager
def _connected(ray: Any, address: str | None, threads: int, workers: int | None) -> Iterator[None]:
    """Within a cluster: the one that this process has joined, one by address, or a new one."""
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise ValueError(
                f"address={address!r}: this process has joined the cluster at {joined!r}; leave "
                "the address out, or call ray.shutdown() first"
            )
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None and "://" not in address and ":" in address:
        _check_answers(address)
    try:
        if address is None:
            # Nothing here asks the internet, nor listens to it.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            own: dict[str, Any] = {"num_cpus": threads * workers} if workers else {}
            if platform.system() == "Linux":
                own["_node_ip_address"] = "127.0.0.2"
            ray.init("local", include_dashboard=False, **own, **quiet)
        else:
            ray.init(address, **quiet)
    except Exception as error:  # Ray's own are of no narrower type
        if address is None:
            raise RuntimeError(f"engine='ray': Ray cannot be started ({_told(error)})") from error
        raise ConnectionError(f"address={address}: {_told(error)}; {_HOW}") from error
    try:
        yield
    finally:
        ray.shutdown()


_HOW = "start the cluster first, as docs/sweeps.md tells, or leave the address out"


def _check_answers(address: str) -> None:
    """Ray itself tries for a long time."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConnectionError(f"address={address}: no cluster answers ({error}); {_HOW}") from None
