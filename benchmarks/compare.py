"""Speed as ratios, each taken in one process on the embedded model, interleaved.

    make benchmark        or        python -m benchmarks.compare [row ...]

prints a table, and writes it into `benchmarks/RESULTS.md`, whose notes say what it means. Peers are
run as published: `batched-melbo` 0.1.1 from the package index (its original code and its batched
class), and the reference of MELBO-ortho in tests/, which hooks the whole model.
"""

import ctypes
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

import tl_melbo as tm
from benchmarks import models
from tests.reference import melbo_ortho as reference
from tl_melbo import files
from tl_melbo.geometry import normalise, random_sphere
from tl_melbo.models import to_tokens

PROMPT = "Tell me about yourself."
RADIUS = 12.0
REPEATS = 3
PUBLISHED_STEPS, PUBLISHED_ORTHO_STEPS = 300, 1000
ALL = slice(None)

Row = tuple[str, str]
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    chosen = sys.argv[1:] or list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        raise SystemExit(f"no rows {unknown}; there are {list(ROWS)}")
    model = tm.load_model()
    f = tm.ActivationMap.from_prompts(model, PROMPT, chat=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {f}")
    for name in chosen:
        rate = f"{matrix_rate() / 1e9:.0f} GFLOP/s"
        rows = [("machine's matrix rate before this row (float32, 2048 x 2048)", rate)]
        print(f"\n## {name}\n| what | measured |\n|---|---|\n| {rows[0][0]} | {rate} |")
        for row in ROWS[name](model, f):
            rows.append(row)
            print(f"| {row[0]} | {row[1]} |", flush=True)
        write_results(name, rows)


def write_results(name: str, rows: list[Row]) -> None:
    """Put a row's table between its marks in RESULTS.md; the notes around it stay."""
    begin, end = f"<!-- {name}: measured -->", f"<!-- {name}: end -->"
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    text = f"{begin}\n| {machine} | measured |\n|---|---|\n{table}\n{end}"
    whole = RESULTS.read_text(encoding="utf-8")
    if begin not in whole:
        raise SystemExit(f"{RESULTS} has no place for the row {name!r}: {begin} ... {end}")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    with files.replacing(RESULTS) as path:
        path.write_text(pattern.sub(lambda _: text, whole), encoding="utf-8")


def seconds(*functions: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """The median time of each, taken in turns so that a slow minute of the machine hits all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def matrix_rate(size: int = 2048) -> float:
    """Floating-point operations per second of a square product: 2 n^3 of them."""
    a = torch.randn(size, size)
    (taken,) = seconds(lambda: a @ a, repeats=7)
    return 2 * size**3 / taken


def melbo_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Seconds per vector to the mean objective of the published algorithm's 300 steps."""
    n_vectors, ours = 32, {}
    for where, positions in (("all positions", ALL), ("last three positions", slice(-3, None))):
        options = {"positions": positions, "orthogonal": False}
        published = tm.melbo(f, 8, RADIUS, optimiser="adamw", steps=PUBLISHED_STEPS, **options)
        goal = float(published.objective.mean())
        for steps in range(1, 11):
            found = tm.melbo(f, n_vectors, RADIUS, steps=steps, **options)
            reached = float(found.objective.mean())
            if reached >= goal:
                break
        else:
            yield f"{where}: ours does not reach it in 10 gradients", f"{reached:.0f} of {goal:.0f}"
            continue
        ours[where] = lambda steps=steps, options=options: tm.melbo(
            f, n_vectors, RADIUS, steps=steps, **options
        )
        start = float(published.history[:, 0].mean())
        yield (
            f"{where}: mean objective of 8 random starts, and after {PUBLISHED_STEPS} steps",
            f"{start:.0f}, {goal:.0f}",
        )
        yield (
            f"{where}: ours after {steps} gradients ({n_vectors} vectors)",
            f"{float(found.objective.mean()):.0f}",
        )
    batched_melbo, original_melbo = peers()
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    hf_model, tokenizer, _ = models.plain()
    common = {"source_layer_idx": 8, "layers_name": "model.layers", "normalization": RADIUS}
    batched = batched_melbo.BatchedMELBO(
        hf_model, tokenizer, target_layer_idx=16, num_steps=3, **common
    )
    other, _, _ = models.plain()
    # Its target is Hugging Face's hidden_states[17], which is our layer 16.
    original = original_melbo.SteeredModel(
        other, tokenizer, target_layer_idx=17, num_steps=5, **common
    )

    def run_original() -> None:
        with on_cpu():
            original.train([text], 1)

    theirs, batch, *taken = seconds(
        run_original, lambda: batched.train(text, 8, vector_batch_size=8), *ours.values()
    )
    theirs *= PUBLISHED_STEPS / 5
    batch *= PUBLISHED_STEPS / 3 / 8
    yield "original code, seconds a vector (5 steps timed, x 60)", f"{theirs:.1f}"
    yield "batched-melbo, seconds a vector (batch of 8, 3 steps timed, x 100)", f"{batch:.1f}"
    for where, own in zip(ours, taken, strict=True):
        own /= n_vectors
        yield f"{where}: ours, seconds a vector", f"{own:.4f}"
        yield f"{where}: original / ours", f"**{theirs / own:.0f} x**"
        yield f"{where}: batched-melbo / ours", f"**{batch / own:.0f} x**"
    (library,) = seconds(lambda: tm.melbo(f, n_vectors, RADIUS), repeats=1)
    yield "a library of 32 orthogonal vectors, 10 gradients each, seconds", f"{library:.1f}"


def ortho_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Seconds per vector to the published optimiser's distance after 1000 steps."""
    theta0 = tm.melbo(f, 5, RADIUS)[4]
    slow = tm.melbo_ortho(f, theta0, 1, optimiser="adam", steps=PUBLISHED_ORTHO_STEPS)
    goal = float(slow.columns["distance"])
    yield "distance after 1000 published steps", f"{goal:.3f}"
    began, reached = time.perf_counter(), []

    def note(step: Any) -> None:
        if step.step == 1:
            reached.append([time.perf_counter(), None, None])
        if step.distance <= goal and reached[-1][1] is None:
            reached[-1][1:] = [time.perf_counter(), step.step]

    tm.melbo_ortho(f, theta0, 1, on_step=note)
    first, end, gradients = reached[0]
    if end is None:
        yield "ours does not reach it", ""
        return
    tokens = to_tokens(model, PROMPT, True)
    (theirs,) = seconds(
        lambda: reference.adam(model, tokens, theta0.vectors[0], [], 5, 8, 16), repeats=2
    )
    theirs *= PUBLISHED_ORTHO_STEPS / 5
    yield "ours reaches it in (gradients)", str(gradients)
    yield "ours, seconds there (without the Jacobian)", f"{end - first:.2f}"
    yield "the Jacobian, seconds once a family", f"{first - began:.1f}"
    yield "published, seconds (5 steps timed, x 200)", f"{theirs:.0f}"
    yield "published / ours, one vector with its Jacobian", f"{theirs / (end - began):.0f} x"
    share = end - first + (first - began) / 100
    yield "published / ours, in a family of 100", f"**{theirs / share:.0f} x**"


def roofline_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Floating-point operations of f and its gradient, per second, over the matrix rate.

    Per token and block 2 (2 d^2 + 2 d d_kv + 3 d d_mlp) for the weights and 4 n d for the attention
    pattern; as much again for the gradient, which is of theta alone.
    """
    config = model.original_model.config
    d, n_tokens, n_blocks = f.d_model, f.x.shape[1], f.target_layer - f.source_layer
    d_kv = d * config.num_key_value_heads // config.num_attention_heads
    weights = 2 * d * d + 2 * d * d_kv + 3 * d * config.intermediate_size
    operations = 2 * n_blocks * n_tokens * (2 * weights + 4 * n_tokens * d)
    yield "GFLOP, one vector", f"{operations / 1e9:.2f}"
    square = torch.randn(2048, 2048)
    for n_vectors in (1, 8, 32, 128):
        theta = random_sphere(
            n_vectors, d, RADIUS, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()

        def gradient(theta: torch.Tensor = theta, positions: slice = ALL) -> None:
            torch.autograd.grad(f.delta(theta, positions).square().sum(), theta)

        gradient()
        memory = peak_memory(gradient)
        taken, last_three, product = seconds(
            gradient,
            lambda gradient=gradient: gradient(positions=slice(-3, None)),
            lambda: square @ square,
            repeats=15 if n_vectors < 32 else 7,
        )
        rate, machine = n_vectors * operations / taken, 2 * 2048**3 / product
        yield (
            f"{n_vectors} vectors: f and gradient",
            f"{taken:.3f} s, {rate / 1e9:.0f} of {machine / 1e9:.0f} GFLOP/s, "
            f"**{rate / machine:.0%}**, {memory / 2**20:.0f} MiB more at its peak",
        )
        yield f"{n_vectors} vectors, effect at the last three positions", f"{last_three:.3f} s"


def growth_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Seconds for the k-th vector of a family, with as many gradients each."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(f.d_model, f.d_model, generator=generator).double()).Q.T
    theta0 = (RADIUS * normalise(frame[:1])).float()
    taken = {}
    for k in (5, 100, 300, 500):
        times = []
        for _ in tm.iter_melbo_ortho(f, theta0, 3, previous=frame[1 : k + 1].float(), steps=10):
            times.append(time.perf_counter())
        taken[k] = (times[-1] - times[0]) / 2 if len(times) == 3 else float("nan")
        yield f"vector {k}, 10 gradients, seconds", f"{taken[k]:.3f}"
    yield "vector 500 / vector 5", f"**{taken[500] / taken[5]:.2f} x**"
    yield from linear_rows(model)


def linear_rows(model: Any) -> Iterator[Row]:
    """Seconds of one gradient of one vector, as prompts, tokens and vectors grow."""
    words = "The ships left the harbour at dawn, and the gulls followed them out to sea. "
    maps = {f"{n} prompts of {len(PROMPT)} characters": [PROMPT] * n for n in (1, 4, 16)} | {
        f"one prompt, {n} times the text": [words * n] for n in (2, 8, 32)
    }
    for what, prompts in maps.items():
        f = tm.ActivationMap.from_prompts(model, prompts, chat=True)
        theta = torch.ones(1, f.d_model, requires_grad=True)
        (taken,) = seconds(
            lambda f=f, theta=theta: torch.autograd.grad(f.delta(theta).square().sum(), theta),
            repeats=5,
        )
        n_tokens = int(f.mask.sum())
        yield (
            f"{what} ({n_tokens} tokens): gradient of one vector",
            f"{taken:.3f} s, {1e6 * taken / n_tokens:.0f} microseconds a token",
        )


def family_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """The whole family of one vector, until nothing is left of it."""
    theta0 = tm.melbo(f, 5, RADIUS)[4]
    start = time.perf_counter()
    family = tm.melbo_ortho(f, theta0, f.d_model - 1)
    taken = time.perf_counter() - start
    yield "vectors until norms fall under 0.1", str(len(family))
    yield "minutes", f"**{taken / 60:.1f}**"
    yield "gradients", f"{float(family.columns['evaluations'].sum()):.0f}"


def generation_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Tokens a second, steered, against Hugging Face's generate on the same batch."""
    theta = random_sphere(32, f.d_model, 3.0, generator=torch.Generator().manual_seed(0))
    hf_model, _, _ = models.plain()
    tokens = to_tokens(model, PROMPT, True).expand(32, -1)

    def plain() -> None:
        with torch.no_grad():
            hf_model.generate(tokens, max_new_tokens=40, min_new_tokens=40, do_sample=False)

    def steered() -> None:
        tm.generate(model, PROMPT, theta, 8, max_new_tokens=40, chat=True)

    ours, theirs = seconds(steered, plain, repeats=5)
    yield "ours, 32 rows x 40 tokens, seconds", f"{ours:.2f}"
    yield "Hugging Face generate, unsteered, seconds", f"{theirs:.2f}"
    yield "ours / Hugging Face, speed", f"**{theirs / ours:.2f} x**"


def import_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """What importing us costs beyond importing transformer_lens, and the way to a vector."""

    def importing(line: str) -> Callable[[], None]:
        return lambda: subprocess.run([sys.executable, "-c", line], check=True)

    theirs, both = seconds(
        importing("import transformer_lens"),
        importing("import transformer_lens, tl_melbo"),
        repeats=3,
    )
    yield "import transformer_lens, seconds", f"{theirs:.2f}"
    yield "tl_melbo beyond that, seconds", f"**{both - theirs:.2f}**"
    lines = (
        "import tl_melbo as tm",
        "model = tm.load_model()",
        f"f = tm.ActivationMap.from_prompts(model, {PROMPT!r}, chat=True)",
        "tm.melbo(f, 1)",
    )
    ticks = "".join(f"{line}\nprint(time.perf_counter() - start)\n" for line in lines)
    script = f"import time\nstart = time.perf_counter()\n{ticks}"
    out = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    for line, reached in zip(lines, out.split(), strict=True):
        yield f"first vector: seconds from the start until after `{line}`", f"{float(reached):.1f}"


ROWS = {
    "melbo": melbo_rows,
    "ortho": ortho_rows,
    "roofline": roofline_rows,
    "growth": growth_rows,
    "family": family_rows,
    "generation": generation_rows,
    "import": import_rows,
}


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes by which the process grows while a function runs, looked at every millisecond."""
    process, stop, highest = psutil.Process(), threading.Event(), [0]
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind would hide the growth
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.001):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        stop.set()
        watcher.join()
    return max(0, highest[0] - before)


def peers() -> tuple[Any, Any]:
    try:
        from batched_melbo import batched_melbo, original_melbo
    except ImportError as error:
        raise SystemExit(
            "the peers are not installed: pip install --no-deps batched-melbo==0.1.1"
        ) from error
    return batched_melbo, original_melbo


@contextmanager
def on_cpu() -> Iterator[None]:
    """The original code asks for its random starts on "cuda", whatever the model is on."""
    randn = torch.randn
    torch.randn = lambda *size, device=None, **options: randn(*size, **options)
    try:
        yield
    finally:
        torch.randn = randn


if __name__ == "__main__":
    main()
