"""One rank of a gang inside its Ray actor: run the SPMD core on one thread, answer "how are you" on another.

The two threads are two concurrency groups of the actor, so that a rank which computes, or hangs, still answers; a
process that is gone raises in the caller, and one that is stopped answers nothing. Phase and step are also written
to a small file beside the log at every change (one `pwrite`, microseconds): when a process is killed between two
polls, the supervisor reads there what it was doing. Standard output and error are redirected as file descriptors, so
that what native code prints before it crashes lands in the rank's log as well.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from farspan.cluster.metrics import RankMetrics
from farspan.errors import FarspanError
from farspan.trainer.config import TrainSpec
from farspan.trainer.world import World

LAST_PHASE_BYTES = 256
START_PLANNED_S = 60.0
"""Importing torch, transformers and DeepSpeed on a busy machine."""
WAITING_S = 7 * 24 * 3600.0
"""A rank that is called from outside waits as long as it takes."""


@dataclass(frozen=True)
class Identity:
    """Where a rank lives, told once when its process is up."""

    pid: int
    started: float
    """Creation time of the process as its node tells it: with the pid it names one process for good."""
    node_id: str
    node_ip: str
    free_port: int
    gpu_ids: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """The answer to a heartbeat."""

    phase: str
    since_s: float
    """Seconds this phase lasts so far, on the rank's own clock."""
    planned_s: float | None
    phases_entered: int
    """Phases this rank went through: of two ranks that wait, the one behind is the one waited for."""
    step: int
    """Last finished step this rank knows of; 0 before the first."""
    rss_bytes: int
    records: tuple[dict[str, Any], ...] = ()
    """Step records from the asked index on (rank 0), and between them events: `{"event", "text"}`."""

    def without_records(self) -> Status:
        return replace(self, records=())


@dataclass(frozen=True)
class Raised:
    """The core ended with an exception; what `train` returns then, since any exception may fail to unpickle."""

    phase: str
    step: int
    summary: str
    """`RuntimeError: message`, one line."""
    error: FarspanError | None
    """The exception itself when it is one of ours."""


