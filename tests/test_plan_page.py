"""The page of a plan: its numbers against the evaluation it was made from, and in a real browser."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, fits_and_follows, opened, seen_as
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from farspan.jobs import cli
from farspan.jobs.report.timeline import Picture, lasting, picture, span_text
from farspan.memory.evaluate import evaluate
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.policies import fixed_policy
from farspan.memory.prediction import Prediction
from farspan.memory.problem import PlanProblem

HERE = Path(__file__).parent
HOSTILE = "</script><script>window.pwned = 1</script>{{ 7 * 7 }}"
JOB = """
from farspan import SFTJob, RandomModel, TextData, LoRA, MemoryBudget, Parallel
job = SFTJob(name="p", model=RandomModel(family="llama", hidden=4096, layers={layers}, heads=32, kv_heads=8,
             ffn=14336, vocab="125k"), data=TextData("stdlib", context="{context}"), adapter=LoRA(rank=16),
             memory=MemoryBudget(hardware="{hardware}", host="24GiB", disk="24GiB", mlp_tile=2048{more}))
"""
SLOW = {
    "extends": "h200",
    "name": "slow",
    "title": "slow " + HOSTILE,
    "copy_out_bytes_per_s": 2e9,
    "copy_in_bytes_per_s": 2e9,
    "disk_write_bytes_per_s": 4e8,
    "disk_read_bytes_per_s": 3e8,
}


def saved(name: str) -> PlanProblem:
    return PlanProblem.model_validate(json.loads((HERE / "plan_problems" / f"{name}.json").read_text())["problem"])


def drawn(problem: PlanProblem, placement: Placement) -> tuple[Picture, Prediction]:
    prediction = evaluate(problem, placement, timeline=True)
    return picture(problem, prediction), prediction


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload-inputs", "memo", "ssdtrain"])
@pytest.mark.parametrize("name", ["llama-8b-128k-tiled", "deep-512k"])
def test_lanes_say_what_the_evaluation_says(name: str, policy: Any) -> None:
    problem = saved(name)
    found, prediction = drawn(problem, fixed_policy(problem, policy))
    seconds = {role: total for role, _, total in found.roles}
    parts = prediction.parts
    times = problem.micro_batches
    assert seconds["forward"] * times == pytest.approx(parts.forward_s + parts.attention_forward_s)
    assert seconds["backward"] * times == pytest.approx(parts.backward_s + parts.attention_backward_s)
    assert seconds.get("computed again", 0.0) * times == pytest.approx(parts.recompute_s)
    assert seconds.get("waiting", 0.0) * times == pytest.approx(parts.stalled_s, abs=1e-6)
    for lane in found.lanes:
        for before, after in pairwise(lane.bars):
            assert before.start + before.width <= after.start + 0.02, (lane.name, before, after)
        if lane.name != "compute":
            rate = getattr(problem.links, f"{lane.name.replace(' ', '_')}_bytes_per_s")
            moved = prediction.moved_bytes[lane.name.replace(" ", "_")]  # type: ignore[index]
            assert lane.busy_s == pytest.approx(moved / rate)
    assert sum(len(lane.bars) for lane in found.lanes) < 2000
    device = found.memory[0]
    assert max(level for _, level in device.levels) == device.peak_bytes == prediction.device_peak_bytes


def test_waits_are_named_after_what_was_waited_for() -> None:
    problem = saved("llama-8b-128k-tiled")
    slow = problem.links.model_copy(update={"disk_read_bytes_per_s": 1e8, "disk_write_bytes_per_s": 1e8})
    problem = problem.model_copy(update={"links": slow})
    layers = (LayerPlan(x=Rows(disk=problem.rows)),) * len(problem.layers)
    placement = Placement(rows=problem.rows, attention_rows=problem.attention_rows, layers=layers)
    found, prediction = drawn(problem, placement)
    seconds: dict[str, float] = {}
    for bar in found.lanes[0].bars:
        if bar.role == "waiting":
            lane = bar.title.removeprefix("waiting for ").split(",")[0].replace(" ", "_")
            seconds[lane] = seconds.get(lane, 0.0) + bar.width * found.end_s / 1000
    stalls = {lane: stall for lane, stall in prediction.parts.stall_s.items() if stall}
    assert seconds.keys() == stalls.keys() and len(stalls) == 3
    for lane, stall in stalls.items():
        assert seconds[lane] == pytest.approx(stall, rel=0.01, abs=0.01 * found.end_s), lane


def test_working_memory_stays_while_a_copy_ends_in_the_middle_of_it() -> None:
    """The level falls by what was copied, not by what the layer that runs is working with."""
    problem = saved("llama-8b-128k-tiled")
    timeline = evaluate(problem, fixed_policy(problem, "offload-inputs"), timeline=True).timeline
    assert timeline is not None
    forwards = [i for i in timeline.intervals if i.label.startswith("forward")]
    copied = {i.end_s: i.bytes for i in timeline.intervals if i.lane == "copy_out"}
    levels = lasting(timeline.device)
    inside = [
        (before[1] - after[1], copied[after[0]])
        for before, after in pairwise(levels)
        if after[0] in copied and any(f.start_s < after[0] < f.end_s for f in forwards)
    ]
    assert len(inside) > 10 and all(fell == size for fell, size in inside)


def test_levels_without_moments_that_take_no_time() -> None:
    assert lasting([(0, 1), (1, 1), (1, 5), (2, 3), (2, 6), (3, 0)]) == [(0, 1), (1, 5), (2, 6), (3, 0)]
    assert lasting([(0, 1), (1, 9), (1, 2)]) == [(0, 1), (1, 9), (1, 2)]
    assert lasting([]) == [(0.0, 0)]
    assert [span_text(s) for s in (503.9, 0.0123, 4.4e-4, 0.0)] == ["503.9 s", "12.3 ms", "440 µs", "0 s"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def made(folder: Path, *flags: str, layers: int = 32, context: str = "128k", more: str = "") -> Path:
    (folder / "slow.json").write_text(json.dumps(SLOW))
    job = JOB.format(layers=layers, context=context, hardware=folder / "slow.json", more=more)
    (folder / "job.py").write_text(job)
    assert cli.main(["plan", str(folder / "job.py"), "--html", str(folder / "plan.html"), *flags]) in (0, 3)
    return folder / "plan.html"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plan"), "--longest", "--set", "memory.device=40GiB")


@pytest.fixture
def page(driver: webdriver.Chrome, path: Path) -> Iterator[webdriver.Chrome]:
    with opened(driver, path) as page:
        yield page


def test_the_page_says_what_the_json_says(page: webdriver.Chrome, path: Path, capsys: Any) -> None:
    assert cli.main(["plan", str(path.with_name("job.py")), "--json", "--longest", "--set", "memory.device=40GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    text = page.find_element(By.TAG_NAME, "body").text
    assert page.find_element(By.CSS_SELECTOR, ".status").text == "fits"
    assert f"{found['longest_context_tokens']:,} tokens" in text
    assert found["device_peak_at"] in text and found["bottleneck"] in text
    assert found["next_best"] is None or found["next_best"]["kind"] in text
    assert span_text(found["step_s"]) in text
    for line in found["assumed"]:
        name, _, what = line.partition(": ")
        assert name in text and what in text
    assert "slow " + HOSTILE in page.find_element(By.CSS_SELECTOR, ".headline").text
    rows = page.find_elements(By.CSS_SELECTOR, "#need .tiers tbody tr")
    assert [row.find_element(By.TAG_NAME, "td").text for row in rows] == ["device", "host", "disk"]
    (tensors,) = found["kept_tensors"].values()
    shown = page.find_elements(By.CSS_SELECTOR, ".kept tbody tr")
    names = [row.find_element(By.TAG_NAME, "td").text for row in shown]
    assert names == [tensor["name"] for tensor in tensors][: len(names)] and 8 <= len(names) <= len(tensors)
    assert f"{sum(tensor['bytes_per_row'] for tensor in tensors) / 1024:.1f} KiB a token" in text
    lanes = [span.text for span in page.find_elements(By.CSS_SELECTOR, ".lanes .ys span")]
    assert lanes[0] == "compute" and set(lanes[1:]) <= {"copy out", "disk write", "disk read", "copy in"}
    titles = page.execute_script("return [...document.querySelectorAll('rect title')].map((t) => t.textContent)")
    assert any(title.startswith("forward of layer 0, ") for title in titles)
    assert any(title.startswith("rebuild of layer ") for title in titles)
    assert len(page.find_elements(By.CSS_SELECTOR, ".peak")) == 2
    assert len(page.find_elements(By.CSS_SELECTOR, ".curves .reference")) == 2


def title_at(page: webdriver.Chrome, share: float) -> str:
    """What the compute lane does there, from the bars as drawn."""
    bars = page.execute_script(
        "return [...document.querySelectorAll('g[data-lane=compute] rect')].map("
        "(r) => [Number(r.getAttribute('x')), Number(r.getAttribute('width')), r.textContent])"
    )
    return next(title for x, width, title in bars if x <= 1000 * share < x + width).split(",")[0]


def test_lanes_and_levels_are_read_at_the_pointer(page: webdriver.Chrome) -> None:
    data = json.loads(str(page.find_element(By.ID, "data").get_attribute("textContent")))
    plot = page.find_element(By.CSS_SELECTOR, ".lanes")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    for share in (0.1, 0.6, 0.9):
        offset = round((share - 0.5) * plot.size["width"])
        ActionChains(page, duration=0).move_to_element_with_offset(plot, offset, 0).perform()
        time_s = (0.5 + offset / plot.size["width"]) * data["end"]
        moment = page.find_element(By.ID, "moment").text
        assert f"compute: {title_at(page, time_s / data['end'])}" in moment
        for one in data["memory"]:
            # the pointer stands on a whole pixel: a moment earlier or later
            around = {[y for x, y in zip(one["x"], one["y"]) if x <= time_s * off][-1] for off in (0.998, 1.002)}
            shown = page.find_element(By.CSS_SELECTOR, f"[data-level={one['tier']}]").text
            near = {f"{y / 2**30:.1f} GiB" for x, y in zip(one["x"], one["y"]) if abs(x - time_s) < 0.01 * data["end"]}
            assert shown in {*(f"{level / 2**30:.1f} GiB" for level in around), *near}
    before = page.find_element(By.CSS_SELECTOR, "[data-level=device]").text
    ActionChains(page, duration=0).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert page.find_element(By.ID, "moment").text == ""
    assert page.find_element(By.CSS_SELECTOR, "[data-level=device]").text == "40.0 GiB" != before


@pytest.mark.parametrize("width", [360, 700, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_window_and_follows_the_colour_scheme(page: webdriver.Chrome, width: int, scheme: str) -> None:
    with seen_as(page, width, scheme):
        assert fits_and_follows(page, width, scheme)
        assert page.execute_script("return document.documentElement.scrollHeight") < 4800, "a column has no width"


def test_two_layers_are_labelled_and_80_stay_light(driver: webdriver.Chrome, tmp_path: Path) -> None:
    few = made(tmp_path, layers=2, context="32k", more=', plan="offload-inputs"')
    with opened(driver, few) as page:
        names = [name.text for name in page.find_elements(By.CSS_SELECTOR, ".lanes .name")]
        assert {"backward 0", "backward 1", "loss head", "waiting"} <= set(names)
        assert "Nothing to do: disk write, disk read." in page.find_element(By.TAG_NAME, "main").text
    many = made(tmp_path, "--set", "memory.plan=recompute", layers=80, context="64k")
    assert many.stat().st_size < 300_000
    with opened(driver, many) as page:
        widths = page.execute_script(
            "const bars = [...document.querySelectorAll('g[data-lane=compute] rect')];"
            "return bars.map((bar) => bar.getBoundingClientRect().width)"
        )
        assert len(widths) > 200, len(widths)
        assert sorted(widths)[len(widths) // 4] > 0.5


def test_what_does_not_fit_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = made(tmp_path, "--set", "memory.plan=keep", "--set", "data.context=1M").read_text()
    assert "does not fit" in text and "more than there is" in text


def test_a_page_that_cannot_be_written_is_a_bad_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, layers=2, context="8k")
    assert cli.main(["plan", str(tmp_path / "job.py"), "--html", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 4 and f"--html {tmp_path}" in told
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_neither_torch_nor_ray_nor_matplotlib_is_loaded(tmp_path: Path) -> None:
    made(tmp_path, layers=2, context="8k")
    code = (
        "import sys; from farspan.jobs import cli; "
        f"cli.main(['plan', {str(tmp_path / 'job.py')!r}, '--html', {str(tmp_path / 'again.html')!r}]); "
        "print([m for m in ('torch', 'ray', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr
    assert (tmp_path / "again.html").stat().st_size > 10_000
