"""Speed as ratios, each taken in one process on the embedded model, interleaved.

    make benchmark        or        python -m benchmarks.compare [row ...]

prints a table. `benchmarks/RESULTS.md` holds what was measured, and what it means. Peers are run as
published: `batched-melbo` 0.1.1 from the package index (its original code and its batched class),
and the reference of MELBO-ortho in tests/, which hooks the whole model.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import tl_melbo as tm
from tests.reference import melbo_ortho as reference
from tl_melbo.geometry import normalise, random_sphere
from tl_melbo.models import to_tokens

PROMPT = "Tell me about yourself."
RADIUS = 12.0
REPEATS = 3
PUBLISHED_STEPS, PUBLISHED_ORTHO_STEPS = 300, 1000
ALL = slice(None)

Row = tuple[str, str]


def main() -> None:
    chosen = sys.argv[1:] or list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        raise SystemExit(f"no rows {unknown}; there are {list(ROWS)}")
    model = tm.load_model()
    f = tm.ActivationMap.from_prompts(model, PROMPT, chat=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"matrix rate {matrix_rate() / 1e9:.0f} GFLOP/s (float32, 2048 x 2048)")
    print("| row | measured |\n|---|---|")
    for name in chosen:
        for what, value in ROWS[name](model, f):
            print(f"| {name}: {what} | {value} |", flush=True)


def seconds(*functions: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """The median time of each, taken in turns so that a slow minute of the machine hits all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def matrix_rate(size: int = 2048) -> float:
    """Floating-point operations per second of a square product: 2 n^3 of them."""
    a = torch.randn(size, size)
    (taken,) = seconds(lambda: a @ a, repeats=7)
    return 2 * size**3 / taken


def melbo_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Seconds per vector to the mean objective of the published algorithm's 300 steps."""
    batched_melbo, original_melbo = peers()
    starts = random_sphere(8, f.d_model, RADIUS, generator=torch.Generator().manual_seed(0))
    published = tm.melbo(
        f, 8, RADIUS, positions=ALL, orthogonal=False, optimiser="adamw", steps=PUBLISHED_STEPS
    )
    goal = float(published.objective.mean())
    with torch.no_grad():
        begun = float(tm.melbo_objective(f.delta(starts)).mean())
    yield "mean objective of random starts", f"{begun:.0f}"
    yield "mean objective after 300 published steps (8 vectors)", f"{goal:.0f}"
    n_vectors = 32
    for steps in range(1, 11):
        found = tm.melbo(f, n_vectors, RADIUS, positions=ALL, orthogonal=False, steps=steps)
        if float(found.objective.mean()) >= goal:
            break
    yield f"ours reaches it in (gradients, {n_vectors} vectors)", str(steps)
    yield "ours, mean objective there", f"{float(found.objective.mean()):.0f}"
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    hf_model, tokenizer, _ = plain_model()
    common = {"source_layer_idx": 8, "layers_name": "model.layers", "normalization": RADIUS}
    batched = batched_melbo.BatchedMELBO(
        hf_model, tokenizer, target_layer_idx=16, num_steps=3, **common
    )
    other, _, _ = plain_model()
    # Its target is Hugging Face's hidden_states[17], which is our layer 16.
    original = original_melbo.SteeredModel(
        other, tokenizer, target_layer_idx=17, num_steps=5, **common
    )

    def run_original() -> None:
        with on_cpu():
            original.train([text], 1)

    ours, theirs, batch = seconds(
        lambda: tm.melbo(f, n_vectors, RADIUS, positions=ALL, orthogonal=False, steps=steps),
        run_original,
        lambda: batched.train(text, 8, vector_batch_size=8),
    )
    ours /= n_vectors
    theirs *= PUBLISHED_STEPS / 5
    batch *= PUBLISHED_STEPS / 3 / 8
    yield "ours, seconds a vector", f"{ours:.4f}"
    yield "original code, seconds a vector (5 steps timed, x 60)", f"{theirs:.1f}"
    yield "batched-melbo, seconds a vector (batch of 8, 3 steps timed, x 100)", f"{batch:.1f}"
    yield "original / ours", f"{theirs / ours:.0f} x"
    yield "batched-melbo / ours", f"{batch / ours:.0f} x"


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
    yield "published / ours, in a family of 100", f"{theirs / share:.0f} x"


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
    for n_vectors in (1, 8, 32, 128):
        theta = random_sphere(
            n_vectors, d, RADIUS, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()

        def gradient(theta: torch.Tensor = theta) -> None:
            torch.autograd.grad(f.delta(theta).square().sum(), theta)

        gradient()
        (taken,) = seconds(gradient, repeats=5)
        rate = n_vectors * operations / taken
        share = rate / matrix_rate()
        yield f"{n_vectors} vectors", f"{taken:.3f} s, {rate / 1e9:.0f} GFLOP/s, {share:.0%}"


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
    yield "vector 500 / vector 5", f"{taken[500] / taken[5]:.2f} x"


def generation_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Tokens a second, steered, against Hugging Face's generate on the same batch."""
    theta = random_sphere(32, f.d_model, 3.0, generator=torch.Generator().manual_seed(0))
    hf_model, _, _ = plain_model()
    tokens = to_tokens(model, PROMPT, True).expand(32, -1)

    def plain() -> None:
        with torch.no_grad():
            hf_model.generate(tokens, max_new_tokens=40, min_new_tokens=40, do_sample=False)

    counts = []

    def steered() -> None:
        frame = tm.generate(model, PROMPT, theta, 8, max_new_tokens=40, chat=True)
        counts.append(len(frame))

    ours, theirs = seconds(steered, plain, repeats=3)
    yield "ours, 32 rows x 40 tokens, seconds", f"{ours:.2f}"
    yield "Hugging Face generate, seconds", f"{theirs:.2f}"
    yield "ours / Hugging Face, speed", f"{theirs / ours:.2f} x"


def import_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """What importing us costs beyond importing transformer_lens."""

    def importing(line: str) -> Callable[[], None]:
        return lambda: subprocess.run([sys.executable, "-c", line], check=True)

    theirs, both = seconds(
        importing("import transformer_lens"),
        importing("import transformer_lens, tl_melbo"),
        repeats=3,
    )
    yield "import transformer_lens, seconds", f"{theirs:.2f}"
    yield "tl_melbo beyond that, seconds", f"{both - theirs:.2f}"


ROWS = {
    "melbo": melbo_rows,
    "ortho": ortho_rows,
    "roofline": roofline_rows,
    "growth": growth_rows,
    "generation": generation_rows,
    "import": import_rows,
}


def plain_model() -> tuple[Any, Any, Any]:
    """The embedded model as Hugging Face gives it, without TransformerLens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tm.models.embedded_model_path()
    options = {"gguf_file": path.name}
    hf_model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return hf_model.eval(), tokenizer, path


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
