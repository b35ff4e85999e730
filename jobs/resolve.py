"""From a job to what the layers below take: every `auto` decided, every value with its origin.

`resolve` is one pure function: same job, model shape and machine, same answer; it reads no file, no environment and no
clock. Each decision returns its value and one sentence with the arithmetic, which ends up in `resolved.json` beside the
values that came from the file, a flag or a default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from farspan.cluster.config import GangSpec
from farspan.cluster.placement import Demand
from farspan.errors import JobError
from farspan.jobs.adapter_checks import STARTED, check_lora, check_s2a, check_streams, check_unipt
from farspan.jobs.base_checks import check_quantized, check_rounding
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import Machine, ModelFacts
from farspan.jobs.optimizers import check_optimizer, check_zero_0, only_zero_0
from farspan.jobs.origins import DEFAULT, Origin, dotted, leaves
from farspan.jobs.prepared_rules import check_prepared
from farspan.memory.config import Tiers, Tiles
from farspan.memory.plan import Placement
from farspan.trainer.adapters.config import inner
from farspan.trainer.config import (
    L4Q,
    LQ,
    NF4,
    PEQA,
    PV,
    S2A,
    LoRA,
    Mesh,
    Reversible,
    TrainSpec,
    UniPT,
    Unquantized,
)

MIN_ROWS = 2048
"""`auto` keeps at least this many rows of a sequence on a rank. Below it a layer's work is too small to cover its two
all-to-alls, and the rank is better used on another sequence (dp)."""

OPTIMIZER_BYTES = 12
"""fp32 master, first and second moment of one trained weight."""


@dataclass(frozen=True)
class Value:
    """One line of `resolved.json`."""

    value: Any
    origin: Origin


@dataclass(frozen=True)
class Resolved:
    """What to run, and why it is so."""

    gang: GangSpec
    values: Mapping[str, Value]
    """By dotted path of the job, plus what no job field names: `accumulation`, `world_size`."""

    @property
    def train(self) -> TrainSpec:
        return self.gang.train

    def with_tokens(self, tokens_dir: str) -> Resolved:
        """The same, reading the prepared token store in `tokens_dir`."""
        gang = self.gang.model_copy(update={"train": self.train.model_copy(update={"tokens_dir": tokens_dir})})
        return replace(self, gang=gang)

    def with_plan(
        self,
        placement: Placement,
        tiers: Tiers | None,
        why: str,
        *,
        step_s: float | None = None,
        device_peak_bytes: int | None = None,
    ) -> Resolved:
        """The same, storing what `placement` says; `why` is the plan in a sentence."""
        update = {
            "placement": None if placement.keeps_everything else placement,
            "tiers": tiers,
            "plan_step_s": step_s,
            "plan_device_peak_bytes": device_peak_bytes,
        }
        gang = self.gang.model_copy(update={"train": self.train.model_copy(update=update)})
        policy = self.values["memory.plan"].value
        values = {**self.values, "placement": Value(policy, Origin("planner", why=why))}
        return replace(self, gang=gang, values=values)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """`{path: {"value", "origin", "where"?, "why"?}}`, ready for `resolved.json`."""
        table = {}
        for path, entry in self.values.items():
            row: dict[str, Any] = {"value": entry.value, "origin": entry.origin.kind}
            if entry.origin.where is not None:
                row["where"] = entry.origin.where
            if entry.origin.why is not None:
                row["why"] = entry.origin.why
            table[path] = row
        return table


Choose: TypeAlias = Callable[[Sequence[Resolved]], tuple[int | None, str]]
"""Which of several ways to resolve a job, best by rule first, and why in a sentence; None: the rule stands."""


def resolve(
    job: SFTJob,
    facts: ModelFacts,
    machine: Machine,
    origins: Mapping[str, Origin],
    choose: Choose | None = None,
) -> Resolved:
    """Decide everything a job leaves open.

    Args:
        job: validated job.
        facts: shape of its model.
        machine: what the cluster can give. A job that asks for more is not refused here: the cluster layer waits for
            the resources and then states demand against supply.
        origins: where the job's values came from, by dotted path.
        choose: picks among the SP degrees that `auto` may take, each with the dp and ZeRO stage that go with it;
            `jobs.mesh` does so by prediction. None: by rule, the most ranks and then the highest degree.

    Raises:
        JobError: values that contradict each other: SP degree no layout allows, tokens per step that do not divide
            into packs, CPU offload without ZeRO, more warm-up than steps.
    """
    by_rule = _Resolution(job, facts, machine, origins)
    if choose is None or len(by_rule.degrees) < 2:
        return by_rule.result()
    others = [_Resolution(job, facts, machine, origins, sp=degree).result() for degree in by_rule.degrees[1:]]
    candidates = [by_rule.result(), *others]
    index, why = choose(candidates)
    chosen, rows = candidates[index or 0], f"{-(-job.data.context // candidates[index or 0].train.mesh.sp)} rows"
    why = f"{by_rule.why_sp}; {why}" if index is None else f"{by_rule.limit}; {why}; {rows} on each rank"
    sp = Value(chosen.train.mesh.sp, Origin("planner", why=why))
    return replace(chosen, values={**chosen.values, "parallel.sp": sp})


def batch_chain(resolved: Resolved) -> str:
    """The sizes of a step on one line, from tokens down to the rows of a rank."""
    train = resolved.train
    tokens, context = train.optim.tokens_per_step, train.data.context
    assert isinstance(tokens, int)
    packs, rows = tokens // context, -(-context // train.mesh.sp)
    return (
        f"tokens per step {tokens} = {_count(packs, 'pack')} of {context} = "
        f"dp {train.mesh.dp} x accumulation {train.accumulation}; "
        f"each pack on sp {_count(train.mesh.sp, 'rank')} of {rows} rows"
    )


def mesh_reason(resolved: Resolved) -> list[str]:
    """Why the SP degree is what it is, on a line; none when the job says it."""
    origin = resolved.values["parallel.sp"].origin
    return [f"sp {resolved.train.mesh.sp}: {origin.why}"] if origin.kind == "planner" else []


class _Resolution:
    """The decisions in their order; each may use the ones before it."""

    def __init__(
        self, job: SFTJob, facts: ModelFacts, machine: Machine, origins: Mapping[str, Origin], *, sp: int | None = None
    ) -> None:
        self.job, self.facts, self.machine, self.origins = job, facts, machine, origins
        self.decided: dict[str, Value] = {}
        self.use_gpu = self._use_gpu()
        bundle = {"CPU": job.cluster.cpus_per_actor, **({"GPU": 1.0} if self.use_gpu else {})}
        self.ranks = Demand(ranks=1, bundle=bundle, strategy=job.cluster.placement).room(machine.nodes)
        self.degrees, self.limit, self.why_sp = list[int](), "", ""
        self.sp = self._sp(sp)
        self._check_exchange()
        self.dp = self._dp()
        self.tokens = self._tokens_per_step()
        self.accumulation = self.tokens // (job.data.context * self.dp)
        self.warmup_steps = self._warmup_steps()
        check_optimizer(job, facts.hidden, self.accumulation, self._at)
        self.zero = self._zero()
        self.adapter = self._adapter()
        self.base = self._base()
        self._check_density()

    def result(self) -> Resolved:
        job, world_size = self.job, self.dp * self.sp
        optim = job.optim.model_copy(update={"tokens_per_step": self.tokens, "warmup_steps": self.warmup_steps})
        train = TrainSpec(
            run_dir=str(job.run_dir),
            tokens_dir="",  # known only after the tokens are made: `Resolved.with_tokens`
            model=job.model,
            data=job.data,
            adapter=self.adapter,
            base=self.base,
            precision=job.precision,
            mesh=Mesh(dp=self.dp, sp=self.sp),
            exchange=job.parallel.exchange,
            zero=self.zero,  # type: ignore[arg-type]  # 0, 2 or 3, or what the job's own Literal let through
            cpu_offload=job.parallel.cpu_offload,
            addresses=job.memory.addresses,
            accumulation=self.accumulation,
            warmup_steps=self.warmup_steps,
            optim=optim,
            density=job.density,
            memory=Tiles(**{name: getattr(job.memory, name) for name in Tiles.model_fields}),
            checkpoint=job.checkpoint,
            evaluate=job.evaluate,
            track=job.track,
        )
        gang = GangSpec(name=job.name, world_size=world_size, cluster=job.cluster, use_gpu=self.use_gpu, train=train)
        self._decide("accumulation", self.accumulation, f"{self.tokens} / (context {job.data.context} x dp {self.dp})")
        self._decide("world_size", world_size, f"dp {self.dp} x sp {self.sp}")
        written = {dotted(path): Value(value, self.origins.get(dotted(path), DEFAULT)) for path, value in leaves(job)}
        return Resolved(gang, {**written, **self.decided})

    def _decide(self, path: str, value: Any, why: str) -> None:
        self.decided[path] = Value(value, Origin("planner", why=why))

    def _at(self, path: str) -> str:
        where = self.origins.get(path, DEFAULT).where
        return f"{path} in {where}" if where else path

    def _use_gpu(self) -> bool:
        asked = self.job.cluster.use_gpu
        if asked != "auto":
            return asked
        found = self.machine.gpus >= 1
        self._decide("cluster.use_gpu", found, f"the cluster has {self.machine.gpus:g} GPUs")
        return found

    def _whole_sequences(self) -> int:
        """The only layout of a recurrence: its state would run on into the next document, or stop at a rank's edge."""
        layers = len(self.facts.linear_layers)
        for name, cure, broken in (
            ("parallel.sp", "parallel.sp=1", self.job.parallel.sp not in ("auto", 1)),
            ("data.pack", "data.pack=false", self.job.data.pack),
        ):
            if broken:
                raise JobError(
                    f"{name} does not go with linear attention",
                    at=self._at(name),
                    why=f"{layers} layers carry a state from row to row, which knows neither documents nor ranks yet",
                    try_=f"--set {cure}",
                )
        self.degrees, self.limit = [1], "linear attention needs whole sequences"
        self.why_sp = self.limit
        if self.job.parallel.sp == "auto":
            self._decide("parallel.sp", 1, self.limit)
        return 1

    def _check_exchange(self) -> None:
        exchange = self.job.parallel.exchange
        if exchange.type == "exact" or self.sp > 1:
            return
        raise JobError(
            "nothing crosses ranks in this job",
            at=self._at("parallel.exchange"),
            why=f"sp is 1 ({self.why_sp or 'asked for'}), so every rank attends to its own rows and there is nothing "
            "to send in fewer bits",
            try_="--set parallel.sp=2 or more, or --set parallel.exchange.type=exact",
        )

    def _sp(self, chosen: int | None) -> int:
        heads, asked = self.facts.heads, self.job.parallel.sp
        if self.facts.linear_layers:
            return self._whole_sequences()
        if asked != "auto":
            if 1 <= asked <= heads:
                return asked
            balanced = [degree for degree in range(1, heads + 1) if heads % degree == 0]
            raise JobError(
                f"no layout allows SP degree {asked}",
                at=self._at("parallel.sp"),
                why=f"each rank needs at least one of the {heads} attention heads, so 1 <= sp <= {heads}",
                try_=f"--set parallel.sp={max(1, min(asked, heads))}; balanced are {', '.join(map(str, balanced))}, "
                f"any other up to {heads} works too",
            )
        context, dp = self.job.data.context, self.job.parallel.dp
        share = max(1, self.ranks if dp == "auto" else self.ranks // max(1, dp))
        limits = {
            f"{_count(share, 'rank')} for a sequence": share,
            f"{heads} attention heads": heads,
            f"at least {MIN_ROWS} rows on a rank of a context of {context}": max(1, context // MIN_ROWS),
        }
        most = min(limits.values())
        self.limit = f"at most {most}: {next(words for words, limit in limits.items() if limit == most)}"
        even = [degree for degree in range(1, most + 1) if heads % degree == 0]
        used = {degree: degree * (share // degree) if dp == "auto" else degree for degree in even}
        self.degrees, why = sorted(even, key=lambda degree: (used[degree], degree), reverse=True), self.limit
        if even == [1] and most > 1:
            self.degrees = [most, 1]
            why += f"; none above 1 divides {heads} heads, so a rank has {heads // most} or {-(-heads // most)} of them"
        elif self.degrees[0] < most:
            why += f"; {self.degrees[0]} divides {heads} heads and uses the most ranks"
        if self.job.parallel.exchange.type != "exact" and self.degrees[-1] == 1:
            self.degrees = self.degrees[:-1] or [1]
        sp = chosen or self.degrees[0]
        self.why_sp = f"{why}; {-(-context // sp)} rows on each rank"
        self._decide("parallel.sp", sp, self.why_sp)
        return sp

    def _dp(self) -> int:
        asked, tokens, context = self.job.parallel.dp, self.job.optim.tokens_per_step, self.job.data.context
        if asked != "auto":
            if asked >= 1:
                return asked
            raise JobError(
                f"dp cannot be {asked}",
                at=self._at("parallel.dp"),
                why="it counts groups of ranks",
                try_="--set parallel.dp=1 or leave it out",
            )
        left = max(1, self.ranks // self.sp)
        why = f"{_count(max(self.ranks, 1), 'rank')} / sp {self.sp}"
        dp = left
        if tokens != "auto":
            packs = tokens // context
            dp = max((degree for degree in range(1, left + 1) if packs % degree == 0), default=1)
            if dp < left:
                why += f" = {left}; {dp} is the most that divides the {packs} packs of a step"
        self._decide("parallel.dp", dp, why)
        return dp

    def _tokens_per_step(self) -> int:
        tokens, context = self.job.optim.tokens_per_step, self.job.data.context
        unit = context * self.dp
        if tokens == "auto":
            self._decide("optim.tokens_per_step", unit, f"context {context} x dp {self.dp}: one pack for each group")
            return unit
        if tokens > 0 and tokens % unit == 0:
            return tokens
        below, above = tokens // unit * unit, (tokens // unit + 1) * unit
        legal = [str(value) for value in (below, max(above, unit)) if value > 0]
        raise JobError(
            f"{tokens} tokens per step do not divide into packs",
            at=self._at("optim.tokens_per_step"),
            why=f"a step is whole packs: {tokens} / (context {context} x dp {self.dp}) = {tokens / unit:.3f}",
            try_=" or ".join(f"--set optim.tokens_per_step={value}" for value in dict.fromkeys(legal)),
        )

    def _warmup_steps(self) -> int:
        asked, steps = self.job.optim.warmup_steps, self.job.optim.steps
        if asked == "auto":
            warmup = max(1, round(0.03 * steps))
            self._decide("optim.warmup_steps", warmup, f"3 % of {steps} steps, at least one")
            return warmup
        if 0 <= asked <= steps:
            return asked
        raise JobError(
            f"warm-up of {asked} steps in a job of {steps}",
            at=self._at("optim.warmup_steps"),
            why=f"warm-up is part of the job, so 0 <= warmup_steps <= {steps}",
            try_="--set optim.warmup_steps=auto",
        )

    def _zero(self) -> int:
        asked, offload, world_size = self.job.parallel.zero, self.job.parallel.cpu_offload, self.dp * self.sp
        whole = only_zero_0(self.job.optim)
        if whole is not None:
            check_zero_0(self.job, whole, self._at)
            if asked == "auto":
                self._decide("parallel.zero", 0, whole)
            return 0
        if asked != "auto":
            if asked == 0 and offload:
                raise JobError(
                    "CPU offload needs ZeRO",
                    at=self._at("parallel.cpu_offload"),
                    why="at ZeRO 0 the optimizer is a fused AdamW on the device, with nothing to move",
                    try_="--set parallel.zero=2 or --set parallel.cpu_offload=false",
                )
            return asked
        zero, why = self._choose_zero(world_size, offload)
        self._decide("parallel.zero", zero, why)
        return zero

    def _choose_zero(self, world_size: int, offload: bool) -> tuple[int, str]:
        width = 2 if self.job.precision == "bf16" else 4
        trained = self.facts.trainable(self.job.adapter)
        weights = self.facts.parameters * width
        bits = self._bits()
        if bits is not None:
            weights -= int(self.facts.layers * self.facts.layer_weights * (width - bits / 8))
        state = trained * (width + OPTIMIZER_BYTES)
        total = self.machine.gpu_memory_bytes if self.use_gpu else self.machine.cpu_memory_bytes
        memory = total if self.use_gpu else total // max(1, self.ranks)
        sums = (
            f"gradients and optimizer of {trained:,} trained weights take {_size(state)}, "
            f"all weights {_size(weights)}, a rank has {_size(memory)}"
        )
        if world_size == 1:
            return (2, "CPU offload needs a ZeRO optimizer") if offload else (0, "one rank has nobody to share with")
        inside = inner(self.job.adapter)
        if isinstance(inside, PEQA | L4Q | PV):
            return 0, f"{sums}: scales and steps of integers stay in fp32 where nothing is sharded"
        if bits is not None or (isinstance(inside, LoRA) and inside.init in STARTED):
            what = "quantized weights" if bits is not None else "a start that is not zero"
            sharded = offload or state > memory // 10
            return 2 if sharded else 0, f"{sums}: {what} goes no further than ZeRO-2"
        if weights > memory // 2:
            return 3, f"{sums}: the weights alone take more than half"
        if not offload and state <= memory // 10:
            return 0, f"{sums}: less than a tenth, not worth the traffic of sharding"
        if weights + state // world_size <= memory // 2:
            return 2, f"{sums}: weights and 1/{world_size} of the state take less than half"
        return 3, f"{sums}: weights and 1/{world_size} of the state take more than half"

    def _adapter(self) -> Any:
        adapter, inside = self.job.adapter, inner(self.job.adapter)
        if isinstance(inside, LoRA):
            check_lora(inside, zero=self.zero, at=self._at)
        if isinstance(adapter, S2A):
            check_s2a(self.job, self.facts, adapter, zero=self.zero, at=self._at)
        if isinstance(adapter, UniPT):
            check_unipt(self.job, self.facts, adapter, zero=self.zero, at=self._at)
            self._decide("memory.plan", "keep", "layers of the frozen model store nothing")
        if not isinstance(adapter, Reversible):
            return self._with_alpha(adapter, "adapter")
        if self.job.memory.plan == "keep":
            raise JobError(
                "reversible layers are not kept",
                at=self._at("memory.plan"),
                why="of a layer they store side bits and compute the rest back; autograd has no part in that",
                try_="--set memory.plan=solve, or another adapter",
            )
        check_streams(adapter, self._at)
        return adapter.model_copy(update={"inside": self._with_alpha(adapter.inside, "adapter.inside")})

    def _check_density(self) -> None:
        if self.job.density.weight and self.facts.experts > 1:
            raise JobError(
                "the density of experts is not penalised",
                at=self._at("density.weight"),
                why="transformers runs the experts of a layer as one operator, and what is inside cannot be reached",
                try_="--set density.weight=0",
            )

    def _bits(self) -> float | None:
        """Of a weight of the linear layers; None: as the precision has it."""
        inside = inner(self.job.adapter)
        if isinstance(inside, PEQA | PV):
            return inside.bits
        if isinstance(self.job.base, LQ):
            return self.job.base.bits
        if self.job.base.type == "int8":
            return 8.0
        return None if self.facts.stored_as is None and isinstance(self.job.base, Unquantized) else 4.5

    def _base(self) -> Any:
        """What the job says; of a quantized checkpoint, what it is."""
        base, stored = self.job.base, self.facts.stored_as
        if stored is not None and isinstance(base, Unquantized):
            base = NF4(double="double" in stored)
            self._decide("base.type", "nf4", "the checkpoint is quantized so")
        if isinstance(inner(self.job.adapter), PEQA | L4Q | PV):
            check_rounding(self.job, self.facts, base, zero=self.zero, sp=self.sp, at=self._at)
            return base
        check_prepared(self.job.base, self.job.adapter, stored, self._at)
        if isinstance(base, Unquantized):
            return base
        check_quantized(self.job, self.facts, base, zero=self.zero, at=self._at)
        return base

    def _with_alpha(self, adapter: Any, path: str) -> Any:
        if isinstance(adapter, LoRA) and adapter.alpha is None:
            divisor = math.sqrt(adapter.rank) if adapter.rslora else adapter.rank
            alpha, rank = 2.0 * divisor, f"rank {adapter.rank}"
            self._decide(f"{path}.alpha", alpha, f"2 x {'sqrt of ' * adapter.rslora}{rank}")
            return adapter.model_copy(update={"alpha": alpha})
        return adapter


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
