"""`trace.json`: events as Perfetto reads them, rows in which nothing overlaps, plan and measured in one file."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sp_ranks import on_ranks, train_rank
from test_sft import spec, tokens

from farspan import Evaluate, Optim
from farspan.jobs.plan_file import write_plan_trace
from farspan.memory.config import Tiers
from farspan.memory.evaluate import evaluate
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.policies import fixed_policy
from farspan.memory.problem import PlanProblem
from farspan.trainer import trace
from farspan.trainer.run_folder import RunFolder, read_metrics
from farspan.trainer.sft import PartClock
from farspan.trainer.trace import Span, add_process
from farspan.trainer.world import Silent

assert tokens  # the fixture
PROBLEM = Path(__file__).parent / "plan_problems" / "llama-8b-32k-tiled.json"


def rows_of(path: Path, process: str) -> dict[str, list[dict[str, Any]]]:
    """Pieces of work by the name of their row, earliest first; every one lies in a named row of a named process."""
    events = json.loads(path.read_text())["traceEvents"]
    named = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    pid = next(number for name, number in named.items() if name.split(",")[0] == process)
    rows = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["name"] == "thread_name" and event["pid"] == pid
    }
    assert len(set(rows.values())) == len(rows)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows.values()}
    for event in events:
        if event["ph"] == "X" and event["pid"] == pid:
            found[rows[event["tid"]]].append(event)
    for work in found.values():
        work.sort(key=lambda event: event["ts"])
        for event, after in pairwise(work):
            assert event["ts"] + event["dur"] <= after["ts"] + 1e-6, (event, after)
        assert all(event["dur"] >= 0 for event in work)
    return found


SPANS = st.lists(
    st.tuples(st.sampled_from(["disk read", "compute"]), st.floats(0, 100), st.floats(0, 30)).map(
        lambda one: Span(one[0], 50 + one[1], 50 + one[1] + one[2], "x", 7)
    ),
    max_size=40,
)


@given(SPANS)
def test_rows_never_overlap_and_nothing_is_lost(spans: list[Span]) -> None:
    events = trace.process_events("measured", spans, begin_s=50.0, levels={})
    work = [event for event in events if event["ph"] == "X"]
    assert len(work) == len(spans)
    by_row: dict[int, list[tuple[float, float]]] = {}
    for event in work:
        by_row.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for row in by_row.values():
        for before, after in pairwise(sorted(row)):
            assert before[1] <= after[0] + 1e-6
    wanted = sorted((round((span.start_s - 50) * 1e6, 3), span.name) for span in spans)
    assert sorted((event["ts"], event["name"]) for event in work) == wanted
    for lane in ("disk read", "compute"):  # no more rows than ever run at once
        mine = [span for span in spans if span.lane == lane]
        most = max((sum(a is b or a.start_s <= b.start_s < a.end_s for a in mine) for b in mine), default=0)
        named = [e for e in events if e["name"] == "thread_name" and e["args"]["name"].startswith(lane)]
        assert len(named) <= max(most, 1 if mine else 0)


def test_the_latest_write_of_a_process_counts_and_the_other_stays(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("half a fi")
    add_process(path, "plan", [Span("compute", 0.0, 1.0, "forward 0")], levels={"device memory": [(0.0, 5), (1.0, 2)]})
    add_process(path, "measured", [Span("compute", 9.0, 9.5, "old")], begin_s=9.0)
    add_process(path, "measured", [Span("compute", 9.0, 9.25, "new")], begin_s=9.0)
    assert [event["name"] for event in rows_of(path, "plan")["compute"]] == ["forward 0"]
    (new,) = rows_of(path, "measured")["compute"]
    assert (new["name"], new["ts"], new["dur"]) == ("new", 0.0, 250_000.0)
    levels = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "C"]
    assert [(event["ts"], event["args"]["bytes"]) for event in levels] == [(0.0, 5), (1e6, 2)]


def test_its_size_is_bounded(tmp_path: Path) -> None:
    many = [Span("copy out", i * 1.0, i + 0.5, f"x of layer {i}", 1 << 30) for i in range(trace.MOST + 5)]
    add_process(tmp_path / "trace.json", "measured", many)
    assert (tmp_path / "trace.json").stat().st_size < 4e6
    rows = rows_of(tmp_path / "trace.json", "measured")
    assert len(rows["copy out"]) == trace.MOST
    assert "measured, 5 later pieces left out" in (tmp_path / "trace.json").read_text()


@pytest.mark.parametrize("policy", ["keep", "offload-inputs", "ssdtrain"])
def test_the_plan_in_the_trace_is_the_evaluation(policy: Any, tmp_path: Path) -> None:
    problem = PlanProblem.model_validate(json.loads(PROBLEM.read_text())["problem"])
    placement = fixed_policy(problem, policy)
    write_plan_trace(tmp_path / "trace.json", SimpleNamespace(problem=problem, placement=placement))  # type: ignore[arg-type]
    rows, prediction = rows_of(tmp_path / "trace.json", "plan"), evaluate(problem, placement)
    assert sum(event["dur"] for event in rows["compute"]) / 1e6 == pytest.approx(
        prediction.step_s - prediction.parts.stalled_s
    )
    for lane, moved in prediction.moved_bytes.items():
        work = rows.get(lane.replace("_", " "), [])
        assert sum(event["args"]["bytes"] for event in work) == moved


def test_a_run_adds_its_second_step(tokens: Path, tmp_path: Path) -> None:
    rows, layers = 256, (LayerPlan(x=Rows(host=256)), LayerPlan(x=Rows(disk=256), o=Rows(disk=256)))
    job = spec(
        tokens,
        tmp_path / "run",
        optim=Optim(lr=1e-2, steps=4),
        accumulation=2,
        placement=Placement(rows=rows, attention_rows=rows, layers=layers),
        tiers=Tiers(host_bytes=1 << 22, disk_dir=str(tmp_path), disk_bytes=1 << 22),
        evaluate=Evaluate(every=2, max_tokens=512),
    )
    folder = RunFolder(tmp_path / "run")
    add_process(folder.trace, "plan", [Span("compute", 0.0, 1.0, "forward 0")])
    on_ranks(train_rank, 1, job.model_dump_json())
    assert rows_of(folder.trace, "plan")["compute"]
    found = rows_of(folder.trace, "measured")
    record = read_metrics(folder.metrics)[1]
    names = [event["name"] for event in found["compute"]]
    assert names == [
        "data",
        "data",
        "forward",
        "backward",
        "data",
        "forward",
        "backward",
        "reduce",
        "optimizer",
        "evaluate",
    ]
    for name, seconds in record["parts_s"].items():
        assert sum(e["dur"] for e in found["compute"] if e["name"] == name) / 1e6 == pytest.approx(seconds, abs=1e-5)
    lanes = {name.rstrip(" 234") for name in found}
    # what is wanted while it is still on its way out is not read back from disk
    assert {"compute", "copy out", "copy in"} <= lanes <= {"compute", "copy out", "copy in", "disk write", "disk read"}
    for lane, moved in record["moved_bytes"].items():
        work = [e for name, row in found.items() if name.startswith(lane.replace("_", " ")) for e in row]
        assert sum(event["args"]["bytes"] for event in work) == moved
        assert all(0 <= event["ts"] <= record["step_s"] * 1e6 for event in work)


def test_nothing_is_noted_when_nobody_traces() -> None:
    clock = PartClock(Silent())
    with clock.part("forward"):
        pass
    assert clock.spans is None and list(clock.take()) == ["forward"]
