"""What the last digits of a search hang on, and what of it is ours to choose."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tl_melbo.discovery._protocol import EffectMap
from tl_melbo.errors import warn_user

# How far the same vectors were apart, by other instructions or threads: see docs/numbers.md.
_APART = "0.01% (MELBO) to 0.6% (MELBO-ortho)"


@contextmanager
def own_arithmetic(f: EffectMap) -> Iterator[None]:
    """Gradients, and the types that the map has, whatever the caller's surroundings ask for."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(f.x.device.type, enabled=False),
    ):
        yield


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What the last digits of a result hang on, beside the versions."""
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
    }
    return facts | {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else facts


def warn_if_elsewhere(theirs: Any, ours: Mapping[str, Any]) -> None:
    if not isinstance(theirs, Mapping) or theirs == ours:
        return
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    differing = ", ".join(f"{name}={theirs.get(name)} (here {ours.get(name)})" for name in names)
    warn_user(
        f"previous: found with {differing}. The search goes on, but not bit for bit as without a "
        f"break: where it was measured, vectors differed by {_APART} of their norm"
    )
