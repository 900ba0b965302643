"""A picture of a page for the README: `make picture`."""

import sys
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.conftest import SWITCHES, found_or_none, wait_for

WIDTH, HEIGHT = 1180, 1500
READY = "return document.documentElement.dataset.ready !== undefined"


def take(page: Path, picture: Path) -> None:
    """From the behaviours on: the cards, and the first rows of the table."""
    with browser("--hide-scrollbars") as driver:
        screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get(page.resolve().as_uri() + "#behaviours")
        wait_for(driver, READY)
        driver.execute_script("document.querySelector('.target').classList.remove('target')")
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        picture.write_bytes(b64decode(shot["data"]))


@contextmanager
def browser(*switches: str) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = found_or_none("chromium", "chromium-browser", "google-chrome") or ""
    for switch in (*SWITCHES, *switches):
        options.add_argument(switch)
    driver = webdriver.Chrome(options, Service(found_or_none("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
