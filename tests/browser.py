"""Headless Chromium for tests of our pages, and what every page keeps to: asking for nothing, running nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    binary, driver_binary = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary and driver_binary, "the packages chromium and chromium-driver are missing: make browser"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_binary))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def opened(driver: webdriver.Chrome, path: Path) -> Iterator[webdriver.Chrome]:
    """The page, opened; afterwards: no console message, no request but the file, nothing hostile has run."""
    driver.get_log("performance")
    driver.get(path.as_uri())
    yield driver
    assert driver.get_log("browser") == []
    here = path.as_uri()
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # By document: the browser's own start page may still be loading when the first test begins.
    asked = {request["request"]["url"].partition("#")[0] for request in sent if request["documentURL"].startswith(here)}
    assert asked == {here} and driver.current_url.startswith(here)
    assert driver.execute_script("return window.pwned") is None
    assert driver.find_elements(By.CSS_SELECTOR, "img, iframe, object, link, script[src]") == []


@contextmanager
def seen_as(driver: webdriver.Chrome, width: int, scheme: str) -> Iterator[None]:
    """A window of `width` pixels and a reader who prefers `scheme`."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def fits_and_follows(driver: webdriver.Chrome, width: int, scheme: str) -> bool:
    """Nothing sticks out sideways, and the paper is brighter than the ink exactly in light mode."""
    paper, ink = driver.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return [s.backgroundColor, s.color].map((c) => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
    )
    inside = driver.execute_script("return document.documentElement.scrollWidth") <= width
    return bool(inside and (paper > ink) == (scheme == "light"))
