"""Speed as ratios, each taken in one process on the embedded model, interleaved.

    make benchmark        or        python -m benchmarks.compare [row ...]

prints a table, and writes it into `benchmarks/RESULTS.md`, whose notes say what it means. Peers are
run as published: `batched-melbo` 0.1.1 from the package index (its original code and its batched
class), and the reference of MELBO-ortho in tests/, which hooks the whole model.
"""

import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import tl_melbo as tm
from benchmarks import models
from benchmarks.roofline import dct_rows, roofline_rows
from benchmarks.timing import matrix_rate, seconds
from tests.reference import melbo_ortho as reference
from tl_melbo import files
from tl_melbo.geometry import normalise, random_sphere
from tl_melbo.model.tokens import to_tokens

PROMPT = "Tell me about yourself."
RADIUS = 12.0
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
        hf_model, tokenizer, target_layer_idx=16, num_steps=1, **common
    )
    other, _, _ = models.plain()
    # Its target is Hugging Face's hidden_states[17], which is our layer 16.
    original = original_melbo.SteeredModel(
        other, tokenizer, target_layer_idx=17, num_steps=1, **common
    )

    def run_original(steps: int) -> None:
        original.num_steps = steps
        with on_cpu():
            original.train([text], 1)

    def run_batched(steps: int) -> None:
        batched.num_steps = steps
        batched.train(text, 8, vector_batch_size=8)

    # What comes before the first step is paid once: two lengths tell it from the steps.
    one, nine, batch_one, batch_four, *taken = seconds(
        lambda: run_original(1),
        lambda: run_original(9),
        lambda: run_batched(1),
        lambda: run_batched(4),
        *ours.values(),
    )
    theirs = one + (PUBLISHED_STEPS - 1) * (nine - one) / 8
    batch = (batch_one + (PUBLISHED_STEPS - 1) * (batch_four - batch_one) / 3) / 8
    yield "original code, seconds a vector (from 1 and 9 steps)", f"{theirs:.1f}"
    yield "batched-melbo, seconds a vector (batch of 8, from 1 and 4 steps)", f"{batch:.1f}"
    for where, own in zip(ours, taken, strict=True):
        own /= n_vectors
        yield f"{where}: ours, seconds a vector", f"{own:.4f}"
        yield f"{where}: original / ours", f"**{theirs / own:.0f} x**"
        yield f"{where}: batched-melbo / ours", f"**{batch / own:.0f} x**"
    (library,) = seconds(lambda: tm.melbo(f, n_vectors, RADIUS), repeats=1)
    yield "a library of 32 orthogonal vectors, 10 gradients each, seconds", f"{library:.1f}"


class _ReachedError(Exception):
    """Ends a search that is as good as it has to be."""


def ortho_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Seconds per vector to the published optimiser's distance after 1000 steps."""
    theta0 = tm.melbo(f, 5, RADIUS)[4]
    slow = tm.melbo_ortho(f, theta0, 1, optimiser="adam", steps=PUBLISHED_ORTHO_STEPS)
    goal = float(slow.columns["distance"])
    yield "distance after 1000 published steps", f"{goal:.3f}"
    tokens = to_tokens(model, PROMPT, True)
    runs: list[tuple[float, float, int]] = []

    def ours() -> None:
        """Until the goal, then no further: seconds for the Jacobian, and for the vector."""
        start, first = time.perf_counter(), []

        def note(step: Any) -> None:
            now = time.perf_counter()
            first.append(now)
            if step.distance <= goal:
                runs.append((first[0] - start, now - first[0], step.step))
                raise _ReachedError

        with suppress(_ReachedError):
            tm.melbo_ortho(f, theta0, 1, on_step=note)

    def theirs(steps: int) -> None:
        reference.adam(model, tokens, theta0.vectors[0], [], steps, 8, 16)

    _, one, six = seconds(ours, lambda: theirs(1), lambda: theirs(6))
    if not runs:
        yield "ours does not reach it", ""
        return
    published = one + (PUBLISHED_ORTHO_STEPS - 1) * (six - one) / 5
    jacobian, alone = (statistics.median(run[i] for run in runs) for i in (0, 1))
    yield "ours reaches it in (gradients)", str(runs[0][2])
    yield "ours, seconds there (without the Jacobian)", f"{alone:.2f}"
    yield "the Jacobian, seconds once a family", f"{jacobian:.1f}"
    yield "published, seconds (from 1 and 6 steps)", f"{published:.0f}"
    yield (
        "published / ours, one vector with its Jacobian",
        f"{published / (alone + jacobian):.0f} x",
    )
    yield (
        "published / ours, in a family of 100",
        f"**{published / (alone + jacobian / 100):.0f} x**",
    )


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
        frame = tm.generate(model, PROMPT, theta, 8, max_new_tokens=40, chat=True)
        lengths = [len(model.tokenizer(text).input_ids) for text in frame["completion"]]
        if min(lengths) < 38:  # some tokens are written otherwise when they are read again
            raise SystemExit(f"a text ended early, after {min(lengths)} tokens: not comparable")

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
    "dct": dct_rows,
    "growth": growth_rows,
    "family": family_rows,
    "generation": generation_rows,
    "import": import_rows,
}


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
