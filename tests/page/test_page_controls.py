"""The page's controls by real clicks and keys, on a laptop and on a phone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_for
from tests.page import browser as pages
from tests.page.browser import (
    ALL_KEYS,
    HOSTILE,
    click,
    fragment,
    go,
    press,
    rows_shown,
    texts,
)  # fmt: skip
from tl_melbo import report

pytestmark = pytest.mark.browser

OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


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
    star = "//button[contains(., 'starred')]"
    click(opened, star)
    assert rows_shown(opened) == ["3"]  # by the notes that were given
    click(opened, star)
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
    assert "those at scale 1" in opened.find_element("css selector", "#scale").text
    click(opened, "#v3- .open")
    own = click(opened, "#v3- + .details input[type=range]")
    own.send_keys("\ue011")  # Home: the smallest
    assert "At 0.5." in texts(opened, "#v3- + .details blockquote")[0]
    assert "At 2.0." in texts(opened, first)[0]
    wait_for(opened, "return location.hash.includes('own=3-%3A0.5')")


@pytest.mark.slow
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


def test_random_vectors_stand_beside_each_behaviour(laptop: Any) -> None:
    # One of eight samples, and none, with Wilson's intervals.
    for text in texts(laptop, "#cards .card"):
        told = "1 of 8 (2%–47%)" if "“first line" in text else "0 of 8 (0%–32%)"
        assert f"random vectors, {told}" in text
    assert any("“first line" in text for text in texts(laptop, "#cards .card"))
    told = texts(laptop, "#behaviours > .hint")[0]
    assert "12 completions under 2 random vectors of the same norm and their negatives" in told


def test_rename_star_merge_and_note_last(opened: Any, page: Path, tmp_path: Path) -> None:
    first, second = [
        f"#{key}"
        for key in opened.execute_script(
            "return [...document.querySelectorAll('#cards .card')].map(c => c.id)"
        )[:2]
    ]
    click(opened, f"{first} .star")
    click(opened, f"{first} summary")
    # A card is filled when it has opened, which takes a moment.
    wait_for(opened, f"return document.querySelector('{first} .rename') !== null")
    click(opened, f"{first} .rename").send_keys("Pirates <b>\t")
    click(opened, f"{first} .note").send_keys("Arr.\t")
    assert texts(opened, f"{first} .name") == ["Pirates <b>"]
    assert any("Pirates <b>" in text for text in texts(opened, "#vectors a.behaviour"))
    click(opened, f"{second} summary")
    wait_for(opened, f"return document.querySelector('{second} select') !== null")
    from selenium.webdriver.support.ui import Select

    choice = opened.find_element("css selector", f"{second} select")
    Select(choice).select_by_value(first[1:])
    click(opened, f"{second} .merge")
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
    click(opened, "//button[.='Take apart']")
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


@pytest.mark.slow
def test_commands_are_copied(laptop: Any, page: Path) -> None:
    commands = ["found[2]", f"tl-melbo ortho '{page.parent}' --vector 2"]
    copied = "return [...document.querySelectorAll('.copy')].some(b => b.textContent === 'copied')"
    for place, expected in enumerate(commands):
        go(laptop, page, "#open=v2")
        click(laptop, f"#v2 + .details .command:nth-child({2 * place + 2}) .copy")
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


@pytest.mark.slow
def test_a_link_shows_what_filters_hide(laptop: Any, page: Path) -> None:
    go(laptop, page, "#v0-&q=no+such+words")
    assert "0-" in rows_shown(laptop)
    assert laptop.find_element("css selector", "#search").get_property("value") == ""


@pytest.mark.slow
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


def data_on(driver: Any) -> dict[str, Any]:
    return json.loads(texts(driver, "#data")[0])


def keep(driver: Any, page: Path, notes: Any) -> None:
    """Open the page with these notes in the browser's store."""
    place = f"tl_melbo:{data_on(driver)['library']}"
    driver.execute_script("localStorage.setItem(...arguments)", place, json.dumps(notes))
    go(driver, page)


def kept(driver: Any) -> dict[str, Any]:
    return json.loads(driver.execute_script("return Object.values(localStorage)[0]"))


@pytest.mark.slow
def test_a_store_of_others_leaves_the_page_whole(laptop: Any, page: Path) -> None:
    emoji = "\N{GRINNING FACE}"
    good = {"star": True, "name": "a" * 199 + 2 * emoji}
    for notes in (
        None,
        3,
        {"vectors": None, "behaviours": []},
        {"vectors": {"1": None, "x": good, "2": good}, "behaviours": [None, {"members": 3}, 4]},
        {"vectors": {"2": good}, "behaviours": [{"members": [], "merged": [None]}]},
    ):
        keep(laptop, page, notes)
        assert rows_shown(laptop) == ALL_KEYS
    assert texts(laptop, "#v2 .given") == ["a" * 199 + emoji]
    assert laptop.get_log("browser") == []


