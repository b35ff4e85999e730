"""Run a gang to its end: place it, start it, watch it, restart it from the last complete checkpoint, say why.

The whole policy is in `Supervisor.run`; how a rank's failure is recognised is in `gang`, which failure is the cause in
`failure`. A failure always ends the whole gang: its ranks are in one collective. What a restart cannot cure is not
retried: an error of ours, a want of memory, and an ordinary exception that comes back at the same step with the same
words.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from ray.exceptions import RayError

from farspan.cluster.config import GangSpec
from farspan.cluster.failure import Kind, RankFailure, log_tail, out_of_memory, root_cause
from farspan.cluster.gang import DEFAULT_ENTRY, Gang, StartFailed
from farspan.cluster.journal import Journal
from farspan.cluster.placement import place
from farspan.cluster.session import Session
from farspan.errors import FarspanError, RunFailed
from farspan.trainer.run_folder import RunFolder

POLL_S = 0.5
SETTLE_S = 3.0
"""After the first failure, how long the other ranks are listened to before a cause is named."""


class State(Enum):
    """Where a run stands. Each change is an event of that name."""

    PLACING = "placing"
    """Waiting for the resources of the gang."""
    STARTING = "starting"
    """Actors are being created; torch is being imported."""
    RUNNING = "running"
    """All ranks are in the SPMD core."""
    RESTARTING = "restarting"
    """A rank failed; the gang is killed and will be placed again."""
    FINISHED = "finished"
    """Every rank returned. Terminal."""
    FAILED = "failed"
    """Given up, refused or interrupted. Terminal."""

    @property
    def is_terminal(self) -> bool:
        return self in (State.FINISHED, State.FAILED)


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived at the driver."""


def supervise(
    gang_spec: GangSpec,
    *,
    session: Session,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
    on_out_of_memory: Callable[[RankFailure], FarspanError] = out_of_memory,
    entry: str = DEFAULT_ENTRY,
) -> Any:
    """Train with a gang of actors to the end, through failures.

    Args:
        gang_spec: what to place and what to train.
        session: the connected Ray.
        on_record: called with each step record of rank 0; steps done again after a restart come again.
        on_event: called with each event as it is appended to `events.jsonl`: `time`, `event`, `text`, `attempt`, and
            for a failure `rank`, `phase`, `log` and `log_tail`.
        on_out_of_memory: makes the error that ends the run when a rank ran out of memory, the gang being gone by then.
        entry: `module:function` each rank calls with (spec, world, progress).

    Returns:
        What the entry point returned on rank 0: a `farspan.trainer.world.TrainResult`.

    Raises:
        ClusterNotReady: no room for the gang.
        OutOfMemory: a rank ran out of memory; not tried again, since it would again.
        RunFailed: `max_failures` used up, or interrupted. The run folder can be resumed.
        FarspanError: raised by a rank; arrives as it is.
    """
    return Supervisor(gang_spec, session, entry, on_record, on_event, on_out_of_memory).run()


