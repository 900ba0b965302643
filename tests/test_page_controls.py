"""The page's controls by real clicks and keys, on a laptop and on a phone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import page_in_browser as pages
from tests.conftest import wait_for
from tests.page_in_browser import (
    ALL_KEYS,
    HOSTILE,
    click,
    fragment,
    go,
    opened_at,
    press,
    rows_shown,
    texts,
    write,
)  # fmt: skip
from tl_melbo import report

pytestmark = pytest.mark.browser

OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.fixture(scope="module")
def page(tiny_llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_llama, tmp_path_factory.mktemp("page with spaces & more"))


@pytest.fixture(params=[1300, 390], ids=["laptop", "phone"])
def opened(request: pytest.FixtureRequest, driver: Any, page: Path) -> Iterator[Any]:
    yield from opened_at(driver, page, request.param)


@pytest.fixture
def laptop(driver: Any, page: Path) -> Iterator[Any]:
    """For what hangs on no width."""
    yield from opened_at(driver, page, 1300)


def test_filters_search_and_back(opened: Any) -> None:
    assert rows_shown(opened) == ALL_KEYS
    click(opened, "#chips .chip")  # the first hides what is near the baseline
    assert {"0-", "1-"} & {*rows_shown(opened)} == set()
    assert fragment(opened)["hide"] == "near"
    search = click(opened, "#search")
    search.send_keys("second LINE")
    assert rows_shown(opened) == ["4"]
    wait_for(opened, "return location.hash.includes('q=second')")
    search.clear()
    search.send_keys("no such words")
    assert rows_shown(opened) == []
    assert opened.find_element("css selector", "#none").is_displayed()
    click(opened, "#filters .clear")
    assert rows_shown(opened) == ALL_KEYS
    opened.back()
    wait_for(opened, "return document.querySelectorAll('#vectors tr.row').length === 0")
    opened.back()
    wait_for(opened, "return document.querySelectorAll('#vectors tr.row').length === 12")
    star = opened.find_element("xpath", "//button[contains(., 'starred')]")
    star.click()
    assert rows_shown(opened) == ["3"]  # by the notes that were given
    star.click()
    low = click(opened, "#filters input[type=number]")
    kl = opened.execute_script(
        "return JSON.parse(document.querySelector('#data').textContent).rows.map(r => r.values.kl)"
    )
    middle = sorted(kl)[6]
    low.send_keys(str(middle))
    assert rows_shown(opened) == [
        key for key, each in zip(ALL_KEYS, kl, strict=True) if each >= middle
    ]


def test_a_click_or_a_key_on_a_header_sorts(opened: Any) -> None:
    rows = opened.execute_script(
        "return JSON.parse(document.querySelector('#data').textContent).rows"
    )
    kl = {row["key"]: row["values"]["kl"] for row in rows}
    head = "#vectors th.kl"
    click(opened, f"{head} button")
    assert [kl[key] for key in rows_shown(opened)] == sorted(kl.values())
    assert opened.find_element("css selector", head).get_attribute("aria-sort") == "ascending"
    press(opened, "\ue007")  # Enter
    assert [kl[key] for key in rows_shown(opened)] == sorted(kl.values(), reverse=True)
    assert fragment(opened)["sort"] == "-kl"
    # Numbers that are not known come last, both ways.
    for _ in range(2):
        click(opened, "#vectors th.objective button")
        assert [key.endswith("-") for key in rows_shown(opened)[6:]] == [True] * 6


def test_the_slider_moves_all_texts_or_one(opened: Any) -> None:
    first = "#v0 td.completion"
    assert texts(opened, first)[0].startswith(HOSTILE[0])
    slider = opened.find_element("css selector", "#scale input")
    slider.send_keys("\ue014")  # right
    assert "At 2.0." in texts(opened, first)[0]
    assert "At 2.0." in texts(opened, "#v3- td.completion")[0]
    wait_for(opened, "return location.hash.includes('scale=2')")
    click(opened, "#v3- .open")
    own = click(opened, "#v3- + .details input[type=range]")
    own.send_keys("\ue011")  # Home: the smallest
    assert "At 0.5." in texts(opened, "#v3- + .details blockquote")[0]
    assert "At 2.0." in texts(opened, first)[0]
    wait_for(opened, "return location.hash.includes('own=3-%3A0.5')")


def test_an_opened_row_tells_all(opened: Any) -> None:
    button = opened.find_element("css selector", "#v2- .open")
    opened.execute_script(
        "arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", button
    )
    press(opened, " ")
    assert button.get_attribute("aria-expanded") == "true"
    details = "#v2- + .details"
    assert texts(opened, f"{details} .samples li")[0].startswith("Sampled 1.")
    click(opened, f"{details} .chip")
    # "baker from Oslo" is what the baseline lacks; the longest common part is unmarked.
    marks = "".join(texts(opened, f"{details} mark"))
    assert "baker from Oslo" in marks
    assert "long walks" not in marks
    press(opened, " ")
    assert texts(opened, f"{details} mark") == []
    click(opened, "#v1 .open")
    assert "<b>p1</b>" in texts(opened, "#v1 + .details .tokens")[0]
    click(opened, "#v1 + .details div > .chip:only-child")
    assert texts(opened, "#v1 + .details .step") == ["<u>I</u>", " am", " here"]
    assert opened.execute_script("return window.injected ?? null") is None


def test_behaviours_open_and_link_to_their_vectors(opened: Any) -> None:
    card = "#cards .card"
    key = opened.find_element("css selector", card).get_attribute("id")
    click(opened, f"{card} summary")
    wait_for(opened, f"return document.querySelector('{card} .members') !== null")
    wait_for(opened, f"return location.hash.includes('open={key}')")
    member = opened.find_element("css selector", f"{card} .members a.vector")
    target = member.get_attribute("href").partition("#")[2]
    click(opened, f"{card} .members a.vector")
    row = opened.find_element("css selector", f"#{target}")
    assert "target" in row.get_attribute("class")
    top = opened.execute_script("return arguments[0].getBoundingClientRect().top", row)
    assert 0 <= top < 844
    # The focus is there, too.
    assert opened.execute_script("return document.activeElement.closest('tr').id") == target
    click(opened, f"#{target} a.behaviour")
    assert fragment(opened).keys() >= {key}
    opened.back()
    wait_for(opened, f"return location.hash.slice(1).split('&')[0] === '{target}'")
    aside = opened.find_element("css selector", "#aside")
    assert not aside.get_attribute("open")
    click(opened, "#aside > summary")
    assert "= baseline" in "".join(texts(opened, "#b0")) or click(opened, "#b0 summary")


def test_rename_star_merge_and_note_last(opened: Any, page: Path, tmp_path: Path) -> None:
    first, second = [
        f"#{key}"
        for key in opened.execute_script(
            "return [...document.querySelectorAll('#cards .card')].map(c => c.id)"
        )[:2]
    ]
    click(opened, f"{first} .star")
    click(opened, f"{first} summary")
    click(opened, f"{first} .rename").send_keys("Pirates <b>\t")
    click(opened, f"{first} .note").send_keys("Arr.\t")
    assert texts(opened, f"{first} .name") == ["Pirates <b>"]
    assert any("Pirates <b>" in text for text in texts(opened, "#vectors a.behaviour"))
    click(opened, f"{second} summary")
    from selenium.webdriver.support.ui import Select

    choice = opened.find_element("css selector", f"{second} select")
    Select(choice).select_by_value(first[1:])
    assert opened.find_elements("css selector", second) == []
    click(opened, "#v5 .star")
    click(opened, "#v5 .open")
    click(opened, "#v5 + .details .rename").send_keys("five\t")
    assert texts(opened, "#v5 .given") == ["five"]
    go(opened, page)
    assert texts(opened, f"{first} .name") == ["Pirates <b>"]
    assert texts(opened, f"{first} .remark") == ["Arr."]
    assert opened.find_elements("css selector", second) == []
    assert texts(opened, "#v5 .given") == ["five"]
    opened.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    click(opened, "#export button")
    wait_for_file(opened, tmp_path / "notes.json")
    notes = report.read_notes(tmp_path / "notes.json")
    assert notes["vectors"]["5"] == {"star": True, "name": "five", "note": ""}
    assert notes["vectors"]["3"]["name"] == "<b>mine</b>"
    (behaviour,) = notes["behaviours"]
    assert (behaviour["star"], behaviour["name"], behaviour["note"]) == (
        True,
        "Pirates <b>",
        "Arr.",
    )
    assert len(behaviour["merged"]) == 1
    click(opened, f"{first} summary")
    opened.find_element("xpath", "//button[.='Take apart']").click()
    assert len(opened.find_elements("css selector", second)) == 1


def wait_for_file(driver: Any, path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 30).until(lambda _: path.is_file())


def test_it_works_where_nothing_may_be_stored(driver: Any, page: Path) -> None:
    denied = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied') } })"
    )
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": denied})
    try:
        go(driver, page)
        click(driver, "#v1 .star")
        assert driver.find_element("css selector", "#v1 .star").text == "★"
        assert driver.find_element("css selector", "#not-kept").is_displayed()
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_two_ticked_vectors_are_compared(opened: Any) -> None:
    for key in ("2-", "4-"):
        click(opened, f"#v{key} .pick input")
    assert fragment(opened)["sel"] == "2-,4-"
    assert texts(opened, "#selection .python code") == ["-found[[2, 4]]"]
    click(opened, "#selection .compare")
    dialog = opened.find_element("css selector", "#compare")
    assert dialog.is_displayed()
    assert re.search(r"Cosine of the vectors .*, of their effects -?\d", dialog.text)
    # Side by side at every scale, and the samples.
    assert len(texts(opened, "#compare .side")) == 2 * len(pages.SCALES)
    assert len(texts(opened, "#compare .samples li")) == 4
    marked = texts(opened, "#compare mark")
    assert any("baker" in text for text in marked)
    assert not any("long walks" in text for text in marked)
    click(opened, "#compare [data-mode=unsteered]")
    assert any("from Oslo" in text for text in texts(opened, "#compare mark"))
    click(opened, "#compare [data-mode=none]")
    assert texts(opened, "#compare mark") == []
    press(opened, "\ue00c")  # Escape
    wait_for(opened, "return !document.querySelector('#compare').open")
    assert "cmp" not in fragment(opened)
    opened.back()
    wait_for(opened, "return document.querySelector('#compare').open")
    press(opened, "\ue00c")
    click(opened, "#selection .none")
    assert not opened.find_element("css selector", "#selection").is_displayed()


def test_commands_are_copied(laptop: Any, page: Path) -> None:
    commands = ["found[2]", f"tl-melbo ortho '{page.parent}' --vector 2"]
    copied = "return [...document.querySelectorAll('.copy')].some(b => b.textContent === 'copied')"
    for place, expected in enumerate(commands):
        go(laptop, page, "#open=v2")
        click(laptop, f"#v2 + .details .command:nth-child({place + 1}) .copy")
        wait_for(laptop, copied)
        search = click(laptop, "#search")
        search.send_keys("\ue009v")  # Control and V
        wait_for(laptop, "return document.querySelector('#search').value !== ''")
        assert search.get_property("value") == expected


def test_an_address_brings_it_all_back(laptop: Any, page: Path) -> None:
    state = "#v4-&sel=2,4-&open=v4-&scale=2&sort=-kl&hide=filtered&q=at&cmp=1"
    go(laptop, page, state)
    assert laptop.find_element("css selector", "#compare").is_displayed()
    assert laptop.find_element("css selector", "#v4- + .details") is not None
    assert laptop.find_element("css selector", "#search").get_property("value") == "at"
    assert laptop.find_element("css selector", "#scale output").text == "× 2"
    checked = (
        "return [...document.querySelectorAll('tr:has(.pick :checked)')].map(r => r.id).sort()"
    )
    assert laptop.execute_script(checked) == ["v2", "v4-"]
    # A broken one is no reason to show nothing.
    go(laptop, page, "#%E0%A4%A&scale=7&sel=99,x&sort=nothing&low=abc&__proto__=1")
    assert len(rows_shown(laptop)) == len(ALL_KEYS)
    assert laptop.get_log("browser") == []


def test_a_link_shows_what_filters_hide(laptop: Any, page: Path) -> None:
    go(laptop, page, "#v0-&q=no+such+words")
    assert "0-" in rows_shown(laptop)
    assert laptop.find_element("css selector", "#search").get_property("value") == ""


def test_the_tables_of_a_family_work_too(opened: Any) -> None:
    rows = "return document.querySelectorAll('#family-2-vectors tbody tr').length"
    opened.execute_script(
        "document.querySelector('[data-table=family-2-vectors]').scrollIntoView()"
    )
    wait_for(opened, f"{rows} === 4")
    search = opened.find_element("css selector", "[data-table=family-2-vectors] input")
    search.send_keys("second line")
    wait_for(opened, f"{rows} === 1")
    # Only its own table listens.
    assert rows_shown(opened) == ALL_KEYS
    search.clear()
    click(opened, "#family-2-vectors th.norm button")
    norms = [float(text) for text in texts(opened, "#family-2-vectors td.norm")]
    assert norms == sorted(norms)
    opened.execute_script(OPEN_ALL)
    table = opened.find_element("css selector", "#composition-2")
    assert table.is_displayed()
    # One pair and three more, mean and sum: of the rescaled ones, the sum is the mean.
    assert len(table.find_elements("css selector", "tbody tr")) == 16
    assert "unsteered" in texts(opened, "#adapter-texts td")
