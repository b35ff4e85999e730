"""A measured profile against the analytic one, and peaks planned from it against whole training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import memory as bench
import pytest
import torch
from _memory_cells import run_calibration, run_training
from _memory_report import ALLOWED_MISS

from farspan.memory.allocations import cuda_events
from farspan.memory.analytic import analytic_profile
from farspan.memory.calibration import (
    Calibration,
    Measured,
    calibration_key,
    calibration_path,
    load_calibration,
    sources_of,
)
from farspan.memory.hardware import load_hardware
from farspan.memory.liveness import Size
from farspan.memory.moments import SETTINGS, Run, fit_end, fit_peak, matched
from farspan.memory.profile import Profile
from farspan.trainer.parallel.ulysses import LoneRank

ROWS = 3072
CPU = load_hardware("cpu")


class Here(bench.Bench):
    """Cells run in this process."""

    def cell(self, key: str, task: dict[str, Any], *, ranks: int = 1) -> dict[str, Any]:
        assert ranks == 1, key
        if key not in self.done["cells"]:
            run = run_calibration if task["what"] == "calibrate" else run_training
            self.done["cells"][key] = run(task)
        return self.done["cells"][key]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(tmp_path / "memory.json", toy=False)


@pytest.mark.parametrize("name", ["full fp32", "LoRA bf16, Qwen3", "full fp32, MLP tiles"])
def test_planned_peaks_are_those_of_whole_steps(here: Here, name: str) -> None:
    """Every policy, at more rows than were measured: within 3 %."""
    rows = bench.peaks(here, [ROWS], [name])
    assert {row["policy"] for row in rows} == {*bench.FIXED_POLICIES, "solve", "solve, host"}
    assert max(row["measured"] for row in rows) > 1.5 * min(row["measured"] for row in rows)
    assert {row["policy"]: round(row["miss"], 4) for row in rows if abs(row["miss"]) > ALLOWED_MISS} == {}


@pytest.mark.parametrize("name", ["full fp32", "LoRA bf16, Qwen3", "full fp32, sp 2", "full fp32, MLP tiles"])
def test_measured_bytes_are_the_counted_ones(here: Here, name: str) -> None:
    """Two accounts of the same layers: one counted from operators by hand, one read off the allocator."""
    config = bench.CONFIGS[name]
    measured = here.calibration(name).profile
    counted = analytic_profile(bench.shape_of(config), bench.training_of(config), CPU)
    (ours,), (theirs,) = measured.kinds, counted.kinds
    rows = 1 << 16
    assert measured.sp == counted.sp == config["sp"]
    assert ours.x_bytes_per_row == theirs.x_bytes_per_row
    assert ours.attention is not None and theirs.attention is not None
    assert ours.attention.o_bytes_per_row == theirs.attention.o_bytes_per_row
    assert {c.name: c.bytes_per_row for c in ours.linear} == {c.name: c.bytes_per_row for c in theirs.linear}
    assert ours.keep_bytes.at(rows) == pytest.approx(theirs.keep_bytes.at(rows), rel=2e-3)
    for peak in ("forward_peak", "rebuild_peak", "keep_backward_peak"):
        found, expected = getattr(ours, peak).bytes_at(rows), getattr(theirs, peak).bytes_at(rows)
        assert found == pytest.approx(expected, rel=2e-2), peak
    by_storage = [sorted(round(t.bytes_per_row) for t in kind.saved if t.bytes_per_row > 9) for kind in (ours, theirs)]
    assert by_storage[0] == by_storage[1], "tensor by tensor"
    assert ours.on_host is not None and theirs.on_host is not None
    assert abs(ours.on_host.keep_bytes.at(rows)) < 1e-3 * ours.keep_bytes.at(rows)
    for size in ("keep_host_bytes", "keep_fetched_bytes", "rebuild_host_bytes", "rebuild_fetched_bytes"):
        found, expected = getattr(ours.on_host, size).at(rows), getattr(theirs.on_host, size).at(rows)
        assert found == pytest.approx(expected, rel=3e-3), size
    for peak in ("keep_forward_peak", "rebuild_peak", "keep_backward_peak"):
        found, expected = getattr(ours.on_host, peak).bytes_at(rows), getattr(theirs.on_host, peak).bytes_at(rows)
        assert found == pytest.approx(expected, rel=2e-2), f"{peak} on host"
    assert measured.head.peak.bytes_at(rows) == pytest.approx(counted.head.peak.bytes_at(rows), rel=2e-2)
    assert all(seconds > 0 for seconds in (ours.forward_s.at(rows), ours.backward_s.at(rows)))
    assert {name for name, source in measured.sources.items() if source.how == "measured"} == set(measured.sources)


def run(rows: int, tile: int) -> Run:
    """Two tensors that grow with the rows, a constant one, and tiles of work that end with two of a tile alive."""
    events = [8 * rows, 1000, 4 * rows]
    for at in range(0, rows, tile):
        events += [12 * tile, *[-5 * tile] * (at > 0), -7 * tile]
    return Run(rows, tile, (*events, -5 * tile, -1000, -4 * rows))


def test_moments_become_lines_in_rows_and_tile() -> None:
    runs = [run(rows, tile) for rows, tile in SETTINGS]
    assert {rows // tile for rows, tile in SETTINGS} == {2, 3}
    for rows, tile in ((10_000, 512), (100_000, 4096)):
        peak = fit_peak("work", runs, tile_rows=tile)
        assert peak.bytes_at(rows) == pytest.approx(12 * rows + 1000 + 17 * tile, abs=1)
        less = fit_peak("work", runs, Size(1000.0, 12.0), tile_rows=tile)
        assert less.bytes_at(rows) == pytest.approx(17 * tile, abs=1)
        assert fit_end(runs, tile_rows=tile).at(rows) == pytest.approx(8 * rows, abs=1)


def test_another_moment_may_lead_at_other_lengths() -> None:
    """A gradient that does not grow leads at a thousand rows; what grows leads at a million."""
    runs = [Run(rows, tile, (10**7, -(10**7), 100 * rows)) for rows, tile in SETTINGS]
    peak = fit_peak("work", runs, tile_rows=0)
    assert peak.bytes_at(1000) == 10**7
    assert peak.bytes_at(10**6) == 10**8


def test_runs_that_differ_are_bounded_by_one_line() -> None:
    runs = [Run(rows, tile, (7 * rows,) * (1 + index)) for index, (rows, tile) in enumerate(SETTINGS)]
    assert matched(runs) == (1, 1)
    peak = fit_peak("experts", runs, tile_rows=0)
    assert all(peak.bytes_at(run.rows) >= max(run.totals) - 1 for run in runs)


def test_a_lone_rank_exchanges_buffers_of_the_right_size() -> None:
    """Shapes are those of a real group; the rank's own rows come back."""
    q, k, v = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    lone = LoneRank(2)
    Q, K, V = lone.to_heads(q, k, v)
    assert (Q.shape, K.shape, V.shape) == ((1, 2, 12, 8), (1, 1, 12, 8), (1, 1, 12, 8))
    assert torch.equal(Q[:, :, :6], q[:, :2])
    out = lone.to_rows(Q, 4, 2)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_calibrations_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    config = bench.CONFIGS["full fp32"]
    shape, training = bench.shape_of(config), bench.training_of(config)
    key = calibration_key(shape, training, "cpu: some", "llama")
    measured = Measured(profile=analytic_profile(shape, training, CPU), links=bench_links())
    calibration = Calibration(key=key, profile=measured.profile, links=measured.links)
    path = calibration_path(tmp_path, key)
    assert load_calibration(tmp_path, key) is None
    path.parent.mkdir(parents=True)
    path.write_text(calibration.model_dump_json())
    assert load_calibration(tmp_path, key) == calibration
    deeper = shape.model_copy(update={"layers": 80})
    assert load_calibration(tmp_path, calibration_key(deeper, training, "cpu: some", "llama")) == calibration
    sharded = training.model_copy(update={"dp": 4})
    assert calibration_key(shape, sharded, "cpu: some", "llama") != key  # then gradients are handed on
    for other in (
        calibration_key(shape, training, "cpu: other", "llama"),
        calibration_key(shape, training, "cpu: some", "qwen2"),
        calibration_key(shape.model_copy(update={"ffn": 345}), training, "cpu: some", "llama"),
        calibration_key(shape, training.model_copy(update={"precision": "bf16"}), "cpu: some", "llama"),
    ):
        assert load_calibration(tmp_path, other) is None
    path.write_text("{")
    assert load_calibration(tmp_path, key) is None


