"""`farspan plan`: will it fit, how long does a step take, and what is stored where. Needs neither model nor machine.

A resolved job, the shape of its model and the rates of a machine become one planning problem; the planner or a fixed
policy becomes a placement, and the same evaluation tells what both cost. `farspan run` executes that placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from farspan.errors import DoesNotFit, NoProfile
from farspan.jobs.adapter_checks import STARTED
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import ModelFacts
from farspan.jobs.optimizers import optimizer_shape
from farspan.memory.build import problem_for
from farspan.memory.calibration import Calibration, calibrated_problem, sources_of
from farspan.memory.config import Tiers, split_disk
from farspan.memory.evaluate import evaluate
from farspan.memory.hardware import Hardware
from farspan.memory.plan import Placement
from farspan.memory.policies import FixedPolicy, fixed_policy
from farspan.memory.prediction import Prediction
from farspan.memory.problem import Budgets, PlanProblem
from farspan.memory.profile import Source
from farspan.memory.shape import AdapterShape, CouplingShape, ModelShape, StoredAs, Training
from farspan.memory.solve import Alternative, Solution, longest, solve
from farspan.trainer.adapters.config import inner
from farspan.trainer.config import (
    AMAQ,
    L4Q,
    PEQA,
    PV,
    S2A,
    Base,
    LoRA,
    PaCA,
    Reversible,
    TrainSpec,
    UniPT,
    Unquantized,
)

WHOLE_MODULES: tuple[Literal["lm_head", "embed_tokens"], ...] = ("lm_head", "embed_tokens")
MLP_TILE = 2048
"""Rows of a tile of the MLP that are proposed where the job has none."""
LONGEST_STEP = 1024
"""`--longest` answers in multiples of so many tokens."""


@dataclass(frozen=True)
class Planned:
    """A job's memory plan and what it will cost."""

    policy: str
    hardware: Hardware
    problem: PlanProblem
    placement: Placement
    prediction: Prediction
    solution: Solution | None
    """None under a fixed policy."""
    calibration: Calibration | None = None
    """What was measured on this machine; None: planned with analytic figures alone."""
    batch: str = ""
    """Sizes of a step, in words."""
    tokens_per_step: int = 0
    """Of all ranks together; 0 where nobody asked."""
    activations: str = "autograd"
    """What layers keep of norms and gated units, as in `memory.activations`."""
    exchange_bits: float | None = None
    """Of a channel that crosses ranks in codes."""
    tiled_s: float | None = None
    """A step with `memory.mlp_tile` at `MLP_TILE`, where that would be quicker; worked out only where it is likely."""

    @property
    def next_best(self) -> Alternative | None:
        return self.solution.next_best if self.solution is not None else None

    @property
    def sources(self) -> dict[str, Source]:
        """Where each group of numbers comes from."""
        return sources_of(self.calibration, self.hardware)

    def tiers(self, job: SFTJob) -> Tiers | None:
        """What a rank reserves for the placement; None when nothing leaves the device."""
        moved = self.prediction.moved_bytes
        if not any(moved.values()):
            return None
        states = sum(state.bytes for state in self.problem.states if state.tier == "host")
        folder, _ = split_disk(job.memory.disk) if job.memory.disk else (None, 0)
        # a tensor takes whole pages, and there may be one for each of a layer's pieces on each tier
        pieces = 64 if self.placement.saved == "host" else 32
        pages = 4096 * pieces * len(self.problem.layers)
        return Tiers(
            host_bytes=self.prediction.host_bytes - states + pages,
            disk_dir=(folder or str(job.run_dir)) if self.prediction.disk_bytes else None,
            disk_bytes=self.prediction.disk_bytes + pages if self.prediction.disk_bytes else 0,
            slots=self.placement.slots,
        )