class Supervisor:
    """The state machine of one run; see `supervise`."""

    def __init__(
        self,
        gang_spec: GangSpec,
        session: Session,
        entry: str,
        on_record: Callable[[dict[str, Any]], None],
        on_event: Callable[[Mapping[str, Any]], None],
        on_out_of_memory: Callable[[RankFailure], FarspanError],
    ) -> None:
        self.on_out_of_memory = on_out_of_memory
        self.spec, self.session, self.entry, self.on_record = gang_spec, session, entry, on_record
        self.folder = RunFolder(Path(gang_spec.train.run_dir))
        self.journal = Journal(self.folder, on_event)
        self.signals = Signals()
        self.state = State.PLACING
        self.attempts = gang_spec.cluster.max_failures + 1
        self.first_log = next_attempt(self.folder)

    def run(self) -> Any:
        """Attempt after attempt, until one finishes or the run cannot go on."""
        last: RankFailure | None = None
        self.journal.attempt = self.first_log
        self.journal.status("running")
        try:
            with self.signals:
                for number in range(1, self.attempts + 1):
                    self.journal.attempt = self.first_log + number - 1
                    outcome = self._attempt(number, last)
                    if not isinstance(outcome, RankFailure):
                        self._enter(State.FINISHED, f"finished after step {self.journal.step}")
                        self.journal.status("done")
                        return outcome
                    if outcome.of_memory:
                        raise self.on_out_of_memory(outcome)
                    if outcome.error is not None and outcome.deterministic:
                        raise outcome.error
                    if number == self.attempts or outcome.same_as(last):
                        raise self._given_up(outcome, number, repeated=outcome.same_as(last))
                    last = outcome
        except (Interrupted, KeyboardInterrupt) as interruption:
            error = self._interrupted(interruption)
            self._fail(error)
            raise error from None
        except FarspanError as error:
            self._fail(error)
            raise
        except RayError as error:
            lost = RunFailed(
                "the Ray cluster stopped answering",
                at=f"{self.session.address}, attempt {self.journal.attempt}, after step {self.journal.step}",
                why=" ".join(f"{type(error).__name__}: {error}".split())[:400],
                try_=f"`farspan run JOB --resume` when the cluster is back ({self._resuming()})",
            )
            self._fail(lost)
            raise lost from error
        except BaseException as error:
            self._fail(RunFailed(f"{type(error).__name__}: {error}", at="supervisor", why="a defect", try_="report it"))
            raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attempt(self, number: int, last: RankFailure | None) -> Any:
        """One gang from placement to its end: the result of rank 0, or the failure to name."""
        attempt = self.journal.attempt
        spec = self.spec.model_copy(update={"train": self.spec.train.model_copy(update={"attempt": attempt})})
        resuming = self._resuming()
        if last is None:
            self._enter(State.PLACING, f"placing {spec.world_size} ranks; {resuming}")
        else:
            self._enter(State.RESTARTING, f"attempt {number} of {self.attempts}: {last.sentence()}; {resuming}")
        group = place(
            spec,
            can_grow=not self.session.local,
            on_wait=self._waiting,
            check=self.signals.check,
        )
        gang: Gang | None = None
        try:
            self._enter(State.STARTING, f"starting {spec.world_size} ranks; logs in {self._link_logs(attempt)}")
            gang = Gang.create(spec, group)
            self._start(gang, group)
            self._enter(State.RUNNING, f"training on {spec.world_size} ranks", pids=gang.pids)
            return self._watch(gang)
        except StartFailed as failed:
            return self._report(failed.failures)
        finally:
            self._end()
            if gang is not None:
                gang.kill()
            remove_group(group)

    def _start(self, gang: Gang, group: Any) -> None:
        """Have the ranks begin; `group` is the placement group of this attempt."""
        del group
        gang.start(self.entry, check=self.signals.check)

    def _end(self) -> None:
        """Release what an attempt holds besides its gang."""

    def _waiting(self, text: str) -> None:
        self.journal.event("waiting", text)
        self.journal.status("running")

    def _watch(self, gang: Gang) -> Any:
        """Poll until every rank returned (rank 0's result) or one failed (the cause)."""
        heartbeat_s = self.spec.cluster.heartbeat_s
        while True:
            failures = gang.poll(POLL_S)
            self._take(gang)
            self.signals.check()
            if failures:
                return self._report(self._settle(gang, failures))
            late = gang.late(heartbeat_s)
            if late:
                gang.write_stack()
                return self._report(late)
            if not gang.running:
                gang.poll(POLL_S)  # the records of the last step
                self._take(gang)
                return gang.members[0].result

    def _settle(self, gang: Gang, failures: list[RankFailure]) -> list[RankFailure]:
        """Listen a little longer: the rank that is the cause may be noticed after the ranks it took along."""
        deadline = time.monotonic() + SETTLE_S
        failures = failures + gang.poll(POLL_S)  # and the records of the last steps
        while gang.running and time.monotonic() < deadline and root_cause(failures).kind > Kind.GONE:
            failures += gang.poll(POLL_S)
        self._take(gang)
        if root_cause(failures).kind is Kind.SYMPTOM:
            failures += gang.late(heartbeat_s=SETTLE_S / 2)
        return failures

    def _take(self, gang: Gang) -> None:
        for record in gang.take_records():
            if "event" in record:
                self.journal.event(record["event"], record["text"])
            else:
                self.on_record(record)
        self.journal.still_running(gang.step)

    def _report(self, failures: list[RankFailure]) -> RankFailure:
        """Name one failure; the others are its consequences and stay in their logs."""
        cause = root_cause(failures)
        self.journal.step = max(self.journal.step, cause.step)
        tail = log_tail(cause.log)
        self.journal.event(
            "failure", cause.sentence(), rank=cause.rank, phase=cause.phase, log=str(cause.log), log_tail=tail
        )
        return cause

    def _enter(self, state: State, text: str, **more: Any) -> None:
        assert not self.state.is_terminal, f"{self.state} is terminal"
        self.state = state
        self.journal.event(state.value, text, **more)

    def _fail(self, error: FarspanError) -> None:
        self._enter(State.FAILED, str(error))
        self.journal.status("failed", error=str(error))

    def _resuming(self) -> str:
        complete = self.folder.complete_checkpoints()
        if not complete:
            return "starting from step 0 (no complete checkpoint)"
        return f"resuming from step {complete[-1].name.removeprefix('step_')}"

    def _given_up(self, failure: RankFailure, number: int, *, repeated: bool) -> RunFailed:
        tail = log_tail(failure.log, lines=3)
        again = "twice in the same way" if repeated else f"in attempt {number} of {self.attempts}"
        return RunFailed(
            f"the run failed {again}: {failure.headline()}",
            at=f"rank {failure.rank}, phase {failure.phase}, log {failure.log}",
            why=f"{failure.detail}; last lines of its log: {' | '.join(tail)[-800:] or '(empty)'}",
            try_=f"read the log; `farspan run JOB --resume` goes on ({self._resuming()}); cluster.max_failures",
        )

    def _interrupted(self, interruption: BaseException) -> RunFailed:
        return RunFailed(
            f"interrupted after step {self.journal.step}",
            at=f"run folder {self.folder.root}",
            why=str(interruption) or "SIGINT (Ctrl-C)",
            try_=f"`farspan run JOB --resume` goes on ({self._resuming()})",
        )

    def _link_logs(self, attempt: int) -> Path:
        """Make the attempt's log folder and point `logs/latest` at it."""
        logs = self.folder.log(attempt, "trainer", 0).parent
        logs.mkdir(parents=True, exist_ok=True)
        latest = logs.parent / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(logs.name, target_is_directory=True)
        return logs


def next_attempt(folder: RunFolder) -> int:
    """1 in a fresh run folder; a resumed run goes on counting, so that no log is overwritten."""
    found = [path.name.removeprefix("attempt_") for path in (folder.root / "logs").glob("attempt_*")]
    return max((int(number) for number in found if number.isdigit()), default=0) + 1


def remove_group(group: Any) -> None:
    import ray

    ray.util.remove_placement_group(group)


class Signals:
    """Notes SIGINT and SIGTERM while a run goes on, so that it ends between two waits and in order.

    Raising in the handler would be shorter, but Ray's waits turn such an exception into a `SystemError`. A second
    signal of the same kind is handled as before. Off the main thread Python delivers none, and nothing is installed.
    """

    def __init__(self) -> None:
        self.arrived: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted when a signal has arrived."""
        if self.arrived is not None:
            raise Interrupted(self.arrived.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.arrived = signal.Signals(number)
        signal.signal(number, self._before[self.arrived])
