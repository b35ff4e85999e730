"""A rank ran out of memory although the plan did fit: plan against what happened, and what to change.

The plan was wrong by at least what was missing, so a plan that needs as much less may do. Each change a user could make
is planned anew with the budget lowered by that much, and those that fit are told, the cheapest by predicted seconds per
token first, after them what the machine has too few ranks for. Under `memory.plan=solve` the lowered budget is part of
the change: the planner fills whatever it is given. A few seconds of planning for each change, once, when a run has
ended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from farspan.cluster.failure import RankFailure
from farspan.errors import DoesNotFit, JobError, OutOfMemory
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import Machine, ModelFacts, hardware_of
from farspan.jobs.origins import Origin
from farspan.jobs.override import apply
from farspan.jobs.plan import MLP_TILE, Planned, problem_of, size
from farspan.jobs.resolve import Resolved, resolve
from farspan.memory.evaluate import evaluate
from farspan.memory.policies import fixed_policy
from farspan.memory.prediction import Prediction
from farspan.memory.solve import solve
from farspan.schema import parse_bytes

UNKNOWN_SHARE = 0.15
"""Lower by this share of the peak when nothing says how much was missing."""
LEAST_SHARE = 0.05
"""Lower by this at least: the request that failed tells where memory ran out first, not how much more was to come."""
TOLD = 3
SMALLEST_LOSS_TILE = 256
DISK_SHARE = 0.8
"""Of the free disk a tier is offered this much."""

_SIZE = r"([0-9.]+) ?(bytes|[KMGT]i?B)"
_WANTED = re.compile(rf"(?:[Tt]ried to allocate|Unable to allocate) {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")


@dataclass(frozen=True)
class Situation:
    """All that a job can be planned anew with."""

    job: SFTJob
    facts: ModelFacts
    machine: Machine
    origins: Mapping[str, Origin]
    resolved: Resolved
    planned: Planned
    free_disk_bytes: int = 0
    """On the storage of the run folder."""


@dataclass(frozen=True)
class Cure:
    """A change under which a plan fits the lowered budget."""

    flags: tuple[str, ...]
    step_s: float
    tokens: int
    """Of a step."""
    ranks: int
    more_ranks: int
    """How many more than the machine has."""

    @property
    def s_per_token(self) -> float:
        return self.step_s / self.tokens

    def __str__(self) -> str:
        flags = " ".join(f"--set {flag}" for flag in self.flags)
        needs = f", needs {self.ranks} ranks, {self.more_ranks} more than there are" if self.more_ranks else ""
        return f"{flags} ({self.step_s:.3g} s a step, {1e3 * self.s_per_token:.3g} ms a token{needs})"


@dataclass(frozen=True)
class Shortage:
    """What ran out, and by how much."""

    tier: Literal["device", "host"]
    planned_bytes: int
    budget_bytes: int
    missing_bytes: int | None
    """None: nothing said."""

    @property
    def lower_bytes(self) -> int:
        """By how much the planned peak has to come down."""
        if self.missing_bytes is None:
            return int(UNKNOWN_SHARE * self.planned_bytes)
        return max(self.missing_bytes, int(LEAST_SHARE * self.planned_bytes))


def explain(situation: Situation, failure: RankFailure) -> OutOfMemory:
    """The error that ends the run."""
    found = shortage(failure, situation)
    known = f"{size(found.lower_bytes)} less"
    if found.missing_bytes is None:
        known += f" ({UNKNOWN_SHARE:.0%}; how much was missing is not known)"
    cheapest = cures(situation, found)[:TOLD]
    prediction = situation.planned.prediction
    at = f" at {prediction.device_peak_at}" if found.tier == "device" else ""
    return OutOfMemory(
        f"out of memory: {failure.headline()}",
        at=f"rank {failure.rank}, phase {failure.phase}, log {failure.log}",
        why=f"planned were {size(found.planned_bytes)}{at}, of {size(found.budget_bytes)} on the {found.tier}; "
        f"but {_reported(failure)}",
        try_=f"a plan that needs {known}: {' | '.join(map(str, cheapest))}"
        if cheapest
        else f"nothing we know makes the plan need {known}; a smaller model, or more memory",
    )


def shortage(failure: RankFailure, situation: Situation) -> Shortage:
    """What ran out. On CPU the device is the process; on a GPU what CUDA did not refuse is the host's."""
    text = _reported(failure)
    wanted, free = _bytes(_WANTED.search(text)), _bytes(_FREE.search(text))
    missing = max(0, wanted - (free or 0)) if wanted is not None else None
    prediction, budgets = situation.planned.prediction, situation.planned.problem.budgets
    if situation.resolved.gang.use_gpu and not failure.of_device_memory:
        return Shortage("host", prediction.host_bytes, budgets.host_bytes, missing)
    return Shortage("device", prediction.device_peak_bytes, budgets.device_bytes, missing)


