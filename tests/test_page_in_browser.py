"""The page in a real browser: it works, it asks no network, and no text from a model runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_melbo as tm
from tests.conftest import wait_for
from tl_melbo import report

pytestmark = pytest.mark.browser

PROMPT = "Tell me <script>window.injected = 'prompt'</script> about yourself."
N_VECTORS = 6
HOSTILE = [
    "<script>window.injected = 'script'</script>",
    "<img src=x onerror=\"window.injected = 'image'\"></td></tr></table></script>",
    "\x1b[31mred\x1b[0m \x00\x07 \u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "x" * 1_000_000,
    "first line\nsecond line",
    "{{ prompt }} ${prompt} <link rel=stylesheet href=https://example.org/a.css>",
]


@pytest.fixture(scope="module")
def page(tiny_llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4, chat=True)
    found = tm.melbo(f, n_vectors=N_VECTORS, radius=4.0, steps=3)
    completions = report.collect_completions(tiny_llama, PROMPT, found, max_new_tokens=2)
    unsteered, *others = completions.index
    completions.loc[unsteered, "completion"] = HOSTILE[0] + HOSTILE[2]
    completions.loc[others, "completion"] = [text for text in HOSTILE for _ in range(2)]
    ortho = tm.melbo_ortho(f, found[2], 4, steps=4)
    family = report.collect_family(tiny_llama, f, ortho, found[2], sizes=(2,), max_new_tokens=2)
    for table in (family.table, family.composition):
        table["completion"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(table))]
    path = tmp_path_factory.mktemp("page with spaces & more") / "report #1.html"
    measured = tm.evaluation.side_effects(
        tiny_llama, found, PROMPT, unrelated="Good bye.", passages="One two three."
    )
    report.write(
        path, tiny_llama, found, completions=completions, activation_map=f, families=[family],
        side_effects=measured,
    )  # fmt: skip
    return path


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["laptop", "phone"])
def opened(request: pytest.FixtureRequest, driver: Any, page: Path) -> Any:
    width, height = request.param
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for log in ("browser", "performance"):
        driver.get_log(log)  # what earlier pages left there
    driver.get(page.as_uri())
    wait_for(driver, "return document.querySelector('div.dt-search input') !== null")
    wait_for(driver, "return document.querySelectorAll('.plot .main-svg').length >= 10")
    return driver


def shown_vectors(driver: Any) -> list[int]:
    cells = "document.querySelectorAll('#vectors tbody td.index')"
    return driver.execute_script(f"return [...{cells}].map(cell => +cell.innerText)")


def shown_numbers(driver: Any, column: str) -> list[float]:
    script = (
        "return [...document.querySelectorAll(`#vectors tbody td.${arguments[0]}`)]"
        ".map(c => +c.dataset.order)"
    )
    return driver.execute_script(script, column)


def sort_by(driver: Any, column: str, direction: str) -> None:
    header = driver.find_element("css selector", f"#vectors thead th.{column}")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", header)
    header.click()
    # DataTables sorts a moment after the click.
    wait_for(driver, f"return document.querySelector('th.{column}').ariaSort === '{direction}'")


def test_a_click_on_a_header_sorts(opened: Any) -> None:
    assert shown_vectors(opened) == list(range(N_VECTORS))
    for column in ("objective", "kl"):
        sort_by(opened, column, "ascending")
        ascending = shown_numbers(opened, column)
        assert len(ascending) == N_VECTORS
        assert ascending == sorted(ascending)
        sort_by(opened, column, "descending")
        assert shown_numbers(opened, column) == sorted(ascending, reverse=True)


def test_the_tables_of_a_family_work_too(opened: Any) -> None:
    rows = "return document.querySelectorAll('#family-2-vectors tbody tr').length"
    assert opened.execute_script(rows) == 4
    search = opened.find_element("css selector", "#family-2-vectors_wrapper .dt-search input")
    search.send_keys("second line")
    wait_for(opened, f"{rows} === 1")
    # Only its own table listens.
    assert shown_vectors(opened) == list(range(N_VECTORS))
    assert not opened.find_element("css selector", "#composition-2").is_displayed()
    opened.execute_script(
        "document.querySelectorAll('#family-2 details').forEach(d => d.open = true)"
    )
    table = opened.find_element("css selector", "#composition-2")
    assert table.is_displayed()
    # One pair and three more, mean and sum: of the rescaled ones, the sum is the mean.
    assert len(table.find_elements("css selector", "tbody tr")) == 16


def test_search_filters(opened: Any) -> None:
    search = opened.find_element("css selector", "#vectors_wrapper .dt-search input")
    search.send_keys("second line")
    assert shown_vectors(opened) == [4]
    search.clear()
    search.send_keys("no such words")
    assert shown_vectors(opened) == []


def test_no_text_runs_and_nothing_complains(opened: Any) -> None:
    assert opened.execute_script("return window.injected ?? null") is None
    assert opened.get_log("browser") == []
    # Nothing of the text became an element.
    inside = ".data td div *, blockquote *, h1 *"
    assert opened.execute_script(f"return document.querySelectorAll('{inside}').length") == 0
    text = opened.find_element("css selector", "#vectors tbody tr td.completion").text
    assert HOSTILE[0] in text


def test_what_hovering_shows_is_text_too(opened: Any) -> None:
    """Plotly takes some HTML, and links, in labels; and marks would turn the page's own words."""
    shown = opened.execute_script(
        """
        const texts = [];
        for (const plot of document.querySelectorAll('.plot')) {
          plot.data.forEach((trace, curveNumber) => {
            if (trace.type !== 'scatter' || !Array.isArray(trace.customdata)) return;
            trace.customdata.forEach((_, pointNumber) => {
              Plotly.Fx.hover(plot, [{curveNumber, pointNumber}]);
              const layer = plot.querySelector('.hoverlayer');
              texts.push([layer.textContent, layer.querySelectorAll('a, script, img').length]);
            });
          });
        }
        return texts;
        """
    )
    words = "".join(text for text, _ in shown)
    assert "<script>window.injected = 'script'</script>" in words.replace("\xa0", " ")
    assert "[U+202E]right to left" in words.replace("\xa0", " ")
    assert "␛[31mred" in words
    assert not {"\u202e", "\x1b", "\x00"} & set(words)
    assert {n_elements for _, n_elements in shown} == {0}
    assert opened.execute_script("return window.injected ?? null") is None


