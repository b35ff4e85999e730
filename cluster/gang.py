"""A gang: the trainer actors of one attempt, from their placement group to the last process gone.

Ranks, rendezvous, threads and visible GPUs are set here and nowhere else. Ranks are numbered node by node, so that
consecutive ranks (one sequence-parallel group) share a machine. A gang is started once and killed whole: a
sequence-parallel step cannot go on with a rank less, and a fresh process is the only state known to be clean. Starting
costs a few seconds (a worker process and the imports of each rank).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from farspan.cluster.actor import Identity, Raised, Status, TrainerActor, read_last_phase
from farspan.cluster.config import GangSpec
from farspan.cluster.failure import Kind, RankFailure, how_it_ended, log_tail, raised_kind
from farspan.cluster.placement import WAIT_STEP_S, bundles_by_node
from farspan.trainer.run_folder import RunFolder
from farspan.trainer.world import World

DEFAULT_ENTRY = "farspan.trainer.sft:train"
GONE_S = 15.0
"""Longest wait for killed processes to be gone; Ray itself escalates to SIGKILL after five seconds."""
ROUND_AT_MOST_S = 5.0
"""What one round of polling may add to a rank's silence: a driver that was suspended must not blame its ranks."""


class StartFailed(Exception):
    """Ranks failed before training began. Never reaches a user: the supervisor turns it into a restart or an error."""

    def __init__(self, failures: Sequence[RankFailure]) -> None:
        self.failures = list(failures)
        super().__init__(f"{len(self.failures)} ranks did not start")


@dataclass
class Member:
    """One rank as the driver knows it."""

    rank: int
    handle: Any
    log: Path
    identity: Identity | None = None
    training: Any = None
    """Reference of the running `train` call."""
    asked: Any = None
    """Reference of the heartbeat that is under way."""
    status: Status | None = None
    silent_s: float = 0.0
    """How long the heartbeat under way has gone unanswered."""
    result: Any = None
    finished: bool = False
    records_seen: int = 0


