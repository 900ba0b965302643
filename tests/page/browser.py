"""A page with everything on it, in a browser: what its tests share."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tests.conftest import patch_everywhere, wait_for
from tl_melbo import analysis, report
from tl_melbo.analysis._top_tokens import top_tokens_and_kl

PROMPT = "Tell me <script>window.injected = 'prompt'</script> about yourself."
N_VECTORS = 6
SCALES = (0.5, 1.0, 2.0)
N_SAMPLES = 2
ALL_KEYS = [f"{vector}{sign}" for vector in range(N_VECTORS) for sign in ("", "-")]
HOSTILE = [
    "<script>window.injected = 'script'</script>",
    "<img src=x onerror=\"window.injected = 'image'\"></td></tr></table></script>",
    "\x1b[31mred\x1b[0m \x00\x07 \u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "x" * 1_000_000,
    "first line\nsecond line",
    "{{ prompt }} ${prompt} <link rel=stylesheet href=https://example.org/a.css>",
]
BASELINE = "I am a helpful assistant and I like long walks by the sea."
# The negatives of the first two are the baseline's text, those of the others a person's.
PERSON = "I am a {} from Oslo and I like long walks by the sea."
PEOPLE = ("baker", "sailor", "teacher", "painter")


def completions() -> pd.DataFrame:
    """Every scale and sample, with the hostile texts at scale 1."""
    rows = [(-1, 0.0, sample, BASELINE) for sample in range(1 + N_SAMPLES)]
    for vector in range(N_VECTORS):
        negative = BASELINE if vector < 2 else PERSON.format(PEOPLE[vector - 2])
        for sign, text in ((1, HOSTILE[vector]), (-1, negative)):
            for scale in SCALES:
                at = text if scale == 1 else f"{text[:60]} At {scale}."
                count = 1 + N_SAMPLES if scale == 1 else 1
                told = [at, *(f"Sampled {sample}. {at[:60]}" for sample in (1, 2))][:count]
                rows += [(vector, sign * scale, sample, each) for sample, each in enumerate(told)]
    frame = pd.DataFrame(rows, columns=["vector", "scale", "sample", "completion"])
    frame.insert(2, "prompt", PROMPT)
    return frame


def at_random() -> pd.DataFrame:
    """Under two random vectors: the baseline, but for one sample of the first."""
    places = [(v, sign, n) for v in range(2) for sign in (1.0, -1.0) for n in range(1 + N_SAMPLES)]
    frame = pd.DataFrame(places, columns=["vector", "scale", "sample"])
    texts = [HOSTILE[4] if place == (0, 1.0, 1) else BASELINE for place in places]
    return frame.assign(prompt=PROMPT, completion=texts)


def top_tokens(*args: Any, **options: Any) -> tuple[pd.DataFrame, torch.Tensor]:
    """As they are measured, but hostile."""
    _, kl = top_tokens_and_kl(*args, **options)
    rows = [
        (vector, direction, f"<b>{direction[0]}{vector}</b>", 1.5)
        for vector in range(2 * N_VECTORS)
        for direction in ("promoted", "suppressed")
    ]
    names = ["vector", "direction", "token", "log_prob_change"]
    return pd.DataFrame(rows, columns=names), kl


def token_divergence() -> pd.DataFrame:
    """As the analysis gives it, with hostile tokens."""
    along = [
        (vector, 1.0, 0, PROMPT, place, token, 0.5 * place, [("<i>a</i>", 0.5)], [("b", 0.25)])
        for vector in range(N_VECTORS)
        for place, token in enumerate(["<u>I</u>", " am", " here"])
    ]
    columns = ["vector", "scale", "sample", "prompt", "position", "token", "kl"]
    return pd.DataFrame(along, columns=[*columns, "top", "unsteered_top"])


def write(model: torch.nn.Module, folder: Path) -> Path:
    """The page; texts are grouped by their words, and gibberish counts as coherent."""
    gibberish_too = functools.partial(
        analysis.behaviours, largest_perplexity=1e30, largest_repetition=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch_everywhere(patch, "default_embedder", lambda: "words")
        patch.setattr("tl_melbo.report._page.behaviours", gibberish_too)
        patch.setattr("tl_melbo.report._data.top_tokens_and_kl", top_tokens)
        return _write(model, folder)


def _write(model: torch.nn.Module, folder: Path) -> Path:
    f = tm.ActivationMap.from_prompts(model, PROMPT, 1, 4, chat=True)
    found = tm.melbo(f, n_vectors=N_VECTORS, radius=4.0, steps=3)
    ortho = tm.melbo_ortho(f, found[2], 4, steps=4)
    family = report.collect_family(model, f, ortho, found[2], sizes=(2,), max_new_tokens=2)
    for table in (family.table, family.composition):
        table["completion"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(table))]
    adapted = pd.DataFrame({"vector": [-1, 0], "prompt": PROMPT, "completion": HOSTILE[:2]})
    path = folder / "report #1.html"
    report.write(
        path, model, found, completions=completions(), activation_map=f, families=[family],
        random_texts=at_random(),
        side_effects=tm.evaluation.side_effects(
            model, found, PROMPT, unrelated="Good bye.", passages="One two three."
        ),
        adapter_texts=adapted, run_folder=folder.name, token_divergence=token_divergence(),
        notes={"version": 1, "vectors": {"3": {"star": True, "name": "<b>mine</b>"}}},
    )  # fmt: skip
    return path


def click(driver: Any, selector: str) -> Any:
    """A real click, in the middle of the screen where nothing covers it. An XPath begins with "/".

    A page that still scrolls to where it was sent may move what is being clicked; what stays
    covered is never clicked.
    """
    from selenium.common.exceptions import ElementClickInterceptedException
    from selenium.webdriver.support.ui import WebDriverWait

    kind = "xpath" if selector.startswith("/") else "css selector"
    found = driver.find_element(kind, selector)

    def clicked(_: Any) -> bool:
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()
        return True

    moving = [ElementClickInterceptedException]
    WebDriverWait(driver, 10, ignored_exceptions=moving).until(clicked)
    return found


def texts(driver: Any, selector: str) -> list[str]:
    """What all of them say, shown or not."""
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    return driver.execute_script(script, selector)


def rows_shown(driver: Any) -> list[str]:
    """The keys of the table's rows."""
    script = "return [...document.querySelectorAll('#vectors tr.row')].map(r => r.dataset.key)"
    return driver.execute_script(script)


def fragment(driver: Any) -> dict[str, str]:
    """The state in the address, once it is written there; the anchor under its own name."""
    parts = driver.execute_script("return location.hash.slice(1)").split("&")
    return {name: unquote(value) for name, _, value in (part.partition("=") for part in parts)}


def go(driver: Any, page: Path, state: str = "") -> None:
    """Open the page anew, whatever was open before."""
    driver.get("about:blank")
    driver.get(page.as_uri() + state)
    wait_for(driver, "return document.documentElement.dataset.ready !== undefined")


def opened_at(driver: Any, page: Path, width: int) -> Iterator[Any]:
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for log in ("browser", "performance"):
        driver.get_log(log)  # what earlier pages left there
    go(driver, page)
    yield driver
    driver.execute_script("try { localStorage.clear() } catch {}")


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()