def cures(situation: Situation, short: Shortage) -> list[Cure]:
    """Changes under which a plan fits, the cheapest by the token first; last what the machine has no ranks for."""
    limit_bytes = _floored(min(short.planned_bytes, short.budget_bytes) - short.lower_bytes)
    if limit_bytes <= 0:
        return []
    found = [
        cure
        for flags in changes(situation, short.tier)
        if (cure := _planned_anew(situation, flags, short, limit_bytes))
    ]
    return sorted(found, key=lambda cure: (cure.more_ranks > 0, cure.s_per_token))


def changes(situation: Situation, tier: str) -> list[tuple[str, ...]]:
    """What a user could change, one thing at a time; the first under `solve` is the lowered budget alone."""
    job, train, budgets = situation.job, situation.resolved.train, situation.planned.problem.budgets
    memory, found = job.memory, list[tuple[str, ...]]()
    found.append(() if memory.plan == "solve" else ("memory.plan=solve",))
    if memory.mlp_tile == "off" or memory.mlp_tile > MLP_TILE:
        found.append((f"memory.mlp_tile={MLP_TILE}",))
    if memory.loss_tile > SMALLEST_LOSS_TILE:
        found.append((f"memory.loss_tile={max(SMALLEST_LOSS_TILE, memory.loss_tile // 4)}",))
    if tier != "host" and situation.planned.hardware.host_bytes > budgets.host_bytes:
        found.append(("memory.host=auto",))
    disk_bytes = int(DISK_SHARE * situation.free_disk_bytes / max(1, situation.resolved.gang.world_size))
    if memory.disk is None and disk_bytes >= 2**30:
        found.append((f"memory.disk={disk_bytes // 2**30}GiB",))
    if 2 * train.mesh.sp <= situation.facts.heads:
        found.append((f"parallel.sp={2 * train.mesh.sp}",))
    if train.data.context >= 32:
        found.append((f"data.context={train.data.context // 2}",))
    return found


def _planned_anew(situation: Situation, flags: tuple[str, ...], short: Shortage, limit_bytes: int) -> Cure | None:
    """The change with the plan it leads to; None when it contradicts the job, or no plan fits."""
    same = f"parallel.sp={situation.resolved.train.mesh.sp}"  # one thing changes, not also what `auto` makes of it
    try:
        job = _changed(situation.job, (same, *flags))
        if job.policy == "solve":
            flags = (*flags, f"memory.{short.tier}={_as_flag(limit_bytes)}")
            job = _changed(situation.job, (same, *flags))
        resolved = resolve(job, situation.facts, situation.machine, situation.origins)
        prediction = _prediction(job, resolved, situation, short.tier, limit_bytes)
    except (JobError, DoesNotFit):
        return None
    if not prediction.fits:
        return None
    ranks, tokens = resolved.gang.world_size, resolved.train.optim.tokens_per_step
    assert isinstance(tokens, int)
    before = situation.resolved.gang.world_size
    unit = "GPU" if resolved.gang.use_gpu else "CPU"
    each = 1.0 if resolved.gang.use_gpu else job.cluster.cpus_per_actor
    there = int(sum(node.get(unit, 0.0) // each for node in situation.machine.nodes))
    return Cure(flags, prediction.step_s, tokens, ranks, max(0, ranks - max(there, before)))


def _prediction(job: SFTJob, resolved: Resolved, situation: Situation, tier: str, limit_bytes: int) -> Prediction:
    gang = resolved.gang
    hardware = hardware_of(job, situation.machine, ranks=gang.world_size, use_gpu=gang.use_gpu)
    problem = problem_of(job, resolved.train, situation.facts, hardware)
    # more ranks of one machine may leave less to each of them
    share_bytes = hardware.device_bytes if tier == "device" else hardware.host_bytes
    limits: dict[str, Any] = {f"{tier}_bytes": min(limit_bytes, share_bytes)}
    problem = problem.model_copy(update={"budgets": problem.budgets.model_copy(update=limits)})
    if job.policy == "solve":
        return solve(problem).prediction
    return evaluate(problem, fixed_policy(problem, job.policy))


def _changed(job: SFTJob, flags: tuple[str, ...]) -> SFTJob:
    tree = job.model_dump()
    apply(tree, {}, flags)
    return SFTJob.model_validate(tree)


def _reported(failure: RankFailure) -> str:
    text = failure.error.why if failure.error is not None else failure.detail
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _bytes(match: re.Match[str] | None) -> int | None:
    if match is None:
        return None
    return int(parse_bytes(match[1] if match[2] == "bytes" else f"{match[1]}{match[2]}"))


def _floored(size_bytes: int) -> int:
    """A size that can be written short, at most the given one."""
    step = 2**20 if size_bytes < 2**33 else 2**30 // 8
    return size_bytes // step * step


def _as_flag(size_bytes: int) -> str:
    return f"{size_bytes >> 20}MiB" if size_bytes < 2**33 else f"{size_bytes / 2**30:g}GiB"