def plan(
    job: SFTJob, train: TrainSpec, facts: ModelFacts, hardware: Hardware, calibration: Calibration | None = None
) -> Planned:
    """The plan of a resolved job on `hardware`, with what was measured there, if anything was.

    Raises:
        DoesNotFit: no plan fits, or the fixed policy that was asked for does not.
    """
    problem = problem_of(job, train, facts, hardware, calibration)
    policy = job.policy
    if policy == "solve":
        solution = solved(problem)
        tiled_s = None
        if calibration is None and solution.placement.saved == "host" and train.memory.mlp_tile == "off":
            # a layer's working set is what is too large, and tiles make it smaller for less
            tiles = train.memory.model_copy(update={"mlp_tile": MLP_TILE})
            tiled = problem_of(job, train.model_copy(update={"memory": tiles}), facts, hardware)
            tiled_s = solved(tiled).prediction.step_s
            tiled_s = tiled_s if tiled_s < solution.prediction.step_s else None
        return Planned(
            policy,
            hardware,
            problem,
            solution.placement,
            solution.prediction,
            solution,
            calibration,
            activations=train.memory.activations,
            exchange_bits=training_of(train, facts).exchange_bits,
            tiled_s=tiled_s,
        )
    placement = fixed_policy(problem, policy)
    return Planned(
        policy,
        hardware,
        problem,
        placement,
        evaluate(problem, placement),
        None,
        calibration,
        activations=train.memory.activations,
        exchange_bits=training_of(train, facts).exchange_bits,
    )


def is_scarce(job: SFTJob, train: TrainSpec, facts: ModelFacts, hardware: Hardware) -> bool:
    """Whether memory is so scarce that exact figures can change the plan: what the policy (or keeping everything) would
    need, by the analytic profile, is more than half of what there is."""
    try:
        problem = problem_of(job, train, facts, hardware)
    except NoProfile:
        return True
    every: FixedPolicy = "recompute" if problem.reversible else "keep"
    policy = every if job.policy == "solve" else job.policy
    needed = evaluate(problem, fixed_policy(problem, policy))
    return 2 * needed.device_peak_bytes > problem.budgets.device_bytes or bool(needed.over_bytes)


@lru_cache(maxsize=8)
def solved(problem: PlanProblem) -> Solution:
    """`solve`, once for a problem: choosing a mesh and planning on it ask for the same one."""
    return solve(problem)


def require_fit(planned: Planned) -> None:
    """Refuse a fixed policy that breaks a budget."""
    over = planned.prediction.over_bytes
    if not over:
        return
    tier, excess = max(over.items(), key=lambda item: item[1])
    need = {"device": planned.prediction.device_peak_bytes, "host": planned.prediction.host_bytes}
    raise DoesNotFit(
        f"the policy {planned.policy} does not fit",
        at="memory.plan",
        why=f"{tier} needs {size(need.get(tier, planned.prediction.disk_bytes))}, {size(excess)} more than there is",
        try_="--set memory.plan=solve"
        if planned.placement.layers and planned.problem.kinds[0].linear
        else "a shorter data.context, or a higher parallel.sp",
    )


def longest_context(
    job: SFTJob, train: TrainSpec, facts: ModelFacts, hardware: Hardware, calibration: Calibration | None = None
) -> int:
    """The longest context that fits under the job's policy, in tokens."""

    def problem_at(context: int) -> PlanProblem:
        return problem_of(job, train, facts, hardware, calibration, context=context)

    if job.policy == "solve":
        return longest(problem_at, step_tokens=LONGEST_STEP, most_tokens=1 << 24)
    policy, fits, fails = job.policy, 0, (1 << 24) // LONGEST_STEP + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        problem = problem_at(middle * LONGEST_STEP)
        if evaluate(problem, fixed_policy(problem, policy)).fits:
            fits = middle
        else:
            fails = middle
    return fits * LONGEST_STEP


def problem_of(
    job: SFTJob,
    train: TrainSpec,
    facts: ModelFacts,
    hardware: Hardware,
    calibration: Calibration | None = None,
    *,
    context: int | None = None,
) -> PlanProblem:
    """The planning problem of one rank."""
    shape, training, rows = shape_of(facts), training_of(train, facts), context or train.data.context
    budgets = budgets_of(job, hardware)
    if calibration is None:
        return problem_for(shape, training, hardware, rows, budgets=budgets)
    return calibrated_problem(calibration, shape, training, hardware, rows, budgets=budgets)


def budgets_of(job: SFTJob, hardware: Hardware) -> Budgets:
    """What the job allows of what the machine has."""
    memory, whole = job.memory, hardware.budgets()
    return Budgets(
        device_bytes=whole.device_bytes if memory.device == "auto" else memory.device,
        host_bytes=whole.host_bytes if memory.host == "auto" else memory.host,
        disk_bytes=split_disk(memory.disk)[1] if memory.disk else 0,
    )


