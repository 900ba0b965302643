"""Is this checkout slower than another one? The same calls of both, in turns, in one process.

    git worktree add ../before c1edfd5
    OMP_NUM_THREADS=1 python -m benchmarks.against ../before

Both run the bundled model, each as it loads it. A row is the time of a call, the smallest of
several turns: what else the machine does only makes a turn longer. Above 1.05 this checkout is
slower.
"""

import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import tl_melbo
from benchmarks.timing import fastest

BEFORE = "tl_melbo_before"
PROMPT = "Tell me about yourself."
LAYERS = (8, 16)
RADIUS = 12.0


def renamed(folder: Path, into: Path) -> ModuleType:
    """The package of that checkout under the name `tl_melbo_before`: types are told by names."""
    if not (folder / "tl_melbo").is_dir():
        raise FileNotFoundError(f"{folder} holds no tl_melbo; give the folder of a checkout")
    shutil.copytree(folder / "tl_melbo", into / BEFORE)
    for path in (into / BEFORE).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"\btl_melbo\b", BEFORE, text), encoding="utf-8")
    sys.path.insert(0, str(into))
    return importlib.import_module(BEFORE)


def calls(tm: ModuleType) -> dict[str, Callable[[], Any]]:
    """What both can do, by name."""
    model = tm.load_model()
    f = tm.ActivationMap.from_prompts(model, PROMPT, *LAYERS, chat=True)
    theta = torch.randn(32, f.x.shape[-1], generator=torch.Generator().manual_seed(0))
    theta = RADIUS * theta / theta.norm(dim=-1, keepdim=True)
    first = tm.melbo(f, 1, radius=RADIUS, steps=2)
    several = tm.melbo(f, 8, radius=RADIUS, steps=2, orthogonal=False)
    last = slice(-3, None)

    def gradient(count: int) -> Callable[[], Any]:
        def once() -> Any:
            some = theta[:count].clone().requires_grad_()
            return torch.autograd.grad(f.delta(some, last).square().sum(), some)

        return once

    def effect() -> Any:
        with torch.no_grad():
            return f.delta(theta, last)

    return {
        "effect of 32 vectors": effect,
        **{f"gradient of {n}": gradient(n) for n in (1, 8, 32)},
        "melbo, 2 vectors, 3 gradients": lambda: tm.melbo(f, 2, radius=RADIUS, steps=3),
        "melbo, 8 at once, 3 gradients": lambda: tm.melbo(
            f, 8, radius=RADIUS, steps=3, orthogonal=False
        ),
        "melbo_ortho, 1 vector, 15 gradients": lambda: tm.melbo_ortho(
            f, first[0], n_vectors=1, steps=15
        ),
        "log-probabilities of 8": lambda: tm.next_token_log_probs(
            model, PROMPT, several, chat=True
        ),
        "generate 8 x 20": lambda: tm.generate(
            model, PROMPT, several, max_new_tokens=20, chat=True
        ),
        "KL of 8": lambda: tm.analysis.kl_divergence(model, PROMPT, several, chat=True),
    }


def main(folder: str, *chosen: str, turns: int = 7) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as copies:
        before, now = calls(renamed(Path(folder), Path(copies))), calls(tl_melbo)
        print("| call | before, s | now, s | now / before |\n|---|---|---|---|")
        for name in (name for name in now if not chosen or any(part in name for part in chosen)):
            old, new = fastest(before[name], now[name], repeats=turns)
            print(f"| {name} | {old:.3f} | {new:.3f} | {new / old:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(
            "usage: python -m benchmarks.against FOLDER_OF_ANOTHER_CHECKOUT [PART_OF_A_ROW ...]"
        )
    main(*sys.argv[1:])
