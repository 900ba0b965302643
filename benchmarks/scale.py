"""What a model of 70 billion parameters and a thousand searches would take, and what breaks first.

    python -m benchmarks.scale     # prints it
    python -m benchmarks.quoted    # puts it into docs/scale.md

A calculation, not a measurement: no machine here has such a GPU. A gradient's time is the larger of
two: its floating-point operations at the share of the matrix rate that the roofline measured for as
many rows, and its bytes at the memory's rate. A sweep is then simulated, worker by worker, with
workers that die.
"""

import heapq
import itertools
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).with_name("RESULTS.md")
GB, TB, HOUR = 1e9, 1e12, 3600.0


class Shape(NamedTuple):
    """A model of the Llama kind."""

    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    d_kv: int
    d_vocab: int
    bytes_each: int = 2

    @property
    def block(self) -> int:
        d = self.d_model
        return 2 * d * d + 2 * d * self.d_kv + 3 * d * self.d_mlp

    @property
    def weights(self) -> int:
        return self.n_layers * self.block + 2 * self.d_vocab * self.d_model


class Machine(NamedTuple):
    """Matrix rate in operations a second, memory and storage in bytes a second."""

    name: str
    rate: float
    memory: float
    capacity: float
    storage: float


BUNDLED = Shape("SmolLM2-135M", 30, 576, 1536, 192, 49152, 4)
LARGE = Shape("a Llama of 70B", 80, 8192, 28672, 1024, 128256)
# The data sheet of an H100 SXM (dense bfloat16); a shared file system of 10 GB/s.
GPU = Machine("one H100", 989e12, 3.35 * TB, 80 * GB, 10 * GB)
N_TOKENS, N_VECTORS, N_GRADIENTS, N_NEW_TOKENS = 35, 32, 10, 50
N_SEARCHES, HOURS_BETWEEN_DEATHS = 1000, 24.0


def measured_shares() -> list[tuple[int, float]]:
    """Rows (vectors times tokens) in a gradient, and the share of the matrix rate it reached."""
    text = RESULTS.read_text(encoding="utf-8")
    found = re.findall(r"^\| (\d+) vectors: f and gradient \|.*?\*\*(\d+)%\*\*", text, re.M)
    return [(int(vectors) * N_TOKENS, int(share) / 100) for vectors, share in found]


def share_of_rate(rows: int) -> float:
    """Between measured ones by the logarithm of the rows, and no better than the best."""
    known = measured_shares()
    if rows <= known[0][0]:
        return known[0][1]
    for (fewer, low), (more, high) in itertools.pairwise(known):
        if rows <= more:
            return low + (high - low) * math.log(rows / fewer) / math.log(more / fewer)
    return known[-1][1]


def gradient_seconds(shape: Shape, machine: Machine, n_vectors: int, n_blocks: int) -> float:
    """One gradient of f for so many vectors at once."""
    rows = n_vectors * N_TOKENS
    operations = 2 * n_blocks * rows * (2 * shape.block + 4 * N_TOKENS * shape.d_model)
    moved = 2 * n_blocks * shape.block * shape.bytes_each  # weights, forward and back
    return max(operations / (machine.rate * share_of_rate(rows)), moved / machine.memory)


def search_seconds(shape: Shape, machine: Machine, n_blocks: int) -> dict[str, float]:
    """A search of 32 vectors, and the texts of both signs: blocks on several GPUs work in turns."""
    one_by_one = N_VECTORS * N_GRADIENTS * gradient_seconds(shape, machine, 1, n_blocks)
    at_once = N_GRADIENTS * gradient_seconds(shape, machine, N_VECTORS, n_blocks)
    texts = N_NEW_TOKENS * shape.weights * shape.bytes_each / machine.memory
    return {"orthogonal": one_by_one, "at once": at_once, "texts": texts}


