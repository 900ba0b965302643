"""What a gradient costs beside the model: Python calls and microseconds, here and elsewhere.

    python -m benchmarks.overhead [FOLDER OF ANOTHER CHECKOUT]

Each tree runs in an interpreter of its own, with one thread, by turns.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS, HERE = 15, Path(__file__).resolve().parent.parent


def gradient(f: Any, theta: Any) -> None:
    f.delta(theta, slice(-3, None)).square().sum().backward()


def calls(package: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """How many of the package's own functions a call runs through."""
    frames: list[str] = []
    sys.setprofile(lambda f, event, _: event == "call" and frames.append(f.f_code.co_filename))
    try:
        function(*arguments, **options)
    finally:
        sys.setprofile(None)
    return sum(name.startswith(package) for name in frames)


def worker() -> None:
    """Answer each line: "time MAP GRADIENTS VECTORS", or "calls ..." of a gradient and in melbo."""
    import torch

    import tl_melbo as tm
    from tests.tiny_models import tiny_bridge

    torch.set_num_threads(1)
    package, prompt = str(Path(tm.__file__).parent), "Tell me about yourself."
    tiny = tm.ActivationMap.from_prompts(tiny_bridge("llama"), prompt, 1, 4)
    maps = {"tiny": tiny, "bundled": tm.ActivationMap.from_prompts(tm.load_model(), prompt)}
    for line in sys.stdin:
        what, name, count, n_vectors = line.split()
        f = maps[name]
        theta = torch.ones(int(n_vectors), f.d_model).requires_grad_()
        gradient(f, theta)
        began = time.perf_counter()
        for _ in range(int(count)):
            gradient(f, theta)
        answer = f"{(time.perf_counter() - began) / int(count) * 1e6:.1f}"
        if what == "calls":
            few, many = (calls(package, tm.melbo, f, 1, 2.0, steps=steps) for steps in (4, 8))
            answer = f"{calls(package, gradient, f, theta)}, {(many - few) / 4:.0f}"
        print(answer, flush=True)


def ask(process: Any, line: str) -> str:
    print(line, file=process.stdin, flush=True)
    return process.stdout.readline().strip()


def main() -> None:
    trees = [HERE, *(Path(folder).resolve() for folder in sys.argv[1:])]
    command, pipe = [sys.executable, str(Path(__file__).resolve()), "--worker"], subprocess.PIPE
    processes: list[Any] = []
    for tree in trees:
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        processes.append(
            subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)
        )
    for name, count in (("tiny", 50), ("bundled", 4)):
        print(f"{name}, calls: {[ask(process, f'calls {name} 1 1') for process in processes]}")
        for n in (1, 8):
            line = f"time {name} {count} {n}"
            times = [[float(ask(process, line)) for process in processes] for _ in range(ROUNDS)]
            middle = [round(statistics.median(column)) for column in zip(*times, strict=True)]
            ratio = statistics.median(row[0] / row[-1] for row in times)
            print(f"{name}, {n} vectors: {middle} us, ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["--worker"] else main()