def test_the_policy_stops_a_script_that_got_in_all_the_same(opened: Any) -> None:
    opened.execute_script(
        "const image = document.createElement('img');"
        "image.setAttribute('onerror', 'window.injected = true'); image.src = 'data:,';"
        "document.body.append(image)"
    )
    wait_for(opened, "return document.images[document.images.length - 1].complete")
    assert opened.execute_script("return window.injected ?? null") is None


def test_nothing_leaves_the_machine(opened: Any, page: Path) -> None:
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert page.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert [url for url in asked if url.startswith("file:")] == [page.as_uri()]


def test_the_page_does_not_scroll_sideways(opened: Any) -> None:
    widths = "return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    opened.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    page_width, body_width, window_width = opened.execute_script(widths)
    assert page_width <= window_width
    assert body_width <= window_width
    # Nor do its parts stick out of it.
    outside = (
        "return [...document.querySelectorAll('main *')].filter(e => "
        "e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.plot')).length"
    )
    assert opened.execute_script(outside) == 0


def test_newlines_are_seen(opened: Any) -> None:
    cells = opened.find_elements("css selector", "#vectors td.completion div")
    assert cells[4].text == HOSTILE[4]
    assert cells[4].size["height"] > 2 * float(
        cells[4].value_of_css_property("font-size").removesuffix("px")
    )
