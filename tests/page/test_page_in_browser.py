"""The page in a real browser: no text runs, nothing is asked of a network, everyone can read it."""

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
    N_VECTORS,
    click,
    fragment,
    go,
    press,
    texts,
)  # fmt: skip

pytestmark = pytest.mark.browser

AXE = Path(__file__).parent.parent / "data" / "axe.min.js"
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


def test_no_text_runs_nothing_complains_nothing_leaves(opened: Any, page: Path) -> None:
    for key in ALL_KEYS:
        opened.execute_script(f"document.querySelector('#v{key}')?.querySelector('.open').click()")
    opened.execute_script(OPEN_ALL)
    opened.execute_script("dispatchEvent(new Event('beforeprint'))")
    wait_for(opened, "return document.querySelectorAll('.plot .main-svg').length >= 10")
    assert opened.execute_script("return window.injected ?? null") is None
    assert opened.get_log("browser") == []
    # Nothing of the texts became an element, but for the pieces that the page makes itself.
    inside = [f"{place} *:not(span, code, mark)" for place in (".words", ".samples li", "h1")]
    assert (
        opened.execute_script(f"return document.querySelectorAll('{', '.join(inside)}').length")
        == 0
    )
    shown = "".join(texts(opened, "main"))
    for words in (
        HOSTILE[0],
        HOSTILE[1],
        "[U+202E]right to left",
        "␛[31mred",
        "<b>mine</b>",
        "<b>p0</b>",
    ):
        assert words in shown
    assert not {"\u202e", "\x1b", "\x00"} & set(shown)
    assert "[cut: 1,000,000 characters in all]" in shown
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        event["params"]["request"]["url"].partition("#")[0]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    outside = {url for url in asked if not url.startswith(("data:", "blob:", "about:"))}
    assert outside == {page.as_uri()}


def test_the_policy_stops_a_script_that_got_in_all_the_same(laptop: Any) -> None:
    laptop.execute_script(
        "const image = document.createElement('img');"
        "image.setAttribute('onerror', 'window.injected = true'); image.src = 'data:,';"
        "const script = document.createElement('script'); script.textContent = 'injected = true';"
        "document.body.append(image, script)"
    )
    wait_for(laptop, "return document.images[document.images.length - 1].complete")
    assert laptop.execute_script("return window.injected ?? null") is None


def test_the_page_does_not_scroll_sideways(opened: Any) -> None:
    for key in ALL_KEYS:
        opened.execute_script(f"document.querySelector('#v{key} .open').click()")
    opened.execute_script(OPEN_ALL)
    opened.execute_script("document.querySelectorAll('.more').forEach(b => b.click())")
    outside = (
        "return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
        "e.getBoundingClientRect().right > innerWidth + 1 && "
        "!e.closest('.plot, .mono, #chips .chips, .away')).map(e => e.outerHTML.slice(0, 80))"
    )
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.execute_script(outside) == []
    assert opened.execute_script(wide) == 0
    opened.execute_script(
        "document.querySelectorAll('#vectors .pick input').forEach((b, i) => i < 2 && b.click())"
    )
    click(opened, "#selection .compare")
    assert opened.execute_script(outside) == []


def test_newlines_and_code_are_seen(laptop: Any) -> None:
    cell = laptop.find_element("css selector", "#v4 td.completion .words")
    assert cell.text == HOSTILE[4]
    assert cell.size["height"] > 2 * float(
        cell.value_of_css_property("font-size").removesuffix("px")
    )
    click(laptop, "#seen summary")
    assert pages.PROMPT in laptop.find_element("css selector", "#seen pre").text


def point_at(driver: Any, name: str, across: float, down: float, *, click: bool = False) -> None:
    """The mouse on a figure's field, in shares of its width and height."""
    from selenium.webdriver import ActionChains

    field = driver.find_element("css selector", f"[data-figure={name}] .nsewdrag")
    place = "const r = arguments[0].getBoundingClientRect(); return [r.width, r.height]"
    width, height = driver.execute_script(place, field)
    offset = (width * (across - 0.5), height * (down - 0.5))
    moves = ActionChains(driver).move_to_element_with_offset(field, *map(int, offset))
    (moves.click() if click else moves).perform()


def test_figures_show_texts_and_lead_on(opened: Any) -> None:
    for name in ("map", "effects"):
        opened.execute_script(f"document.querySelector('[data-figure={name}]').scrollIntoView()")
        wait_for(
            opened, f"return document.querySelector('[data-figure={name}] .nsewdrag') !== null"
        )
    figure = "document.querySelector('[data-figure={}]')"
    order = opened.execute_script(f"return {figure.format('effects')}.data[0].y")
    point_at(opened, "effects", 1.5 / N_VECTORS, 0.5 / N_VECTORS)
    wait_for(opened, "return !document.querySelector('#hover').hidden")
    panel = texts(opened, "#hover")[0]
    assert "cosine of effects" in panel
    for key in order[:2]:
        assert pages.HOSTILE[int(key)].replace("\x1b", "␛")[:10] in panel
    assert (
        opened.execute_script("return document.querySelectorAll('#hover :is(a, img)').length") == 0
    )
    point_at(opened, "effects", 1.5 / N_VECTORS, 0.5 / N_VECTORS, click=True)
    wait_for(opened, "return document.querySelector('#compare').open")
    assert fragment(opened)["sel"] == ",".join(order[:2])
    press(opened, "\ue00c")
    opened.execute_script(f"{figure.format('map')}.scrollIntoView()")
    trace = f"{figure.format('map')}.data[0]"
    key, x, y = opened.execute_script(
        f"const {{ xaxis, yaxis }} = {figure.format('map')}._fullLayout;"
        f"const t = {trace};"
        "const [px, py] = [xaxis.d2p(t.x[0]), yaxis.d2p(t.y[0])];"
        "return [t.meta[0], px / xaxis._length, py / yaxis._length]"
    )
    point_at(opened, "map", x, y, click=True)
    wait_for(opened, f"return location.hash.slice(1).split('&')[0] === 'v{key}'")
    assert opened.execute_script("return window.injected ?? null") is None


