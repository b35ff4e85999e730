"""Plan beside measured: which steps count, what is a finding, and that run folder, terminal and report all say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import HOSTILE, step_record, write_sample
from rich.console import Console

from farspan.jobs.measured import Comparison, compare, findings, planned_part_of_step_s, steady
from farspan.jobs.plan_file import SavedPlan, read_plan
from farspan.jobs.plan_view import show_measured
from farspan.jobs.report.build import render
from farspan.jobs.report.collect import collect
from farspan.jobs.run import _compare
from farspan.memory.evaluate import evaluate
from farspan.memory.policies import fixed_policy
from farspan.memory.problem import PlanProblem, State
from farspan.trainer.run_folder import RunFolder, write_json

PROBLEM = Path(__file__).parent / "plan_problems" / "llama-8b-32k-tiled.json"


@pytest.fixture
def plan() -> SavedPlan:
    problem = PlanProblem.model_validate(json.loads(PROBLEM.read_text())["problem"])
    on_host = (*problem.states, State(name="moments", tier="host", bytes=1000))
    problem = problem.model_copy(update={"micro_batches": 2, "states": on_host})
    placement = fixed_policy(problem, "offload-inputs")
    return SavedPlan("offload-inputs", problem, placement, evaluate(problem, placement))


def save(plan: SavedPlan, path: Path) -> None:
    write_json(
        path,
        {
            "kind": plan.kind,
            "problem": plan.problem.model_dump(mode="json"),
            "placement": plan.placement.model_dump(mode="json"),
        },
    )


def record(step: int, plan: SavedPlan, *, slower: float = 1.0, more: float = 1.0, **fields: Any) -> dict[str, Any]:
    """A step that took what was planned, times `slower`, and `more` of the memory."""
    prediction, parts = plan.prediction, plan.prediction.parts
    forward_s = parts.forward_s + parts.attention_forward_s + parts.head_s
    stall_s = parts.stall_s
    forward_s += stall_s["copy_out"] + stall_s["disk_write"]
    parts_s = {
        "forward": forward_s * slower,
        "optimizer": parts.optimizer_s * slower,
        "evaluate": 7.0,
        "checkpoint": 3.0,
    }
    parts_s["backward"] = prediction.step_s * slower - parts_s["forward"] - parts_s["optimizer"]
    return {
        "step": step,
        "attempt": 1,
        "step_s": prediction.step_s * slower + 10.0,
        "parts_s": parts_s,
        "stall_s": {lane: seconds * slower for lane, seconds in stall_s.items()},
        "plan_step_s": prediction.step_s,
        "device_peak_bytes": round(prediction.device_peak_bytes * more),
        "plan_device_peak_bytes": prediction.device_peak_bytes,
        "moved_bytes": {"copy_out": 2 * prediction.moved_bytes["copy_out"], "copy_in": 5},
        "tier_peak_bytes": {"host": prediction.host_bytes - 1000},
        **fields,
    }


def test_a_run_as_planned_is_no_finding(plan: SavedPlan) -> None:
    records = [record(step, plan) for step in range(1, 8)]
    assert findings(records) == []
    for _, _, rows in compare(plan, records).tables:
        for row in rows:
            if row.what != "copy in, from host" and row.off is not None:
                assert row.off == pytest.approx(0, abs=1e-6), row
    parts = compare(plan, records).parts
    assert sum(row.planned or 0 for row in parts[:-1]) == pytest.approx(parts[-1].planned)
    assert parts[-1].planned == plan.prediction.step_s


def test_what_misses_by_more_than_a_tenth_is_one(plan: SavedPlan) -> None:
    assert findings([record(step, plan, slower=1.09, more=0.91) for step in range(1, 8)]) == []
    (slow,) = findings([record(step, plan, slower=1.12) for step in range(1, 8)])
    assert slow.quantity == "step_s" and slow.text.endswith(": +12%") and "median of 5" in slow.text
    assert (slow.planned, slow.measured) == (plan.prediction.step_s, pytest.approx(1.12 * plan.prediction.step_s))
    (high,) = findings([record(step, plan, more=1.2 if step == 2 else 1.0) for step in range(1, 8)])
    assert high.quantity == "device_peak_bytes" and high.text.endswith(": +20%")
    both = findings([record(step, plan, slower=0.5, more=0.5) for step in range(1, 8)])
    assert [found.text.rpartition(" ")[2] for found in both] == ["-50%", "-50%"]


def test_first_steps_of_each_attempt_and_other_plans_do_not_count(plan: SavedPlan) -> None:
    records = [record(step, plan, attempt=1 + (step > 4)) for step in range(1, 8)]
    assert [kept["step"] for kept in steady(records)] == [3, 4, 7]
    records = [record(step, plan, slower=3.0 if step in (1, 2) else 1.0) for step in range(1, 6)]
    assert findings(records) == []
    earlier = [record(step, plan, slower=9, more=9, plan_step_s=99.0) for step in range(1, 6)]
    assert findings([*earlier, *(record(step, plan) for step in range(6, 12))]) == []
    assert findings([]) == [] and steady([]) == []
    unplanned = [record(step, plan, plan_step_s=None, plan_device_peak_bytes=None) for step in range(1, 6)]
    assert findings(unplanned) == []


def test_too_few_steps_leave_the_times_open(plan: SavedPlan) -> None:
    found = compare(plan, [record(1, plan), record(2, plan)])
    assert all(row.measured is None and row.measured_text == "–" for row in found.parts)
    assert found.tiers[0].measured == plan.prediction.device_peak_bytes


def test_evaluations_and_checkpoints_are_taken_off(plan: SavedPlan) -> None:
    assert planned_part_of_step_s(record(1, plan)) == pytest.approx(plan.prediction.step_s)
    broken = record(1, plan, step_s="NaN", parts_s=None)
    assert steady([broken] * 5) == []


def test_a_saved_plan_is_walked_again(plan: SavedPlan, tmp_path: Path) -> None:
    save(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    other = json.loads((tmp_path / "plan.json").read_text())
    other["placement"]["layers"].pop()
    for text in ("[]", "{}", "no json", json.dumps(other)):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError):
            read_plan(tmp_path / "plan.json")


def test_the_end_of_a_run_prints_table_and_findings(plan: SavedPlan, tmp_path: Path, capsys: Any) -> None:
    folder = RunFolder(tmp_path)
    save(plan, folder.plan)
    lines = [json.dumps(record(step, plan, slower=1.5, attempt=3)) + "\n" for step in range(1, 6)]
    folder.metrics.write_text("".join(lines))
    _compare(folder, Console(width=200))
    out = capsys.readouterr().out
    (event,) = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert (event["event"], event["quantity"], event["attempt"]) == ("finding", "step_s", 3)
    assert event["measured"] == pytest.approx(1.5 * event["planned"])
    assert f"finding  {event['text']}" in out.splitlines()
    assert "+50%" in out and "measured" in out and "forward and loss" in out
    folder.plan.unlink()
    _compare(folder, Console(width=200))
    assert capsys.readouterr().out == ""


def test_the_report_has_the_measured_column(plan: SavedPlan, tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "run")
    assert "no plan.json" in collect(folder.root).missing
    assert 'href="#plan"' not in render(collect(folder.root))
    save(SavedPlan(plan.kind + HOSTILE, plan.problem, plan.placement, plan.prediction), folder.plan)
    records = [step_record(step, time_s=step * 2.0) | record(step, plan, slower=1.3) for step in range(1, 9)]
    folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in records))
    text = render(collect(folder.root))
    assert 'href="#plan"' in text and "Plan and measured" in text and HOSTILE not in text
    assert '<td class="n missed">+30%</td>' in text
    folder.plan.write_text("{")
    assert any(line.startswith("plan.json cannot be replayed") for line in collect(folder.root).missing)


def test_lanes_without_anything_to_tell_are_left_out(plan: SavedPlan) -> None:
    found = compare(plan, [record(step, plan) for step in range(1, 6)])
    assert [row.what for row in found.moved] == ["copy out", "copy in, from host"]
    assert [row.what for row in found.tiers] == ["device", "host"]
    empty = Comparison("keep", [], [], [], [], 0)
    assert empty.tables == []
    show_measured(empty, console=Console(quiet=True))
