"""`metrics.jsonl` is whole after any crash, trackers mirror it, and none of them can stop training.

Oracles: Python's own JSON parser in strict mode, and TensorBoard's own reader for what TensorBoard would show."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_sample import step_record

from farspan.errors import JobError, RunFailed
from farspan.trainer.config import Track
from farspan.trainer.metrics import MetricsWriter, truncate_metrics
from farspan.trainer.run_folder import RunFolder, read_metrics

NO_TRACKER = Track(tensorboard=False)


def open_writer(root: Path, track: Track = NO_TRACKER, restored_step: int | None = None) -> MetricsWriter:
    return MetricsWriter(RunFolder(root), track, run_name="a run", config={"lr": 1e-3}, restored_step=restored_step)


def write_steps(root: Path, first: int, last: int, *, restored_step: int | None, seed: int = 0) -> None:
    writer = open_writer(root, restored_step=restored_step)
    for step in range(first, last + 1):
        writer.write(step_record(step, time_s=float(step), seed=seed))
    writer.close()


def strict(text: str) -> Any:
    """RFC 8259: NaN and Infinity are not JSON, though Python reads them by default."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_each_step_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    for step in (1, 2, 3):
        given_record = step_record(step, time_s=float(step))
        returned = writer.write(given_record)
        assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
        assert returned == given_record == read_metrics(tmp_path / "metrics.jsonl")[-1]
    writer.close()


@settings(max_examples=60, deadline=None)
@given(value=st.floats(allow_nan=True, allow_infinity=True), nested=st.floats(allow_nan=True, allow_infinity=True))
def test_any_float_is_valid_json_and_reads_back(
    tmp_path_factory: pytest.TempPathFactory, value: float, nested: float
) -> None:
    root = tmp_path_factory.mktemp("run")
    writer = open_writer(root)
    writer.write(step_record(1, time_s=0.0) | {"loss": value, "stall_s": {"disk": nested}})
    writer.close()
    record = strict((root / "metrics.jsonl").read_text())
    for wrote, read in ((value, record["loss"]), (nested, record["stall_s"]["disk"])):
        assert float(read) == wrote or (math.isnan(wrote) and math.isnan(float(read)))


def test_array_scalars_are_taken(tmp_path: Path) -> None:
    """numpy's scalars and one-element arrays answer `item()` as torch's tensors do."""
    writer = open_writer(tmp_path)
    writer.write(step_record(1, time_s=0.0) | {"loss": np.array([2.5], np.float32), "tokens": np.int64(7)})
    writer.close()
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (record["loss"], record["tokens"]) == (2.5, 7)


@settings(max_examples=30, deadline=None)
@given(last=st.integers(1, 12), restored=st.none() | st.integers(0, 14), cut=st.integers(0, 400))
def test_restore_leaves_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, last: int, restored: int | None, cut: int
) -> None:
    """Whatever byte the crash cut the file at: records up to the restored step stay, all others are written anew."""
    root = tmp_path_factory.mktemp("run")
    write_steps(root, 1, last, restored_step=None)
    path = root / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - min(cut, len(whole) // 2)])
    survived = [record["step"] for record in read_metrics(path)]
    kept = [step for step in survived if step <= (restored or 0)]
    first = max(kept, default=0) + 1
    write_steps(root, first, first + 3, restored_step=restored, seed=1)
    records = [strict(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, first + 4))
    assert records[: len(kept)] == [step_record(step, time_s=float(step)) for step in kept]


def test_truncation_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, 1, 5, restored_step=None)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunFailed, match="metrics cannot be written"):
        open_writer(tmp_path, restored_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_full_disk_is_a_four_line_error(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    assert writer._file is not None
    writer._file.close()
    writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(RunFailed) as caught:
        writer.write(step_record(1, time_s=0.0))
    writer.close()
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()] == ["error", "at", "why", "try"]
    assert "No space left on device" in str(caught.value)


def test_tensorboard_shows_what_was_written(tmp_path: Path) -> None:
    """Read with TensorBoard's own loader, across a restart that goes back to step 3."""
    track = Track(tensorboard=True)
    for restored, seed in ((None, 0), (3, 1)):
        writer = open_writer(tmp_path, track, restored_step=restored)
        first = (restored or 0) + 1
        for step in range(first, first + 5):
            record = step_record(step, time_s=1e9 + step, seed=seed)
            writer.write(record | {"grad_norm": math.nan if step == 2 else record["grad_norm"]})
        writer.close()
    # TensorBoard's reader warns about its own use of a deprecated module, so it gets a process of its own.
    program = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], purge_orphaned_data=True).Reload()
