"""An RL run on Ray: the gang that trains, the workers that generate, the verifiers, around one loop.

Supervision is that of supervised training: an attempt is a gang in a placement group, which here has a bundle for each
rollout worker too, and the loop (`trainer.rl.loop`) runs in the driver. A rank that fails ends the attempt, and the
next one goes on from the last complete checkpoint, with the pool of samples as it was. Workers and verifiers are
replaced where they fail, and end nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farspan.cluster.config import GangSpec
from farspan.cluster.failure import RankFailure, out_of_memory
from farspan.cluster.gang import Gang
from farspan.cluster.placement import bundles_by_node
from farspan.cluster.rollout import RolloutWorkers, WorkerSpec
from farspan.cluster.session import Session
from farspan.cluster.supervisor import POLL_S, Supervisor
from farspan.errors import FarspanError, RunFailed
from farspan.trainer.metrics import MetricsWriter
from farspan.trainer.rl.batch import TrainedSample
from farspan.trainer.rl.config import RLRunSpec, RLSpec
from farspan.trainer.rl.loop import RLLoop
from farspan.trainer.rl.state import from_bytes, to_bytes
from farspan.trainer.rl.tasks.base import Problem
from farspan.trainer.rl.verify import VerifierPool
from farspan.trainer.world import TrainResult

if TYPE_CHECKING:
    from torch import Tensor

ENTRY = "farspan.trainer.rl.policy:PolicyRank"
SAMPLES = "samples.jsonl"
"""In the run folder: every finished sample."""


class GangFailed(Exception):
    """A rank failed in a call. Never reaches a user: the supervisor turns it into a restart or an error."""

    def __init__(self, cause: RankFailure) -> None:
        self.cause = cause
        super().__init__(cause.sentence())


class RLSupervisor(Supervisor):
    """The state machine of an RL run.

    Args:
        rank: what every rank is told. run: what the loop is told. worker: what rollout workers are told.
        encode, decode: as for `RLLoop`.
    """

    def __init__(
        self,
        gang_spec: GangSpec,
        session: Session,
        *,
        rank: RLSpec,
        run: RLRunSpec,
        worker: WorkerSpec,
        encode: Callable[[Problem], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
        on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
        on_out_of_memory: Callable[[RankFailure], FarspanError] = out_of_memory,
    ) -> None:
        super().__init__(gang_spec, session, ENTRY, on_record, on_event, on_out_of_memory)
        self.rank, self.run_spec, self.worker = rank, run, worker
        self.encode, self.decode = encode, decode
        self.workers: RolloutWorkers | None = None
        self.judges: VerifierPool | None = None
        self.writer: MetricsWriter | None = None

    @property
    def samples(self) -> Path:
        return self.folder.root / SAMPLES

    def _start(self, gang: Gang, group: Any) -> None:
        spec = gang.spec
        rollout = self.run_spec.rollout
        gang.open(ENTRY, self.rank.model_copy(update={"train": spec.train}), check=self.signals.check)
        bundles = [bundle for bundle, _ in bundles_by_node(group)][spec.world_size :]
        self.workers = RolloutWorkers(
            spec,
            group,
            bundles,
            self.worker,
            rollout.deadline_s,
            rollout.max_failures,
            on_event=self.journal.event,
            check=self.signals.check,
        )
        self.workers.start()
        self.judges = VerifierPool(self.run_spec.task, limit_s=self.run_spec.reward.verify_s)

    def _end(self) -> None:
        for part in (self.workers, self.judges, self.writer):
            if part is not None:
                part.close()
        self.workers = self.judges = self.writer = None

    def _watch(self, gang: Gang) -> Any:
        """The loop, to its end (a `TrainResult`) or to the failure of a rank."""
        assert self.workers is not None and self.judges is not None
        try:
            self._wait(gang)
            trainer = _GangTrainer(self, gang)
            begun = trainer.call("begin")
            loop = RLLoop(
                self.run_spec,
                trainer=trainer,
                workers=self.workers,
                judges=self.judges,
                encode=self.encode,
                decode=self.decode,
                record=self._record,
                recorded=self._recorded,
            )
            if begun["driver"] is not None:
                loop.load_state(from_bytes(begun["driver"]))
            self.journal.step = loop.at
            self._open_records(loop.at)
            last = loop.run()
            saved = trainer.call("wait")
            complete = self.folder.complete_checkpoints()
            return TrainResult("done", loop.at, last, saved or str(complete[-1] if complete else ""))
        except GangFailed as failed:
            return failed.cause

    def _take(self, gang: Gang) -> None:
        """Events of rank 0; steps are the loop's own to tell."""
        for record in gang.take_records():
            if "event" in record:
                self.journal.event(record["event"], record["text"])
        self.journal.still_running(self.journal.step)

    def _wait(self, gang: Gang) -> Any:
        """Until every rank has done what it was asked to; what rank 0 returned.

        Raises:
            GangFailed: a rank failed.
        """
        while True:
            failures = gang.poll(POLL_S)
            self._take(gang)
            self.signals.check()
            if failures:
                raise GangFailed(self._report(self._settle(gang, failures)))
            late = gang.late(self.spec.cluster.heartbeat_s)
            if late:
                gang.write_stack()
                raise GangFailed(self._report(late))
            if not gang.running:
                return gang.members[0].result

    def _open_records(self, step: int) -> None:
        """Files that go on behind the step that is resumed from."""
        self.writer = MetricsWriter(
            self.folder,
            self.rank.train.track,
            run_name=self.folder.root.name,
            config=self.run_spec.model_dump(mode="json"),
            restored_step=step or None,
        )
        path = self.samples
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _record(self, record: dict[str, Any]) -> None:
        assert self.writer is not None
        whole = {
            "loss": None,
            "grad_norm": None,
            "lr": None,
            "tokens": 0,
            "parts_s": {},
            "device_peak_bytes": None,
            "host_bytes": None,
            **record,
            "tokens_total": record["generated_tokens_total"],
            "plan_step_s": self.rank.train.plan_step_s,
            "plan_device_peak_bytes": self.rank.train.plan_device_peak_bytes,
            "disk_bytes": 0,
            "stall_s": {},
            "packing_efficiency": None,
            "epoch": 0,
            "attempt": self.journal.attempt,
            "time": time.time(),
        }
        self.on_record(self.writer.write(whole))
        self.journal.still_running(record["step"])

    def _recorded(self, samples: Sequence[dict[str, Any]]) -> None:
        try:
            with open(self.samples, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        except OSError as error:
            raise RunFailed(
                "the samples of a step cannot be written",
                at=str(self.samples),
                why=str(error),
                try_="free space there; `farspan run JOB --resume` goes on from the last complete checkpoint",
            ) from error


class _GangTrainer:
    """`trainer.rl.loop.PolicyTrainer` over a gang."""

    def __init__(self, supervisor: RLSupervisor, gang: Gang) -> None:
        self.supervisor, self.gang = supervisor, gang

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        self.gang.call(method, *arguments, **options)
        return self.supervisor._wait(self.gang)

    def update(
        self, samples: Sequence[TrainedSample], log_probs: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> dict[str, Any]:
        return dict(self.call("update", samples, log_probs))

    def score(self, samples: Sequence[TrainedSample], *, reference: bool = False) -> dict[str, list[np.ndarray]]:
        return dict(self.call("score", samples, reference=reference))

    def weights(self) -> Mapping[str, Tensor]:
        return dict(self.call("weights"))

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        self.call("save", step, to_bytes(dict(state)))


def _lines(path: Path) -> list[str]:
    """Whole lines of a file; a last one cut short by a crash is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
