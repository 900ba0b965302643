"""A sweep of eight searches: one process of two threads beside two Ray workers of one thread.

python -m benchmarks.sweep [MODEL] [N_VECTORS]
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

import tl_melbo as tm

ENGINES: dict[str, dict[str, Any]] = {
    "one process, two threads": {"threads": 2},
    "two Ray workers, one thread each": {"engine": "ray", "workers": 2, "threads": 1},
}


def main(model: str | None = None, n_vectors: int = 8) -> pd.DataFrame:
    grid = {
        "model": model, "prompt": "Tell me about yourself.", "source_layer": [4, 8],
        "target_layer": [14, 16], "radius": [8.0, 12.0], "n_vectors": n_vectors,
    }  # fmt: skip
    rows = []
    for name, engine in ENGINES.items():
        rows.append({"engine": name, **_timed(grid, engine)})
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(float_format="{:.2f}".format))
    return table


def _timed(grid: dict[str, Any], engine: dict[str, Any]) -> dict[str, float]:
    """The whole call, and the vectors a second from the first one that was kept on."""
    seen: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        table = tm.sweep(
            grid, Path(folder) / "sweep", **engine,
            on_progress=lambda done, _: seen.append((done, time.perf_counter())),
        )  # fmt: skip
        whole = time.perf_counter() - begun
    if not all(table["status"] == "done"):
        raise RuntimeError(f"searches failed: {table['error'].dropna().tolist()}")
    (first, at), (last, end) = next(each for each in seen if each[0] > 0), seen[-1]
    end = next(when for done, when in seen if done == last)
    return {"seconds in all": whole, "vectors a second": (last - first) / (end - at)}


if __name__ == "__main__":
    chosen, length = [*sys.argv[1:], None, None][:2]
    main(chosen or None, int(length or 8))