@pytest.mark.slow
def test_merged_in_circles_and_chains_no_card_is_lost(laptop: Any, page: Path) -> None:
    cards = [card for card in data_on(laptop)["behaviours"] if not card["baseline"]]
    keys, (one, two, three) = (
        [c["key"] for c in cards[:3]],
        [c["rows"] or c["samples"] for c in cards[:3]],
    )
    shown = "return [...document.querySelectorAll('#cards .card')].map(c => c.id)"
    rest = [card["key"] for card in cards[3:]]
    for behaviours in (
        [{"members": one, "merged": [two]}, {"members": two, "merged": [one, three]}],
        [{"members": two, "merged": [three]}, {"members": one, "merged": [two, ["99"]]}],
    ):
        keep(laptop, page, {"vectors": {}, "behaviours": behaviours})
        assert laptop.execute_script(shown) == [keys[0], *rest]
        click(laptop, f"#{keys[0]} summary")
        wait_for(laptop, f"return document.querySelector('#{keys[0]} .members') !== null")
        members = len(texts(laptop, f"#{keys[0]} .members li"))
        assert members == len([*one, *two, *three])
    # A group that is not on this page is told of, and kept for the next.
    assert texts(laptop, "#lost-notes li")[0].endswith(": 99")
    click(laptop, "#v1 .star")
    merged = [each["merged"] for each in kept(laptop)["behaviours"] if each["members"] == one]
    assert merged == [[two, three, ["99"]]]


@pytest.mark.slow
def test_the_table_follows_stars_and_merged_behaviours(laptop: Any, page: Path) -> None:
    from selenium.webdriver.support.ui import Select

    one, two = [card for card in data_on(laptop)["behaviours"] if not card["baseline"]][:2]
    click(laptop, f"#{one['key']} summary")
    click(laptop, f"//*[@id='{one['key']}']//button[.='Only these in the table']")
    assert rows_shown(laptop) == one["rows"]
    top = "return document.querySelector('#all-vectors').getBoundingClientRect().top"
    assert -1 <= laptop.execute_script(top) < 400
    click(laptop, f"#{two['key']} summary")
    choice = laptop.find_element("css selector", f"#{two['key']} select")
    Select(choice).select_by_value(one["key"])
    click(laptop, f"#{two['key']} .merge")
    both = sorted([*one["rows"], *two["rows"]])
    assert sorted(rows_shown(laptop)) == both
    # The address of a behaviour that was merged away leads to its new place.
    go(laptop, page, f"#b={two['key']}")
    assert sorted(rows_shown(laptop)) == both
    pressed = "#chips [aria-label=Behaviour] [aria-pressed=true]"
    click(laptop, pressed)
    assert rows_shown(laptop) == ALL_KEYS
    assert texts(laptop, pressed) == []
    go(laptop, page, "#star=1")
    assert rows_shown(laptop) == ["3"]
    click(laptop, "#v3 .star")
    assert rows_shown(laptop) == []


@pytest.mark.slow
def test_as_many_are_near_the_baseline_as_are_hidden(laptop: Any, page: Path) -> None:
    for scale in pages.SCALES:
        go(laptop, page, f"#scale={scale:g}")
        chip = click(laptop, "#chips .chip")
        assert int(chip.text.split()[-1]) == len(ALL_KEYS) - len(rows_shown(laptop)) > 0
    # That nobody speaks is no tag.
    assert "none" not in {*texts(laptop, ".tag"), *(t.split()[0] for t in texts(laptop, ".chip"))}


def test_what_is_not_known_or_not_compared(laptop: Any, page: Path) -> None:
    """A row without a KL, and a long text that differs in its first word."""
    pattern = r'(<script type="application/json" id="data">)(.*?)(</script>)'
    data = data_on(laptop)
    rows = {row["key"]: row for row in data["rows"]}
    rows["1"]["values"]["kl"] = None
    data["texts"][data["unsteered"][0][0]] = "one " + "word " * 1_300
    data["texts"][rows["5"]["texts"]["1"][0]] = "two " + "word " * 1_300
    made = json.dumps(data).replace("<", "\\u003c")
    other = page.with_name("other.html")
    text = page.read_text(encoding="utf-8")
    other.write_text(re.sub(pattern, lambda part: part[1] + made + part[3], text), encoding="utf-8")
    go(laptop, other, "#low=0&open=v5")
    assert rows_shown(laptop) == [key for key in ALL_KEYS if key != "1"]
    click(laptop, "#v5 + .details .chip")
    assert texts(laptop, "#v5 + .details mark") == ["two "]
    assert "the first 1200 words" in texts(laptop, "#v5 + .details .words")[0]
