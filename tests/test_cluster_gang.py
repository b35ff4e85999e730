"""Gangs on a local Ray with stand-in entry points: success, death, hang, refusal. Each case is one real gang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from cluster_jobs import gang_spec
from gang_entries import die_once, divide_by, square, square_of_positive

from farspan.cluster.package import package_root
from farspan.cluster.session import Session, connect
from farspan.cluster.supervisor import supervise
from farspan.cluster.tokenise import map_tasks
from farspan.errors import ClusterNotReady, DataError, FarspanError, JobError, OutOfMemory, RunFailed
from farspan.trainer.run_folder import RunFolder

pytestmark = pytest.mark.ray

TESTS = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(package_root()), str(TESTS)])


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        with connect(None, num_cpus=4) as session:
            yield session


class Run:
    """One supervised run and everything it told."""

    def __init__(self, session: Session, run_dir: Path, entry: str, **cluster: Any) -> None:
        self.folder = RunFolder(run_dir)
        self.records: list[dict[str, Any]] = []
        self.events: list[Any] = []
        self.result: Any = None
        self.error: FarspanError | None = None
        try:
            self.result = supervise(
                gang_spec(run_dir, **cluster),
                session=session,
                entry=f"gang_entries:{entry}",
                on_record=self.records.append,
                on_event=self.events.append,
            )
        except FarspanError as error:
            self.error = error
        self.status = json.loads(self.folder.status.read_text())
        lines = self.folder.events.read_text().splitlines()
        assert [json.loads(line) for line in lines] == self.events
        pids = [pid for event in self.events for pid in event.get("pids", [])]
        assert not [pid for pid in pids if psutil.pid_exists(pid)], "a rank outlived its run"

    def text(self, event: str) -> str:
        return "\n".join(entry["text"] for entry in self.events if entry["event"] == event)

    @property
    def failure(self) -> Any:
        (found,) = [event for event in self.events if event["event"] == "failure"]
        return found


def test_success(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "succeed", cpus_per_actor=2)
    assert [record["step"] for record in run.records] == [1, 2, 3, 4, 5]
    assert (run.result.status, run.result.rank) == ("done", 0)
    world = run.result.seen["world"]
    assert (world.world_size, world.local_rank, world.master_addr) == (2, 0, "127.0.0.1")
    assert run.result.seen["env"]["OMP_NUM_THREADS"] == "2"
    assert [event["event"] for event in run.events] == ["placing", "starting", "running", "self-test", "finished"]
    assert run.text("self-test") == "tested itself"
    assert (run.status["status"], run.status["step"], run.status["error"]) == ("done", 5, None)
    for rank in (0, 1):
        log = (tmp_path / "logs" / "latest" / f"trainer-{rank}.log").read_text()
        assert f"printed by rank {rank}" in log
        assert f"logged by rank {rank}" in log
        assert f"native words of rank {rank}" in log


def test_a_killed_rank_is_named_and_the_gang_restarts_from_the_checkpoint(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "killed_once", max_failures=1)
    assert run.result is not None
    assert run.failure["rank"] == 1
    assert run.failure["phase"] == "backward"
    assert "last words of rank 1" in run.failure["log_tail"][-1]
    restarted = run.text("restarting")
    assert restarted.startswith("attempt 2 of 2: rank 1 died in backward after step 3: process ")
    assert "signal 9" in restarted
    assert restarted.endswith("resuming from step 2")
    assert "Connection closed" not in str(run.events), "rank 0's symptom was told"
    assert [record["attempt"] for record in run.records] == [1, 1, 1, 2, 2, 2]
    assert (tmp_path / "logs" / "latest").readlink() == Path("attempt_2")
    assert run.status["status"] == "done"


def test_failures_used_up(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "killed_always")
    assert type(run.error) is RunFailed
    text = str(run.error)
    assert len(text.splitlines()) == 4
    assert "attempt 1 of 1: rank 1 died in optimizer" in text
    assert str(tmp_path / "logs" / "attempt_1" / "trainer-1.log") in text
    assert "about to go" in text
    assert (run.status["status"], run.status["error"]) == ("failed", text)


def test_a_native_crash_is_told_as_one(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "crash")
    assert "rank 0 died in forward" in run.failure["text"]
    assert "crashed: Segmentation fault" in run.failure["text"]


def test_a_rank_that_hangs_is_named_with_its_stack(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "hang", heartbeat_s=2.0)
    assert run.failure["rank"] == 1, "rank 0 only waits for it"
    assert "hangs in forward" in run.failure["text"]
    assert "max(2 s, 3 x 0.1 s planned)" in run.failure["text"]
    assert any("gang_entries.py" in line and "in hang" in line for line in run.failure["log_tail"])


def test_a_long_phase_that_was_planned_is_left_alone(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "planned_long", heartbeat_s=2.0)
    assert run.error is None


def test_a_stopped_process_is_silent(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "stopped", heartbeat_s=2.0)
    assert run.failure["rank"] == 1
    assert "fell silent in backward" in run.failure["text"]


def test_our_own_errors_arrive_as_they_are_and_are_not_retried(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "bad_job", max_failures=3)
    assert type(run.error) is JobError
    assert run.error.exit_code == 2
    assert len(str(run.error).splitlines()) == 4
    assert "300 < 400" in str(run.error)
    assert run.text("restarting") == ""


@pytest.mark.parametrize(
    ("entry", "phase", "why"),
    [("no_memory", "backward", "can't allocate memory"), ("no_memory_in_python", "data", "MemoryError")],
)
def test_a_want_of_memory_is_not_tried_again(
    session: Session, tmp_path: Path, entry: str, phase: str, why: str
) -> None:
    run = Run(session, tmp_path, entry, max_failures=3)
    assert type(run.error) is OutOfMemory and run.error.exit_code == 3
    assert len(str(run.error).splitlines()) == 4
    assert f"failed in {phase}" in run.error.what and why in run.error.why
    assert run.text("restarting") == "" and run.status["status"] == "failed"


def test_the_same_defect_twice_ends_the_run(session: Session, tmp_path: Path) -> None:
    run = Run(session, tmp_path, "same_defect", max_failures=3)
    assert "twice in the same way" in str(run.error)
    assert "TypeError: unsupported operand" in str(run.error)
    assert len([event for event in run.events if event["event"] == "restarting"]) == 1


def test_more_than_a_local_ray_can_hold_is_refused_at_once(session: Session, tmp_path: Path) -> None:
    began = time.monotonic()
    run = Run(session, tmp_path, "succeed", world_size=5)
    assert time.monotonic() - began < 3
    assert isinstance(run.error, ClusterNotReady)
    assert "needs 5 x 1 CPU = 5 CPU; 1 node with 4 CPU (" in str(run.error)
    assert "free): room for 4 of 5 ranks" in str(run.error)


def test_a_wait_for_room_is_bounded_and_says_what_for(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farspan.cluster.placement.REPORT_S", 0.5)
    holder = ray.util.placement_group([{"CPU": 3}])
    assert holder.wait(10)
    try:
        run = Run(session, tmp_path, "succeed", wait_s=1.2)
    finally:
        ray.util.remove_placement_group(holder)
    assert "1 node with 4 CPU (1 free)" in run.text("waiting")
    assert isinstance(run.error, ClusterNotReady)
    assert "after 1 s" in str(run.error)


def test_map_tasks(session: Session, tmp_path: Path) -> None:
    assert map_tasks(square, list(range(20))) == [value * value for value in range(20)]
    assert map_tasks(square, []) == []
    with pytest.raises(DataError, match="negative") as caught:
        map_tasks(square_of_positive, [1, -2, 3])
    assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(RunFailed) as failed:
        map_tasks(divide_by, [1, 0])
    assert "task 2 of 2" in str(failed.value)
    assert "ZeroDivisionError" in str(failed.value)
    with pytest.raises(RunFailed, match="rounding task 1 of 1 failed"):
        map_tasks(divide_by, [0], what="rounding")
    with pytest.raises(ClusterNotReady, match="no node can run a rounding task") as none:
        map_tasks(square, [1], gpus_per_task=1.0, what="rounding")
    assert "1 CPU and 1 GPU" in str(none.value)
    mark = str(tmp_path / "mark")
    assert map_tasks(die_once, [mark]) == ["mark"], "a lost worker's task runs again"


def test_an_address_nobody_answers() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        for where in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"127.0.0.1:{mute.getsockname()[1]}"):
            began = time.monotonic()
            done = subprocess.run([sys.executable, "-c", CONNECT, where], env=_environment(), capture_output=True)
            assert done.returncode == 4, done.stderr.decode()
            assert len(done.stdout.decode().splitlines()) == 4
            assert time.monotonic() - began < 20


@pytest.mark.parametrize("address", ["nonsense", "http://host:8265", "host:port"])
def test_what_is_no_address_is_a_bad_job(address: str) -> None:
    from farspan.cluster.session import _resolve

    with pytest.raises(JobError):
        _resolve(address)


CONNECT = """
import sys
from farspan.cluster.session import connect
from farspan.errors import FarspanError
try:
    connect(sys.argv[1])
except FarspanError as error:
    print(error)
    sys.exit(error.exit_code)
"""

DRIVER = """
import sys
from pathlib import Path
from cluster_jobs import gang_spec
from farspan.cluster.session import connect
from farspan.cluster.supervisor import supervise
from farspan.errors import FarspanError
try:
    with connect(None, num_cpus=2) as session:
        supervise(gang_spec(Path(sys.argv[1])), session=session, entry="gang_entries:endless")
except FarspanError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_its_driver(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], env=_environment(), stdout=subprocess.PIPE
    ) as driver:
        marks = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
        deadline = time.monotonic() + 90
        while not all(mark.exists() and mark.read_text() for mark in marks):
            assert driver.poll() is None, "the driver ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = [psutil.Process(int(mark.read_text())) for mark in marks]
        driver.send_signal(number)
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive
        output = driver.communicate(timeout=30)[0].decode()
    status = json.loads((tmp_path / "status.json").read_text())
    if number == signal.SIGTERM:
        assert driver.returncode == 1
        assert output.startswith("error: interrupted after step")
        assert "SIGTERM" in output
        assert (status["status"], status["error"]) == ("failed", output.strip())
    else:
        assert status["status"] == "running"
        assert status["ended"] is None
