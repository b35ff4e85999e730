"""The report in a real browser: click through all of it, read values under the pointer, and prove that nothing is
requested and nothing hostile runs. The oracle for every value is `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, fits_and_follows, opened, seen_as
from report_sample import HOSTILE, UNIGRAM, write_sample
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from farspan.jobs.progress import timed_parts
from farspan.jobs.report.build import write_report
from farspan.trainer.run_folder import RunFolder, read_metrics

CHARTS = ("loss", "tokens_per_s", "parts", "memory", "stalls", "grad_norm", "lr")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = write_sample(tmp_path_factory.mktemp("outputs") / "hostile", hostile=HOSTILE)
    write_report(folder.root)
    return folder


@pytest.fixture
def page(driver: webdriver.Chrome, run: RunFolder) -> Iterator[webdriver.Chrome]:
    with opened(driver, run.report) as page:
        yield page


def plot(page: webdriver.Chrome, chart: str) -> WebElement:
    element = page.find_element(By.CSS_SELECTOR, f"figure[data-chart={chart}] .plot")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    return element


def point_at(page: webdriver.Chrome, chart: str, share: float) -> None:
    """Move the pointer to a share of the plot's width; selenium counts from the centre."""
    element = plot(page, chart)
    ActionChains(page, duration=0).move_to_element_with_offset(
        element, round((share - 0.5) * element.size["width"]), 5
    ).perform()


def legend(page: webdriver.Chrome, chart: str) -> dict[str, str]:
    buttons = page.find_elements(By.CSS_SELECTOR, f"figure[data-chart={chart}] button")
    return {str(b.get_attribute("data-series")): b.find_element(By.TAG_NAME, "b").text for b in buttons}


def cross_step(page: webdriver.Chrome, chart: str) -> str:
    return page.find_element(By.CSS_SELECTOR, f"figure[data-chart={chart}] .cross span").text


def test_values_under_the_pointer_are_those_of_the_step(page: webdriver.Chrome, run: RunFolder) -> None:
    records = {record["step"]: record for record in read_metrics(run.metrics)}
    for chart, share, step in (
        ("loss", 20 / 39, 21),
        ("tokens_per_s", 0.0, 1),
        ("parts", 1.0, 40),
        ("memory", 9 / 39, 10),
    ):
        point_at(page, chart, share)
        record = records[step]
        evaluated = [records[s]["eval_loss"] for s in sorted(records) if s <= step and "eval_loss" in records[s]]
        expected: dict[str, dict[str, Any]] = {
            "loss": {
                "loss": record["loss"],
                "eval_loss": evaluated[-1] if evaluated else None,
                "unigram": UNIGRAM,
            },
            "tokens_per_s": {"tokens_per_s": record["tokens_per_s"]},
            "parts": {name: timed_parts(record).get(name, 0.0) for name in legend(page, "parts")},
            "memory": {key: record[key] / 2**30 for key in ("host_bytes", "device_peak_bytes")},
            "stalls": record["stall_s"],
            "grad_norm": {"grad_norm": record["grad_norm"]},
            "lr": {"lr": record["lr"]},
        }
        assert tuple(expected) == CHARTS
        for other in CHARTS:
            assert cross_step(page, other) == f"step {step}", other
            shown = legend(page, other)
            assert shown.keys() == expected[other].keys()
            for key, value in expected[other].items():
                if value is None:
                    assert shown[key] == "–"
                else:
                    assert float(shown[key]) == pytest.approx(value, rel=6e-3, abs=1e-12), (other, key, step)


def test_leaving_the_plot_shows_the_last_values_again(page: webdriver.Chrome) -> None:
    before = {chart: legend(page, chart) for chart in CHARTS}
    point_at(page, "loss", 0.3)
    assert legend(page, "loss") != before["loss"]
    ActionChains(page, duration=0).move_to_element(page.find_element(By.CSS_SELECTOR, "nav a")).perform()
    assert {chart: legend(page, chart) for chart in CHARTS} == before
    assert not page.find_element(By.CSS_SELECTOR, "figure[data-chart=loss] .cross").is_displayed()


def test_every_toggle_hides_and_brings_back_its_curve(page: webdriver.Chrome) -> None:
    buttons = page.find_elements(By.CSS_SELECTOR, "button[data-series]")
    assert len(buttons) == 18
    paths = "return [...document.querySelectorAll('.curves path')].map((path) => path.getAttribute('d'))"
    drawn_by_python = page.execute_script(paths)
    for button in buttons:
        figure = button.find_element(By.XPATH, "ancestor::figure")
        key = button.get_attribute("data-series")
        path = figure.find_element(By.CSS_SELECTOR, f"path[data-series='{key}']")
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert path.get_attribute("d") == ""
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
    redrawn = page.execute_script(paths)
    for before, after in zip(drawn_by_python, redrawn, strict=True):
        assert numbers_of(after) == pytest.approx(numbers_of(before), abs=0.11)  # one unit of the last digit written