def bench_links() -> Any:
    return {"links": CPU.links().model_dump(), "source": {"how": "measured", "what": "a test"}}


def test_a_plan_says_what_is_measured(here: Here) -> None:
    measured = here.calibration("full fp32")
    sources = sources_of(Calibration(key={}, profile=measured.profile, links=measured.links), CPU)
    assert {name for name, source in sources.items() if source.how == "measured"} == {
        "bytes", "matmul", "attention", "elementwise", "links",
    }  # fmt: skip
    assert sources["optimizer"].how == "assumed"
    assert Profile.model_validate_json(measured.profile.model_dump_json()) == measured.profile


def test_events_of_the_cuda_allocator_are_told_by_what_was_asked_for() -> None:
    """As `torch.cuda.memory._snapshot` lists them."""
    history = [
        {"action": "segment_alloc", "addr": 0, "size": 2 << 20, "stream": 0, "time_us": 1},
        {"action": "alloc", "addr": 0, "size": 700, "stream": 0, "time_us": 1},
        {"action": "alloc", "addr": 1024, "size": 7, "stream": 0, "time_us": 2},
        {"action": "free_requested", "addr": 0, "size": 700, "stream": 0, "time_us": 3},
        {"action": "free_completed", "addr": 0, "size": 700, "stream": 0, "time_us": 3},
    ]
    assert cuda_events(history) == [(1000, 700), (2000, 7), (3000, -700)]
