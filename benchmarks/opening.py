"""How fast does a large page open? In headless Chromium, and what its controls take there.

    python -m benchmarks.opening [--vectors 200] [--samples 8]

The vectors are random ones of a tiny model, the texts those that models wrote in
benchmarks.transcoding, in turn, as if they were of both signs, greedy and sampled. All count as
coherent: to random weights no text is likely.
"""

import argparse
import functools
import itertools
import math
import statistics
import tempfile
from pathlib import Path

import pandas as pd
import pytest

import tl_melbo as tm
from benchmarks.tables import markdown
from tests.conftest import wait_for
from tests.picture import READY, browser
from tests.tiny_models import tiny_bridge

PROMPT, TEXTS = "Tell me about yourself.", Path(__file__).with_name("transcoding_texts.csv")
REPEATS = 7
OPENED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
# What the script does, and waiting for the next two frames, so that what it changed is drawn.
TIMED = """
const done = arguments[arguments.length - 1], began = performance.now();
{};
requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
"""
TYPED = "const field = document.getElementById('search'); field.value = 'city'; "
CONTROLS = {
    "sort by KL": "document.querySelector('#vectors th[data-column=kl] .sort').click()",
    "search for a word": TYPED + "field.dispatchEvent(new Event('input', {bubbles: true}))",
    "clear the filters": "document.querySelector('#filters .clear').click()",
    "a chip": "document.querySelector('#chips .chip').click()",
    "a vector's row": "location.hash = '#v120'",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vectors", type=int, default=200, metavar="N")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="beside the greedy one")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        written(page, chosen.vectors, chosen.samples)
        rows, n_cards = opened(page)
        size = f"{page.stat().st_size / 1e6:.1f} MB"
        print(f"{size}, {chosen.vectors} vectors, both signs, {n_cards} behaviours")
        print(markdown(pd.DataFrame(rows, columns=["", "seconds", "slowest"])))


def written(page: Path, n_vectors: int, n_samples: int) -> None:
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, PROMPT, 1, 4, chat=True)
    found = tm.random_vectors(f, n_vectors, radius=4.0)
    kept = itertools.cycle(pd.read_csv(TEXTS, keep_default_na=False)["completion"])
    signs = itertools.product(range(n_vectors), (1.0, -1.0), range(1 + n_samples))
    places = [*((-1, 0.0, sample) for sample in range(1 + n_samples)), *signs]
    texts = pd.DataFrame(places, columns=["vector", "scale", "sample"])
    texts = texts.assign(prompt=PROMPT, completion=[next(kept) for _ in places])
    every = functools.partial(
        tm.analysis.behaviours, largest_perplexity=math.inf, largest_repetition=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_melbo.report._page.behaviours", every)
        tm.report.write(page, model, found, completions=texts, activation_map=f)


def opened(page: Path) -> tuple[list[tuple[str, str, str]], int]:
    """What each takes, in the middle and at most, and how many cards the page has."""
    taken: dict[str, list[float]] = {}
    with browser() as driver:
        driver.set_window_size(1300, 900)
        for _ in range(REPEATS):
            driver.get("about:blank")
            driver.get(page.as_uri())
            wait_for(driver, READY)
            taken.setdefault("open, to a table that can be used", []).append(
                driver.execute_script(OPENED)
            )
            for name, script in CONTROLS.items():
                some = taken.setdefault(name, [])
                some.append(driver.execute_async_script(TIMED.replace("{}", script)))
        n_cards = driver.execute_script("return document.querySelectorAll('#cards > *').length")
    rows = [
        (name, f"{statistics.median(some) / 1000:.2f}", f"{max(some) / 1000:.2f}")
        for name, some in taken.items()
    ]
    return rows, n_cards


if __name__ == "__main__":
    main()
