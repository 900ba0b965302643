"""The page in a real browser, by clicks and keys: it works, it asks no network, no text runs."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import page_in_browser as pages
from tests.conftest import patch_everywhere, wait_for
from tests.page_in_browser import HOSTILE, N_VECTORS, click, fragment, go, rows_shown, texts
from tl_melbo import analysis, report

pytestmark = pytest.mark.browser

AXE = Path(__file__).parent / "data" / "axe.min.js"
ALL_KEYS = [f"{vector}{sign}" for vector in range(N_VECTORS) for sign in ("", "-")]
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.fixture(scope="module")
def page(tiny_llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    gibberish_too = functools.partial(
        analysis.behaviours, largest_perplexity=1e30, largest_repetition=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch_everywhere(patch, "default_embedder", lambda: "words")
        patch.setattr("tl_melbo.report._page.behaviours", gibberish_too)
        return pages.write(tiny_llama, tmp_path_factory.mktemp("page with spaces & more"))


@pytest.fixture(params=[1300, 390], ids=["laptop", "phone"])
def opened(request: pytest.FixtureRequest, driver: Any, page: Path) -> Any:
    screen = {"width": request.param, "height": 844, "deviceScaleFactor": 1}
    screen["mobile"] = request.param < 500
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for log in ("browser", "performance"):
        driver.get_log(log)  # what earlier pages left there
    go(driver, page)
    yield driver
    driver.execute_script("try { localStorage.clear() } catch {}")


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


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


def test_the_policy_stops_a_script_that_got_in_all_the_same(opened: Any) -> None:
    opened.execute_script(
        "const image = document.createElement('img');"
        "image.setAttribute('onerror', 'window.injected = true'); image.src = 'data:,';"
        "const script = document.createElement('script'); script.textContent = 'injected = true';"
        "document.body.append(image, script)"
    )
    wait_for(opened, "return document.images[document.images.length - 1].complete")
    assert opened.execute_script("return window.injected ?? null") is None


def test_the_page_does_not_scroll_sideways(opened: Any) -> None:
    for key in ALL_KEYS:
        opened.execute_script(f"document.querySelector('#v{key} .open').click()")
    opened.execute_script(OPEN_ALL)
    opened.execute_script("document.querySelectorAll('.more').forEach(b => b.click())")
    outside = (
        "return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
        "e.getBoundingClientRect().right > innerWidth + 1 && "
        "!e.closest('.plot, .mono, .links, .away')).map(e => e.outerHTML.slice(0, 80))"
    )
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.execute_script(outside) == []
    assert opened.execute_script(wide) == 0
    opened.execute_script(
        "document.querySelectorAll('#vectors .pick input').forEach((b, i) => i < 2 && b.click())"
    )
    click(opened, "#selection .compare")
    assert opened.execute_script(outside) == []


def test_newlines_and_code_are_seen(opened: Any) -> None:
    cell = opened.find_element("css selector", "#v4 td.completion .words")
    assert cell.text == HOSTILE[4]
    assert cell.size["height"] > 2 * float(
        cell.value_of_css_property("font-size").removesuffix("px")
    )
    click(opened, "#seen summary")
    assert pages.PROMPT in opened.find_element("css selector", "#seen pre").text


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


def test_commands_are_copied(opened: Any, page: Path) -> None:
    commands = ["found[2]", f"tl-melbo ortho '{page.parent}' --vector 2"]
    copied = "return [...document.querySelectorAll('.copy')].some(b => b.textContent === 'copied')"
    for place, expected in enumerate(commands):
        go(opened, page, "#open=v2")
        click(opened, f"#v2 + .details .command:nth-child({place + 1}) .copy")
        wait_for(opened, copied)
        search = click(opened, "#search")
        search.send_keys("\ue009v")  # Control and V
        wait_for(opened, "return document.querySelector('#search').value !== ''")
        assert search.get_property("value") == expected


def test_an_address_brings_it_all_back(opened: Any, page: Path) -> None:
    state = "#v4-&sel=2,4-&open=v4-&scale=2&sort=-kl&hide=filtered&q=at&cmp=1"
    go(opened, page, state)
    assert opened.find_element("css selector", "#compare").is_displayed()
    assert opened.find_element("css selector", "#v4- + .details") is not None
    assert opened.find_element("css selector", "#search").get_property("value") == "at"
    assert opened.find_element("css selector", "#scale output").text == "× 2"
    checked = "return [...document.querySelectorAll('.pick input:checked')].map(b => b.closest('tr').dataset.key).sort()"
    assert opened.execute_script(checked) == ["2", "4-"]
    # A broken one is no reason to show nothing.
    go(opened, page, "#%E0%A4%A&scale=7&sel=99,x&sort=nothing&low=abc&__proto__=1")
    assert len(rows_shown(opened)) == len(ALL_KEYS)
    assert opened.get_log("browser") == []


def test_a_link_shows_what_filters_hide(opened: Any, page: Path) -> None:
    go(opened, page, "#v0-&q=no+such+words")
    assert "0-" in rows_shown(opened)
    assert opened.find_element("css selector", "#search").get_property("value") == ""


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


def test_charts_are_dark_at_night(opened: Any) -> None:
    plot = "document.querySelector('[data-figure=specificity]')"
    opened.execute_script(f"{plot}.scrollIntoView()")
    wait_for(opened, f"return {plot}.layout !== undefined")
    ink = f"return {plot}.layout.font.color"
    day = opened.execute_script(ink)
    night = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", night)
    try:
        wait_for(opened, f"{ink} !== '{day}'")
        assert opened.execute_script(f"return {plot}.layout.paper_bgcolor") == "rgba(0,0,0,0)"
        assert violations(opened) == []
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_paper_shows_everything_but_the_controls(opened: Any) -> None:
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        closed = "return document.querySelectorAll('main details:not([open], .plain)').length"
        wait_for(opened, f"{closed} === 0")
        for selector in ("nav", "#chips", ".pick", ".more", ".copy", "#export"):
            shown = opened.find_elements("css selector", selector)
            assert not any(each.is_displayed() for each in shown), selector
        members = opened.find_elements("css selector", "#cards .members a")
        assert members
        assert all(each.is_displayed() for each in members)
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    wait_for(opened, "return document.querySelectorAll('#cards details[open]').length === 0")


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
                "const e = document.activeElement; return e.getAttribute('aria-label') ?? e.textContent"
            )
        )
        outline = opened.execute_script(
            "return getComputedStyle(document.activeElement).outlineStyle"
        )
        assert outline != "none"
    assert seen[:3] == ["KL at least", "KL at most", "★ starred"]
    assert any(text.startswith("near baseline") for text in seen)


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