@pytest.mark.slow
def test_charts_are_dark_at_night(laptop: Any) -> None:
    plot = "document.querySelector('[data-figure=specificity]')"
    laptop.execute_script(f"{plot}.scrollIntoView()")
    wait_for(laptop, f"return {plot}.layout !== undefined")
    ink = f"return {plot}.layout.font.color"
    day = laptop.execute_script(ink)
    night = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    laptop.execute_cdp_cmd("Emulation.setEmulatedMedia", night)
    try:
        wait_for(laptop, f"{ink} !== '{day}'")
        assert laptop.execute_script(f"return {plot}.layout.paper_bgcolor") == "rgba(0,0,0,0)"
        assert violations(laptop) == []
    finally:
        laptop.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_paper_shows_everything_but_the_controls(laptop: Any) -> None:
    laptop.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        closed = "return document.querySelectorAll('main details:not([open], .plain)').length"
        wait_for(laptop, f"{closed} === 0")
        for selector in ("nav", "#chips", ".pick", ".more", ".copy", "#export"):
            shown = laptop.find_elements("css selector", selector)
            assert not any(each.is_displayed() for each in shown), selector
        members = laptop.find_elements("css selector", "#cards .members a")
        assert members
        assert all(each.is_displayed() for each in members)
    finally:
        laptop.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    wait_for(laptop, "return document.querySelectorAll('#cards details[open]').length === 0")


def violations(driver: Any) -> list[str]:
    """What axe finds serious, as rule and first place."""
    if not driver.execute_script("return typeof axe === 'object'"):
        driver.execute_script(AXE.read_text(encoding="utf-8"))
    found = driver.execute_async_script(
        "const done = arguments[0]; axe.run({resultTypes: ['violations']})"
        ".then(r => done(r.passes.length > 10 ? r.violations : null))"
    )
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:120]} ({len(each['nodes'])})"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def test_axe_finds_nothing_serious(opened: Any) -> None:
    opened.execute_script(
        "document.querySelectorAll('#v0 .open, #v1- .open').forEach(b => b.click())"
    )
    opened.execute_script(
        "document.querySelectorAll('#vectors .pick input').forEach((b, i) => i < 2 && b.click())"
    )
    opened.execute_script(OPEN_ALL)
    assert violations(opened) == []
    click(opened, "#selection .compare")
    assert violations(opened) == []


def test_tab_reaches_the_controls_in_their_order(opened: Any) -> None:
    opened.execute_script("document.querySelector('#search').focus()")
    seen = []
    for _ in range(12):
        press(opened, "\ue004")
        seen.append(
            opened.execute_script(
                "const e = document.activeElement;"
                "return e.getAttribute('aria-label') ?? e.textContent"
            )
        )
        outline = opened.execute_script(
            "return getComputedStyle(document.activeElement).outlineStyle"
        )
        assert outline != "none"
    assert seen[:3] == ["KL at least", "KL at most", "★ starred"]
    assert any(text.startswith("near baseline") for text in seen)


@pytest.mark.slow
def test_rows_are_built_when_somebody_scrolls_there(laptop: Any, page: Path) -> None:
    """On a page of 20 times as many vectors."""
    text = page.read_text(encoding="utf-8")
    pattern = r'(<script type="application/json" id="data">)(.*?)(</script>)'
    data = json.loads(re.findall(pattern, text)[0][1])
    for row in data["rows"][:]:
        for i in range(1, 20):
            own = row["number"] + N_VECTORS * i
            data["rows"].append(row | {"key": f"{own}{'-' * (row['sign'] < 0)}", "number": own})
    big = page.with_name("big.html")
    made = json.dumps(data).replace("<", "\\u003c")
    big.write_text(re.sub(pattern, lambda part: part[1] + made + part[3], text), encoding="utf-8")
    go(laptop, big)
    built = "return document.querySelectorAll('#vectors tr.row').length"
    assert laptop.execute_script(built) < 150
    assert laptop.find_element("css selector", "#count").text == "240 rows"
    go(laptop, big, "#v110")
    row = laptop.find_element("css selector", "#v110")
    assert 0 <= laptop.execute_script("return arguments[0].getBoundingClientRect().top", row) < 844
    laptop.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert laptop.execute_script(built) == 240


@pytest.mark.parametrize("column", ["constructor", "-__proto__", "no such column"])
def test_an_address_that_sorts_by_no_column_leaves_the_table(
    laptop: Any, page: Path, column: str
) -> None:
    go(laptop, page, f"#sort={column}")
    assert laptop.find_elements("css selector", "#vectors tr.row")