tags = {tag: [[e.step, e.value, e.wall_time] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
print(json.dumps({"scalars": tags, "texts": events.Tags()["tensors"]}))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tensorboard")], capture_output=True, text=True, check=True
    )
    shown = json.loads(answer.stdout)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    losses = [(step, pytest.approx(value)) for step, value, _ in shown["scalars"]["loss"]]
    assert losses == [(record["step"], record["loss"]) for record in records]
    assert [step for step, *_ in shown["scalars"]["grad_norm"]] == [1, 3, 4, 5, 6, 7, 8]
    assert "parts_s/forward" in shown["scalars"] and "config" in shown["texts"]
    assert "step" not in shown["scalars"]


def test_tensorboard_needs_neither_tensorflow_nor_torch(tmp_path: Path) -> None:
    """A stand-in TensorFlow that fails on import proves that nothing tries; warnings are errors there as well."""
    (tmp_path / "fake" / "tensorflow").mkdir(parents=True)
    (tmp_path / "fake" / "tensorflow" / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    program = f"""
import sys
sys.path[:0] = {[str(tmp_path / "fake"), *sys.path]!r}
from pathlib import Path
from test_metrics import open_writer, step_record, Track
writer = open_writer(Path({str(tmp_path / "run")!r}), Track(tensorboard=True))
writer.write(step_record(1, time_s=0.0))
writer.close()
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class FakeWandb(types.ModuleType):
    """What W&B is used for: init, define_metric, log, finish."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.broken = False

    def init(self, **arguments: Any) -> FakeWandb:
        if self.broken:
            raise ConnectionError("api key not configured")
        self.inits.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert name in ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionError("socket\nclosed")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_finite_scalars_and_a_restart_continues_its_run(tmp_path: Path, wandb: FakeWandb) -> None:
    track = Track(tensorboard=False, wandb="a-project")
    for restored in (None, 1):
        writer = open_writer(tmp_path, track, restored_step=restored)
        writer.write(step_record((restored or 0) + 1, time_s=5.0) | {"loss": math.inf})
        writer.close()
    first, second = wandb.inits
    assert first["project"] == "a-project" and first["name"] == "a run" and first["config"] == {"lr": 1e-3}
    assert first["id"] == second["id"]
    assert [values["step"] for values in wandb.logged] == [1, 2]
    assert "loss" not in wandb.logged[0] and wandb.logged[0]["parts_s/backward"] > 0
    assert wandb.finished == 2


def test_tracker_that_fails_later_is_dropped_with_one_message(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    writer = open_writer(tmp_path, Track(tensorboard=False, wandb="p"))
    writer.write(step_record(1, time_s=1.0))
    wandb.broken = True
    with caplog.at_level(logging.INFO):
        for step in (2, 3, 4):
            writer.write(step_record(step, time_s=float(step)))
        writer.close()
    assert [record.message for record in caplog.records] == [
        "W&B is off from here on (ConnectionError: socket closed); metrics.jsonl goes on"
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_tracker_that_does_not_start_stops_a_new_run_but_not_a_restart(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.broken = True
    track = Track(tensorboard=False, wandb="p")
    with pytest.raises(JobError, match=r"track\.wandb did not start") as caught:
        open_writer(tmp_path / "new", track)
    assert "api key" in caught.value.why and caught.value.exit_code == 2
    writer = open_writer(tmp_path / "restarted", track, restored_step=5)
    writer.close()
    assert "track.wandb is off" in caplog.text


@pytest.mark.parametrize(("module", "field"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_missing_package_names_the_extra_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, field: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(JobError) as caught:
        open_writer(tmp_path, Track(tensorboard=True, **{field: "x"}), restored_step=3)
    assert f"farspan[{module}]" in caught.value.try_
    assert not (tmp_path / "metrics.jsonl").exists()


def test_mlflow_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    fake = types.ModuleType("mlflow")
    info = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    fake.set_experiment = lambda name: calls.append(("experiment", name))  # type: ignore[attr-defined]
    fake.start_run = lambda **given: calls.append(("start", given)) or info  # type: ignore[attr-defined]
    fake.log_dict = lambda config, name: calls.append(("config", config))  # type: ignore[attr-defined]
    fake.log_metrics = lambda values, step, synchronous: calls.append(("log", step, synchronous))  # type: ignore[attr-defined]
    fake.flush_async_logging = lambda: calls.append(("flush",))  # type: ignore[attr-defined]
    fake.end_run = lambda: calls.append(("end",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for restored in (None, 1):
        writer = open_writer(tmp_path, Track(tensorboard=False, mlflow="exp"), restored_step=restored)
        writer.write(step_record((restored or 0) + 1, time_s=1.0))
        writer.close()
    end = [("flush",), ("end",)]
    assert calls == [
        ("experiment", "exp"),
        ("start", {"run_name": "a run"}),
        ("config", {"lr": 1e-3}),
        ("log", 1, False),
        *end,
        ("experiment", "exp"),
        ("start", {"run_id": "r1"}),
        ("log", 2, False),
        *end,
    ]


def test_truncating_nothing_touches_nothing(tmp_path: Path) -> None:
    assert truncate_metrics(tmp_path / "metrics.jsonl", 5) == 0
    write_steps(tmp_path, 1, 3, restored_step=None)
    before = (tmp_path / "metrics.jsonl").stat()
    assert truncate_metrics(tmp_path / "metrics.jsonl", 3) == 3
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