def shape_of(facts: ModelFacts) -> ModelShape:
    return ModelShape(
        hidden=facts.hidden,
        layers=facts.layers,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        ffn=facts.ffn,
        vocab=facts.vocab,
        tied=facts.tied,
        forms=tuple(facts.form(layer) for layer in range(facts.layers)),
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmo2": "whole"}.get(facts.family, "none"),  # type: ignore[arg-type]
        norm_after=facts.family == "olmo2",
        norm_scale_fp32=facts.family == "olmo2",
        fused=facts.family == "phi3",
    )


def stored_as(base: Base) -> StoredAs:
    """What of a base its bytes depend on."""
    return StoredAs.model_validate(base.model_dump(include=set(StoredAs.model_fields)))


def adapter_shape(inside: object, facts: ModelFacts) -> AdapterShape | None:
    """What of an adapter its bytes and seconds depend on; None: every weight is trained.

    Args:
        inside: the adapter, or what is inside reversible layers.
    """
    if isinstance(inside, UniPT):
        rank = facts.hidden // inside.reduction
        return AdapterShape(kind="network", rank=rank, targets=(), stores_inputs=inside.store == "inputs")
    if not isinstance(inside, PEQA | S2A | PV | L4Q | PaCA | LoRA):
        return None
    asked = () if isinstance(inside, S2A) and not inside.bias else inside.target_modules
    targets = None if isinstance(asked, str) else tuple(name.split(".")[-1] for name in asked)
    if isinstance(inside, PEQA):
        return AdapterShape(kind="scales", rank=1, group=inside.group, targets=targets, precision="fp32")
    if isinstance(inside, S2A):
        return AdapterShape(kind="biases", rank=1, targets=targets, prompt=inside.prompt, side=inside.side)
    if isinstance(inside, PV):
        return AdapterShape(
            kind="codes", rank=1, group=inside.group, share=inside.share, targets=targets, precision="fp32"
        )
    if isinstance(inside, L4Q):
        return AdapterShape(kind="learned", rank=inside.rank, group=inside.group, targets=targets, precision="fp32")
    if isinstance(inside, PaCA):
        return AdapterShape(kind="columns", rank=inside.rank, targets=targets)
    return AdapterShape(
        rank=inside.rank,
        targets=targets,
        dropout=inside.dropout > 0,
        dora=inside.dora,
        keep_rows=inside.keep_rows,
        start=inside.init in STARTED,
        whole=tuple(n for n in WHOLE_MODULES if n in inside.modules_to_save),
    )


def training_of(train: TrainSpec, facts: ModelFacts) -> Training:
    """What of a job the bytes and seconds of a step depend on."""
    coupling, inside = None, inner(train.adapter)
    stored = None if isinstance(train.base, Unquantized) else stored_as(train.base)
    if isinstance(inside, PEQA | PV):
        stored = StoredAs(type="integers", bits=inside.bits, group=inside.group)
    if isinstance(train.adapter, Reversible):
        given = train.adapter
        coupling = CouplingShape(
            wiring=given.wiring,
            bits=given.bits,
            form=given.form,
            anchor_every=given.anchors_planned(train.precision),
            width=given.width,
            store=given.store,
        )
    tile, rows = train.memory.mlp_tile, -(-train.data.context // train.mesh.sp)
    return Training(
        precision=train.precision,
        adapter=adapter_shape(inside, facts),
        coupling=coupling,
        base=stored,
        zero=train.zero,
        cpu_offload=train.cpu_offload,
        dp=train.mesh.dp,
        sp=train.mesh.sp,
        loss_tile=train.memory.loss_tile,
        mlp_tile=None if tile == "off" or rows <= tile else tile,  # rows of one tile run untiled
        micro_batches=train.accumulation,
        activations=train.memory.activations,
        tier_codec=train.memory.tier_codec,
        optimizer=optimizer_shape(train.optim),
        exchange_bits=train.exchange.bits if isinstance(train.exchange, AMAQ) else None,
        density=train.density.weight > 0,
    )


def size(size_bytes: float) -> str:
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if abs(size_bytes) >= step:
            return f"{size_bytes / step:.1f} {unit}"
    return f"{size_bytes / 1024:.0f} KiB" if size_bytes else "0"
