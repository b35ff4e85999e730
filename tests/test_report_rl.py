"""The report of an RL run: its charts, its headline, and a page that asks for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from browser import chromium, opened
from selenium.webdriver.common.by import By

from farspan.jobs.report import rl_charts
from farspan.jobs.report.build import write_report


def records(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "loss": 0.01, "grad_norm": 0.3, "lr": 1e-3, "tokens": 100, "tokens_total": 100 * step,
            "tokens_per_s": 500.0, "step_s": 2.0, "parts_s": {}, "stall_s": {}, "host_bytes": 1 << 30,
            "device_peak_bytes": None, "plan_device_peak_bytes": 1 << 28, "disk_bytes": 0, "plan_step_s": 1.0,
            "time": 1000.0 + step, "attempt": 1, "reward_mean": 0.5 + step / 50, "accuracy": 0.5 + step / 30,
            "response_tokens_mean": None if step == 3 else 60.0 - step, "truncated_share": 0.1, "staleness_mean": 0.0,
            "response_tokens": {"correct": {"0.5": 50.0}} if step % 2 else {}, "shaper": {"target_easy": 28.0},
            "waited_s": {"rollout": 1.0, "train": 0.7}, "entropy_mean": 0.2,
            **({"eval_accuracy": 0.875, "eval_response_tokens": 20.25} if step == count else {}),
        }
        for step in range(1, count + 1)
    ]  # fmt: skip


def test_the_page_shows_what_a_reader_asks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    (run / "status.json").write_text('{"status": "done"}')
    page = write_report(run)
    with chromium(tmp_path / "profile") as driver, opened(driver, page):
        assert "87.5% of held-out prompts right in 20.2 tokens" in driver.find_element(By.TAG_NAME, "header").text
        shown = [figure.get_attribute("data-chart") for figure in driver.find_elements(By.CSS_SELECTOR, "figure.chart")]
        assert (
            shown[:3] == ["accuracy", "front", "tokens"] and {"waiting", "reward"} <= {*shown} and "loss" not in shown
        )


def test_a_run_that_stopped_early_has_a_headline() -> None:
    assert rl_charts.headline(records(4)[:2]) == "56.7% right in 58.0 tokens, after step 2."
    front = rl_charts.front(records())
    assert len(front.series[0].x) == 11, "a step without a finished sample has no place in it"