def sweep_seconds(search: float, vector: float, load: float, workers: int, seed: int = 0) -> float:
    """The end of a sweep whose workers die at random, and load the model anew.

    Workers load side by side through one store. A death costs the vector that was being searched.
    """
    draw = random.Random(seed)
    loading = load * workers
    free = [(loading, number) for number in range(workers)]
    alive = [draw.expovariate(1 / (HOURS_BETWEEN_DEATHS * HOUR)) for _ in range(workers)]
    heapq.heapify(free)
    for _ in range(N_SEARCHES):
        start, number = heapq.heappop(free)
        end = start + search
        while end > alive[number]:
            end += load + draw.random() * vector
            alive[number] += draw.expovariate(1 / (HOURS_BETWEEN_DEATHS * HOUR))
        heapq.heappush(free, (end, number))
    return max(end for end, _ in free)


def table() -> str:
    """As docs/scale.md has it."""
    n_blocks = LARGE.n_layers // 4
    weights, part = LARGE.weights * LARGE.bytes_each, n_blocks * LARGE.block * LARGE.bytes_each
    seconds = search_seconds(LARGE, GPU, n_blocks)
    searched = part + LARGE.d_vocab * LARGE.d_model * LARGE.bytes_each
    vectors = N_VECTORS * LARGE.d_model * 4
    rows = [
        ("weights", f"{weights / GB:.0f} GB: {math.ceil(weights / GPU.capacity)} GPUs of 80 GB"),
        ("blocks 20 to 40 and the embedding, all that a search runs", f"{searched / GB:.0f} GB"),
        ("one gradient, one vector", f"{1e3 * gradient_seconds(LARGE, GPU, 1, n_blocks):.0f} ms"),
        ("one gradient, 32 vectors at once",
         f"{1e3 * gradient_seconds(LARGE, GPU, N_VECTORS, n_blocks):.0f} ms"),
        ("32 orthogonal vectors, one after another", f"{seconds['orthogonal']:.0f} s"),
        ("32 vectors at once", f"{seconds['at once']:.1f} s"),
        ("64 texts of 50 tokens, in one batch", f"{seconds['texts']:.1f} s"),
        ("a library on disk; a thousand",
         f"{vectors / 1e6:.1f} MB; {N_SEARCHES * vectors / GB:.1f} GB"),
        ("sent to a store, all vectors anew after each",
         f"{N_SEARCHES * vectors * (N_VECTORS + 1) / 2 / GB:.0f} GB for {N_SEARCHES}"),
    ]  # fmt: skip
    lines = ["| 70B, layers 20 → 40 of 80, 35 tokens | calculated |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += [
        "",
        "| workers (of 2 GPUs) | hours for 1000 searches | of which loading | GPU hours |",
    ]
    lines += ["|---|---|---|---|"]
    search = seconds["orthogonal"] + seconds["texts"]
    load = weights / GPU.storage
    for workers in (1, 8, 32, 128, 512):
        end = sweep_seconds(search, seconds["orthogonal"] / N_VECTORS, load, workers)
        hours, loading = end / HOUR, min(1.0, load * workers / end)
        lines.append(f"| {workers} | {hours:.2f} | {loading:.0%} | {2 * workers * hours:.0f} |")
    return "\n".join(lines)


def check() -> str:
    """The same calculation for the bundled model, where the rates were not taken from."""
    text = RESULTS.read_text(encoding="utf-8")
    rate = re.search(r"growth: measured -->.*?\| (\d+) GFLOP/s", text, re.DOTALL)
    machine = Machine("two cores", float(rate[1] if rate else 0) * 1e9, 20 * GB, math.inf, math.inf)
    lines = ["| bundled model, 8 → 16 | calculated | measured |", "|---|---|---|"]
    for n_prompts in (4, 16):
        (took,) = re.findall(rf"^\| {n_prompts} prompts of .*?\| ([\d.]+) s", text, re.M)
        seconds = gradient_seconds(BUNDLED, machine, n_prompts, 8)
        lines.append(
            f"| gradient of one vector, {n_prompts} prompts | {seconds:.3f} s | {took} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(check(), table(), sep="\n\n")