def numbers_of(path: str) -> list[float]:
    for letter in "MLhZ,":
        path = path.replace(letter, " ")
    return [float(number) for number in path.split()]


def test_drag_zooms_all_charts_and_show_all_undoes_it(page: webdriver.Chrome) -> None:
    element = plot(page, "loss")
    width = element.size["width"]
    drag = ActionChains(page, duration=0).move_to_element_with_offset(element, -round(width / 4), 5)
    drag.click_and_hold().move_by_offset(round(width / 2), 0).release().perform()
    assert page.find_element(By.ID, "range").text == "11 to 30"
    for chart in CHARTS:
        ticks = page.find_elements(By.CSS_SELECTOR, f"figure[data-chart={chart}] .xs span")
        assert min(int(tick.text) for tick in ticks) >= 11
    point_at(page, "lr", 0.0)
    assert cross_step(page, "loss") == "step 11"
    page.find_element(By.ID, "reset").click()
    assert not page.find_element(By.ID, "range").is_displayed()
    point_at(page, "lr", 0.0)
    assert cross_step(page, "loss") == "step 1"


def test_arrow_keys_walk_along_the_steps(page: webdriver.Chrome) -> None:
    plot(page, "loss").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert cross_step(page, "memory") == "step 2"


def test_every_anchor_leads_to_its_section(page: webdriver.Chrome) -> None:
    links = page.find_elements(By.CSS_SELECTOR, "nav a")
    assert [link.text for link in links] == ["Charts", "Time", "Events", "Checkpoints", "Configuration"]
    for link in links:
        link.click()
        target = str(link.get_attribute("href")).partition("#")[2]
        section = page.find_element(By.ID, target)
        top = page.execute_script("return arguments[0].getBoundingClientRect().top", section)
        assert -5 <= top < 1000


def test_search_filters_the_configuration(page: webdriver.Chrome) -> None:
    rows = page.find_elements(By.CSS_SELECTOR, "#settings tbody tr")
    box = page.find_element(By.ID, "search")
    box.send_keys("planner ZERO")
    shown = [row.text for row in rows if row.is_displayed()]
    assert len(shown) == 1 and "parallel.zero" in shown[0]
    assert page.find_element(By.ID, "found").text == f"1 of {len(rows)}"
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    assert all(row.is_displayed() for row in rows)


def test_hostile_texts_are_shown_as_text(page: webdriver.Chrome) -> None:
    shown = (
        "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>\\u202e\\u001b[31m{{ 7 * 7 }}"
    )
    assert page.find_element(By.TAG_NAME, "h1").text == "quickstart" + shown
    summary = page.find_element(By.CSS_SELECTOR, "#events summary")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", summary)
    summary.click()
    assert page.find_element(By.CSS_SELECTOR, "#events pre").text.endswith("Killed " + shown)


def test_injected_script_is_stopped_by_the_policy_too(page: webdriver.Chrome) -> None:
    """Were escaping ever to fail, the content security policy still runs nothing but the page's own script."""
    page.execute_script(
        "const s = document.createElement('div'); s.innerHTML = '<b onclick=\"window.pwned = 3\">x</b>';"
        "document.body.append(s); s.firstChild.click(); s.remove()"
    )
    assert page.execute_script("return window.pwned") is None
    refused = page.get_log("browser")
    assert len(refused) == 1 and "Content Security Policy" in refused[0]["message"]


@pytest.mark.parametrize("width", [360, 700, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_window_and_follows_the_colour_scheme(page: webdriver.Chrome, width: int, scheme: str) -> None:
    with seen_as(page, width, scheme):
        assert fits_and_follows(page, width, scheme)


def test_without_javascript_curves_and_tables_are_there(driver: webdriver.Chrome, run: RunFolder) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(run.report.as_uri())
        assert not driver.find_element(By.ID, "search").is_displayed()
        assert len(driver.find_elements(By.CSS_SELECTOR, ".curves path")) == 19
        assert driver.find_element(By.CSS_SELECTOR, "#settings tbody tr").is_displayed()
        assert len(driver.find_elements(By.CSS_SELECTOR, "#events tbody tr")) == 8
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_long_run_stays_light(driver: webdriver.Chrome, tmp_path: Path) -> None:
    path = write_report(write_sample(tmp_path / "long", steps=6000).root)
    assert path.stat().st_size < 600_000
    driver.get(path.as_uri())
    assert driver.get_log("browser") == []
    counts = driver.execute_script(
        "const { charts } = JSON.parse(document.getElementById('data').textContent);"
        "return charts.flatMap((chart) => chart.series.map((series) => series.x.length))"
    )
    assert max(counts) <= 1000
    assert "at most 1000 of the 6000 steps" in driver.find_element(By.ID, "charts").text
