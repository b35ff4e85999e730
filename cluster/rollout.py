"""Rollout workers: actors that hold a copy of the policy and generate, and the driver's view of them.

A worker that dies, hangs or answers garbage costs time and nothing else: its jobs name their seeds, so another worker
does them again with the same outcome, and a new actor takes the old one's place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from farspan.cluster.actor import redirect_output
from farspan.cluster.config import GangSpec
from farspan.cluster.failure import log_tail
from farspan.cluster.gang import thread_environment
from farspan.errors import RunFailed
from farspan.schema import Schema
from farspan.trainer.config import Adapter, Base, ModelSource, Precision
from farspan.trainer.rl.messages import RolloutJob, Sampling, SegmentResult
from farspan.trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

WAIT_STEP_S = 0.5


class WorkerSpec(Schema):
    """What a worker generates with."""

    model: ModelSource
    adapter: Adapter
    base: Base
    precision: Precision
    seed: int
    engine: Literal["hf", "hf-cb"]
    batch: int
    cache_tokens: int
    eos_ids: tuple[int, ...]
    vocab: int
    use_gpu: bool


class RolloutActor:
    """One worker in its process."""

    def __init__(self, log: str) -> None:
        redirect_output(Path(log))
        self._engine: Any = None

    def open(self, spec: WorkerSpec) -> None:
        """Load the model."""
        import torch

        from farspan.trainer.rl.local import make_engine

        assert spec.model.type == "pretrained", "rollouts start from a model in a folder or on the hub"
        self._engine = make_engine(
            spec.model.id,
            revision=spec.model.revision,
            adapter=spec.adapter,
            base=spec.base,
            precision=spec.precision,
            seed=spec.seed,
            device=torch.device("cuda", 0) if spec.use_gpu else torch.device("cpu"),
            eos_ids=spec.eos_ids,
            batch=spec.batch,
            engine=spec.engine,
            cache_tokens=spec.cache_tokens,
        )

    def load(self, weights: Mapping[str, Tensor], version: int, digest: str) -> int:
        """Take over published weights; returns the version that is served from now on."""
        if checksum(weights) != digest:
            raise RunFailed(
                f"weights of version {version} did not arrive as they were published",
                at="rollout worker",
                why="their checksum is another one",
                try_="run again; if it comes back, look at the object store and the memory of the node",
            )
        self._engine.load(weights, version)
        return int(self._engine.version)

    def generate(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]:
        found: list[SegmentResult] = self._engine.generate(jobs, sampling)
        return found


def checksum(weights: Mapping[str, Tensor]) -> str:
    """Of names and bits."""
    import torch
    import xxhash

    digest = xxhash.xxh3_64()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class _Worker:
    """One worker as the driver knows it."""

    number: int
    bundle: int
    log: Path
    handle: Any = None
    generation: int = 0
    """Actors that this place has had before."""
    version: int = -1


@dataclass
class _Sent:
    """A call that is out."""

    worker: _Worker
    jobs: list[RolloutJob]
    deadline_s: float


@dataclass
class RolloutWorkers:
    """All workers of a run.

    Args:
        gang: whose placement group has a bundle for each worker, behind those of the ranks.
        bundles: of the workers.
        deadline_s: for one call.
        max_failures: in a row, without a generation that came to its end.
        on_event: (event, text).
        check: called while waiting; may raise to end it.
    """

    gang: GangSpec
    group: Any
    bundles: Sequence[int]
    spec: WorkerSpec
    deadline_s: float
    max_failures: int
    on_event: Callable[[str, str], None]
    check: Callable[[], None]
    failures: int = 0
    """In a row."""
    failures_total: int = 0
    workers: list[_Worker] = field(default_factory=list)
    published: tuple[Any, int, str] | None = None
    """Reference, version and checksum of the weights of now."""

    def start(self) -> None:
        """Make an actor in each bundle and load the model, all at once."""
        folder = RunFolder(Path(self.gang.train.run_dir))
        for number, bundle in enumerate(self.bundles):
            log = folder.log(self.gang.train.attempt, "rollout", number)
            self.workers.append(_Worker(number, bundle, log))
        opened = [(worker, self._make(worker)) for worker in self.workers]
        for worker, reference in opened:
            self._wait(worker, reference, self.gang.cluster.wait_s + self.deadline_s, "load the model")

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Send weights to every worker, and wait until each serves them."""
        self.published = (ray.put(dict(weights)), version, checksum(weights))
        for worker, reference in [(worker, self._send_weights(worker)) for worker in self.workers]:
            self._take_weights(worker, reference)

    def generate(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]:
        """The next segment of every job, in their order. Samples of a group go to one worker, always the same while no
        worker fails, so that a resumed run has the same batches.

        Raises:
            RunFailed: workers failed too often in a row.
        """
        at = {job.sample_id: index for index, job in enumerate(jobs)}
        done: dict[int, SegmentResult] = {}
        waiting: dict[int, list[RolloutJob]] = {worker.number: [] for worker in self.workers}
        prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(job.prompt_ids for job in jobs))}
        for job in jobs:
            waiting[prompts[job.prompt_ids] % len(self.workers)].append(job)
        out: dict[Any, _Sent] = {}
        while len(done) < len(jobs):
            for worker in self.workers:
                if waiting[worker.number] and all(sent.worker is not worker for sent in out.values()):
                    batch, waiting[worker.number] = waiting[worker.number], []
                    reference = worker.handle.generate.remote(batch, sampling)
                    out[reference] = _Sent(worker, batch, time.monotonic() + self.deadline_s)
            ready, _ = ray.wait(list(out), num_returns=1, timeout=WAIT_STEP_S)
            self.check()
            late = [ref for ref, sent in out.items() if ref not in ready and time.monotonic() > sent.deadline_s]
            for reference in [*ready, *late]:
                sent = out.pop(reference)
                why = self._collect(reference, sent, at, done) if reference in ready else self._late()
                if why is not None:
                    self._failed(sent.worker, why)
                    left = [job for job in sent.jobs if job.sample_id not in done]
                    # to whoever comes next, so that one bad node does not get them again and again
                    waiting[(sent.worker.number + 1) % len(self.workers)] += left
        self.failures = 0
        return [done[job.sample_id] for job in jobs]

    def close(self) -> None:
        """End all actors."""
        for worker in self.workers:
            if worker.handle is not None:
                with suppress(RayError):
                    ray.kill(worker.handle, no_restart=True)

    def _collect(
        self, reference: Any, sent: _Sent, at: Mapping[int, int], done: dict[int, SegmentResult]
    ) -> str | None:
        """Take what a worker answered; what is wrong with it, if anything is."""
        try:
            found = ray.get(reference, timeout=WAIT_STEP_S)
        except (RayError, GetTimeoutError) as error:
            return _last_line(error)
        if not isinstance(found, list) or not all(isinstance(one, SegmentResult) for one in found):
            return f"its answer is a {type(found).__name__}"
        by_sample = {one.sample_id: one for one in found}
        version = self.published[1] if self.published is not None else 0
        for job in sent.jobs:
            one = by_sample.get(job.sample_id)
            if one is None:
                return f"sample {job.sample_id} is missing from its answer"
            if one.version != version:
                return f"it generated with version {one.version}, published is {version}"
            problem = one.problem_with(job, eos_ids=self.spec.eos_ids, vocab=self.spec.vocab)
            if problem is not None:
                return f"garbage for sample {job.sample_id}: {problem}"
        done.update({job.sample_id: by_sample[job.sample_id] for job in sent.jobs if job.sample_id in at})
        return None

    def _late(self) -> str:
        return f"no answer within {self.deadline_s:g} s (rollout.deadline_s)"

    def _failed(self, worker: _Worker, why: str) -> None:
        """Tell it, and put a new actor in the worker's place."""
        self.failures += 1
        self.failures_total += 1
        self.on_event("rollout", f"rollout worker {worker.number} failed: {why}; its samples are sent again")
        if self.failures > self.max_failures:
            tail = " | ".join(log_tail(worker.log, lines=3))[-800:]
            raise RunFailed(
                f"rollout workers failed {self.failures} times in a row",
                at=f"rollout worker {worker.number}, log {worker.log}",
                why=f"{why}; last lines of its log: {tail or '(empty)'}",
                try_="read the log; `farspan run JOB --resume` goes on; rollout.max_failures",
            )
        with suppress(RayError):
            ray.kill(worker.handle, no_restart=True)
        worker.generation += 1
        self._wait(worker, self._make(worker), self.gang.cluster.wait_s + self.deadline_s, "load the model")
        if self.published is not None:
            self._take_weights(worker, self._send_weights(worker))

    def _make(self, worker: _Worker) -> Any:
        kind = ray.remote(RolloutActor)
        worker.handle = kind.options(
            num_cpus=self.gang.cluster.cpus_per_actor,
            num_gpus=1 if self.gang.use_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, worker.bundle),
            runtime_env={"env_vars": thread_environment(self.gang, one_node=True)},
        ).remote(str(worker.log))
        return worker.handle.open.remote(self.spec)

    def _send_weights(self, worker: _Worker) -> Any:
        assert self.published is not None
        reference, version, digest = self.published
        return worker.handle.load.remote(reference, version, digest)

    def _take_weights(self, worker: _Worker, reference: Any) -> None:
        assert self.published is not None
        version = self._wait(worker, reference, self.deadline_s, "take over new weights")
        if version is not None and version != self.published[1]:
            self._failed(worker, f"it serves version {version} after {self.published[1]} was published")
        worker.version = self.published[1]

    def _wait(self, worker: _Worker, reference: Any, limit_s: float, what: str) -> Any:
        """An answer, or a new actor in the place of one that gave none; then None."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            self.check()
            ready, _ = ray.wait([reference], timeout=WAIT_STEP_S)
            if ready:
                try:
                    return ray.get(reference)
                except RayError as error:
                    self._failed(worker, f"it could not {what}: {_last_line(error)}")
                    return None
        self._failed(worker, f"it did not {what} within {limit_s:g} s")
        return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