class Reporter:
    """The `Progress` of a rank: remembers phase and records, for the control thread to hand out."""

    def __init__(self, last_phase: Path, metrics: RankMetrics) -> None:
        self._lock = threading.Lock()
        self._metrics = metrics
        self._file = os.open(last_phase, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._process = psutil.Process()
        self._phase = "starting"
        self._planned_s: float | None = START_PLANNED_S
        self._entered_s = time.monotonic()
        self._phases_entered = 0
        self._step = 0
        self._records: list[dict[str, Any]] = []
        self._first_index = 0
        self._note()

    def phase(self, name: str, *, planned_s: float | None = None) -> None:
        now = time.monotonic()
        with self._lock:
            left, lasted_s = self._phase, now - self._entered_s
            self._phase, self._planned_s, self._entered_s = name, planned_s, now
            self._phases_entered += 1
        self._metrics.phase_left(left, lasted_s)
        self._note()

    def record(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._records.append(record)
            self._step = int(record.get("step", self._step))
        self._metrics.step_finished(record)
        self._note()

    def event(self, event: str, text: str) -> None:
        with self._lock:
            self._records.append({"event": event, "text": text})

    def status(self, records_from: int) -> Status:
        """What this rank does now; records before index `records_from` have arrived and are forgotten."""
        rss_bytes = int(self._process.memory_info().rss)
        self._metrics.resident(rss_bytes)
        with self._lock:
            del self._records[: max(0, records_from - self._first_index)]
            self._first_index = max(records_from, self._first_index)
            return Status(
                phase=self._phase,
                since_s=time.monotonic() - self._entered_s,
                planned_s=self._planned_s,
                phases_entered=self._phases_entered,
                step=self._step,
                rss_bytes=rss_bytes,
                records=tuple(self._records),
            )

    def _note(self) -> None:
        text = json.dumps({"phase": self._phase, "step": self._step})
        with suppress(OSError):  # a full disk; the polled status then has to do
            os.pwrite(self._file, text.encode().ljust(LAST_PHASE_BYTES)[:LAST_PHASE_BYTES], 0)


class TrainerActor:
    """One rank. Built by `farspan.cluster.gang`; `train` runs once in its life.

    Args:
        rank: of this actor in the gang.
        log: where standard output and error go from now on; on storage the driver can read.
        run: name of the run, a tag of its metrics.
    """

    def __init__(self, rank: int, log: str, run: str) -> None:
        redirect_output(Path(log))
        self._training_thread = 0
        self._kept: Any = None
        self._reporter = Reporter(last_phase_path(Path(log)), RankMetrics(run=run, rank=rank))

    @ray.method(concurrency_group="control")
    def identity(self) -> Identity:
        context = ray.get_runtime_context()
        return Identity(
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            node_id=context.get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            free_port=find_free_port(),
            gpu_ids=tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])),
        )

    @ray.method(concurrency_group="train")
    def train(self, spec: TrainSpec, world: World, entry: str, visible_gpus: tuple[str, ...]) -> Any:
        """Run the entry point to its end; its result, or `Raised`."""
        _see(visible_gpus)
        result = self._watched(lambda: load_entry(entry)(spec, world, self._reporter))
        if not isinstance(result, Raised):
            self._reporter.phase("finished")
        return result

    @ray.method(concurrency_group="train")
    def open(self, spec: Any, world: World, entry: str, visible_gpus: tuple[str, ...]) -> Raised | None:
        """Make what the entry point makes, and keep it for `call`."""
        _see(visible_gpus)
        made = self._watched(lambda: load_entry(entry)(spec, world, self._reporter))
        if isinstance(made, Raised):
            return made
        self._kept = made
        self._reporter.phase("waiting for the driver", planned_s=WAITING_S)
        return None

    @ray.method(concurrency_group="train")
    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of what is kept; its result, or `Raised`."""
        result = self._watched(lambda: getattr(self._kept, method)(*arguments, **options))
        if not isinstance(result, Raised):
            self._reporter.phase("waiting for the driver", planned_s=WAITING_S)
        return result

    def _watched(self, run: Callable[[], Any]) -> Any:
        """On this thread; what it raises is told and returned."""
        self._training_thread = threading.get_ident()
        try:
            return run()
        except Exception as error:
            with suppress(OSError):  # the log may lie on the disk whose being full is the error
                traceback.print_exc()
                sys.stderr.flush()
            status = self._reporter.status(0)
            summary = " ".join(f"{type(error).__name__}: {error}".split())
            own = error if isinstance(error, FarspanError) else None
            return Raised(status.phase, status.step, summary, own)

    @ray.method(concurrency_group="control")
    def status(self, records_from: int) -> Status:
        return self._reporter.status(records_from)

    @ray.method(concurrency_group="control")
    def write_stack(self) -> None:
        """Write where the training thread stands into the log of this rank."""
        frame = sys._current_frames().get(self._training_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "  (not training)\n"
        sys.stderr.write(f"the training thread stands at\n{stack}")
        sys.stderr.flush()


def _see(visible_gpus: tuple[str, ...]) -> None:
    """All GPUs of the gang's ranks on this node, so that NCCL can copy between them directly."""
    if visible_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus)


def load_entry(entry: str) -> Callable[[TrainSpec, World, Any], Any]:
    """`package.module:function` -> the function."""
    module, _, name = entry.partition(":")
    function: Callable[[TrainSpec, World, Any], Any] = getattr(importlib.import_module(module), name)
    return function


def redirect_output(log: Path) -> None:
    """Send file descriptors 1 and 2, Python's streams, its logging and its crash reports to the end of `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    faulthandler.enable(sys.stderr, all_threads=False)


def last_phase_path(log: Path) -> Path:
    """Beside `trainer-1.log`: `trainer-1.phase`."""
    return log.with_suffix(".phase")


def read_last_phase(log: Path) -> tuple[str, int] | None:
    """(phase, last finished step) a rank wrote before it went; None when it wrote nothing we can read."""
    try:
        noted = json.loads(last_phase_path(log).read_text(encoding="utf-8"))
        return str(noted["phase"]), int(noted["step"])
    except (OSError, ValueError, KeyError):
        return None


def find_free_port() -> int:
    """A TCP port nobody uses now; it may be taken before it is used, and then the gang restarts with another."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