@dataclass
class Gang:
    """The actors of one attempt. Make one with `Gang.create`, end it with `kill`."""

    spec: GangSpec
    members: list[Member]
    polled_at_s: float = field(default_factory=time.monotonic)

    @classmethod
    def create(cls, spec: GangSpec, group: Any) -> Gang:
        """Create one actor per bundle of the ready placement group; returns before they are up."""
        places = bundles_by_node(group)[: spec.world_size]
        one_node = len({node for _, node in places}) == 1
        kind = ray.remote(concurrency_groups={"train": 1, "control": 2})(TrainerActor)
        folder = RunFolder(Path(spec.train.run_dir))
        members = []
        for rank, (bundle, _) in enumerate(places):
            log = folder.log(spec.train.attempt, "trainer", rank)
            handle = kind.options(
                name=None,
                num_cpus=spec.cluster.cpus_per_actor,
                num_gpus=1 if spec.use_gpu else 0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                runtime_env={"env_vars": thread_environment(spec, one_node=one_node)},
            ).remote(rank, str(log), spec.name)
            members.append(Member(rank=rank, handle=handle, log=log))
        return cls(spec, members)

    def start(self, entry: str = DEFAULT_ENTRY, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every actor is up, then start training on all of them; arguments and errors as for `meet`."""
        self.meet(check)
        for member, (world, gpus) in zip(self.members, self._worlds()):
            member.training = member.handle.train.remote(self.spec.train, world, entry, gpus)

    def open(self, entry: str, spec: Any, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every actor is up, then have each make `entry(spec, world, progress)` and keep it for `call`."""
        self.meet(check)
        for member, (world, gpus) in zip(self.members, self._worlds()):
            member.training = member.handle.open.remote(spec, world, entry, gpus)

    def call(self, method: str, *arguments: Any, **options: Any) -> None:
        """Have every rank call a method of what it keeps. The last call must have ended; `poll` until none is running,
        then each member's `result` is what it returned."""
        assert not self.running
        for member in self.members:
            member.finished, member.result = False, None
            member.training = member.handle.call.remote(method, *arguments, **options)

    def meet(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every actor is up, at most `cluster.wait_s`.

        Args:
            check: called about every half second of waiting; may raise to end it.

        Raises:
            StartFailed: an actor could not be built, or was not up in time.
        """
        asked = {member.handle.identity.remote(): member for member in self.members}
        deadline_s = time.monotonic() + self.spec.cluster.wait_s
        up: list[Any] = []
        late = list(asked)
        while late and time.monotonic() < deadline_s:
            check()
            up, late = ray.wait(list(asked), num_returns=len(asked), timeout=WAIT_STEP_S)
        failures = []
        for reference in up:
            try:
                asked[reference].identity = ray.get(reference)
            except RayError as error:
                failures.append(self._gone(asked[reference], error))
        for reference in late:
            detail = f"its process was not up within {self.spec.cluster.wait_s:g} s"
            failures.append(self._failure(asked[reference], Kind.SILENT, detail))
        if failures:
            raise StartFailed(failures)

    def poll(self, interval_s: float) -> list[RankFailure]:
        """One round of heartbeats, about `interval_s` long, shorter when a rank ends; returns what went wrong."""
        began = time.monotonic()
        passed_s = min(began - self.polled_at_s, ROUND_AT_MOST_S)
        self.polled_at_s = began
        for member in self.members:
            if member.asked is None:
                member.asked = member.handle.status.remote(member.records_seen)
            else:
                member.silent_s += passed_s
        ray.wait([member.asked for member in self.members], num_returns=len(self.members), timeout=interval_s)
        failures = [failure for member in self.members if (failure := self._hear(member)) is not None]
        left_s = interval_s - (time.monotonic() - began)
        if not failures and self.running and left_s > 0:
            ray.wait([member.training for member in self.running], num_returns=1, timeout=left_s)
        failures += [failure for member in self.running if (failure := self._look_at_training(member)) is not None]
        return failures

    @property
    def running(self) -> list[Member]:
        return [member for member in self.members if not member.finished]

    def late(self, heartbeat_s: float) -> list[RankFailure]:
        """Ranks silent for `heartbeat_s`, and ranks in one phase beyond max(heartbeat_s, 3 x planned).

        A rank that has missed a couple of heartbeats when another one overstays is listed too: it is likely to be
        what the other waits for.
        """
        found = []
        for member in self.running:
            status = member.status
            since_s = 0.0 if status is None else status.since_s + member.silent_s
            planned_s = (status.planned_s if status is not None else None) or 0.0
            limit_s = max(heartbeat_s, 3 * planned_s)
            if member.silent_s > heartbeat_s:
                detail = f"no heartbeat for {member.silent_s:.0f} s, allowed {heartbeat_s:g} s"
                found.append(self._failure(member, Kind.SILENT, detail, since_s))
            elif since_s > limit_s:
                allowed = f"allowed max({heartbeat_s:g} s, 3 x {planned_s:.1f} s planned)"
                found.append(self._failure(member, Kind.OVERSTAYED, f"in it for {since_s:.0f} s, {allowed}", since_s))
        if found:
            blamed = {failure.rank for failure in found if failure.kind is Kind.SILENT}
            for member in self.running:
                if member.rank not in blamed and member.silent_s > min(2.0, heartbeat_s / 2):
                    found.append(self._failure(member, Kind.SILENT, f"no heartbeat for {member.silent_s:.0f} s"))
        return found

    def write_stack(self) -> None:
        """Have every rank that can still answer write where its training thread stands into its log."""
        asked = [member.handle.write_stack.remote() for member in self.running]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=2.0)

    def take_records(self) -> list[dict[str, Any]]:
        """Step records and events of rank 0 that arrived since the last call."""
        first = self.members[0]
        if first.status is None or not first.status.records:
            return []
        records = list(first.status.records)
        first.records_seen += len(records)
        first.status = first.status.without_records()
        return records

    @property
    def pids(self) -> list[int]:
        return [member.identity.pid for member in self.members if member.identity is not None]

    @property
    def step(self) -> int:
        """Last finished step any rank told of."""
        return max((member.status.step for member in self.members if member.status is not None), default=0)

    def kill(self) -> None:
        """Kill every actor and wait until their processes are gone, at most `GONE_S`."""
        for member in self.members:
            ray.kill(member.handle, no_restart=True)
        by_node: dict[str, list[tuple[int, float]]] = {}
        for member in self.members:
            if member.identity is not None:
                identity = member.identity
                by_node.setdefault(identity.node_id, []).append((identity.pid, identity.started))
        here = ray.get_runtime_context().get_node_id()
        elsewhere = []
        for node, processes in by_node.items():
            if node != here:
                pinned = NodeAffinitySchedulingStrategy(node, soft=False)
                task = ray.remote(num_cpus=0, max_retries=0)(end_processes).options(scheduling_strategy=pinned)
                elsewhere.append(task.remote(processes, GONE_S))
        end_processes(by_node.get(here, []), GONE_S)
        if elsewhere:  # a node that is gone took its processes with it
            ray.wait(elsewhere, num_returns=len(elsewhere), timeout=GONE_S)

    def _worlds(self) -> list[tuple[World, tuple[str, ...]]]:
        """Each rank's `World` and the GPUs it may see: those of all ranks on its node, its own at `local_rank`."""
        identities = [member.identity for member in self.members if member.identity is not None]
        one_node = len({identity.node_id for identity in identities}) == 1
        address = "127.0.0.1" if one_node else identities[0].node_ip
        worlds = []
        for rank, identity in enumerate(identities):
            neighbours = [other for other in identities if other.node_id == identity.node_id]
            gpus = tuple(gpu for other in neighbours for gpu in other.gpu_ids)
            local_rank = gpus.index(identity.gpu_ids[0]) if self.spec.use_gpu else neighbours.index(identity)
            world = World(
                rank=rank,
                world_size=self.spec.world_size,
                local_rank=local_rank,
                master_addr=address,
                master_port=identities[0].free_port,
                use_gpu=self.spec.use_gpu,
            )
            worlds.append((world, gpus if self.spec.use_gpu else ()))
        return worlds

    def _hear(self, member: Member) -> RankFailure | None:
        """Take the answer to the heartbeat under way, when there is one."""
        try:
            status = ray.get(member.asked, timeout=0)
        except GetTimeoutError:
            return None
        except ActorUnavailableError:
            member.asked = None  # the connection broke and Ray reconnects; silence goes on counting
            return None
        except RayError as error:
            member.asked = None
            return None if member.finished else self._gone(member, error)
        member.status, member.asked, member.silent_s = status, None, 0.0
        return None

    def _look_at_training(self, member: Member) -> RankFailure | None:
        """Take the end of `train`, when it has ended."""
        try:
            result = ray.get(member.training, timeout=0)
        except GetTimeoutError:
            return None
        except RayError as error:
            return self._gone(member, error)
        member.finished = True
        if not isinstance(result, Raised):
            member.result = result
            return None
        return RankFailure(
            rank=member.rank,
            kind=raised_kind(result.summary, result.error),
            phase=result.phase,
            step=max(result.step, self.step),
            detail=result.summary,
            log=member.log,
            error=result.error,
            **self._whereabouts(member),
        )

    def _gone(self, member: Member, error: RayError) -> RankFailure:
        member.finished = True
        if not isinstance(error, ActorDiedError) or getattr(error, "actor_init_failed", False):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return self._failure(member, Kind.GONE, lines[-1] if lines else type(error).__name__)
        pid = member.identity.pid if member.identity is not None else None
        return self._failure(member, Kind.GONE, how_it_ended(pid, str(error), log_tail(member.log, lines=1000)))

    def _failure(self, member: Member, kind: Kind, detail: str, since_s: float = 0.0) -> RankFailure:
        status = member.status
        noted = read_last_phase(member.log)
        phase, step = noted or ((status.phase, status.step) if status is not None else ("starting", 0))
        return RankFailure(
            rank=member.rank,
            kind=kind,
            phase=phase,
            step=max(step, self.step, self._noted_step_of_rank_0()),
            detail=detail,
            log=member.log,
            phases_entered=status.phases_entered if status is not None else 0,
            since_s=since_s,
            **self._whereabouts(member),
        )

    def _noted_step_of_rank_0(self) -> int:
        noted = read_last_phase(self.members[0].log)
        return noted[1] if noted is not None else 0

    def _whereabouts(self, member: Member) -> dict[str, Any]:
        identity = member.identity
        return {} if identity is None else {"pid": identity.pid, "node_ip": identity.node_ip}


def thread_environment(spec: GangSpec, *, one_node: bool) -> dict[str, str]:
    """Environment of a rank, in force before its process imports anything.

    One thread per CPU core of the actor: two OpenMP pools on the same cores cost a factor of four and more.
    """
    threads = str(max(1, int(spec.cluster.cpus_per_actor)))
    environment = {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if one_node:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks the host name up, which often leads nowhere
    return environment


def end_processes(processes: Sequence[tuple[int, float]], deadline_s: float) -> list[int]:
    """Wait for processes (pid, creation time) of this machine to end; halfway through, kill those that have not.

    Returns:
        Pids that are still there after `deadline_s`.
    """
    alive = []
    for pid, started in processes:
        try:
            process = psutil.Process(pid)
            if abs(process.create_time() - started) < 1.0:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(alive, timeout=deadline_s / 2)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout=deadline_s / 2)
    return [process.pid for process in alive]
