"""What an optimizer does not go with, and what of it the planner has to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from farspan.errors import JobError
from farspan.jobs.config import SFTJob
from farspan.memory.shape import OptimizerShape
from farspan.trainer.adapters.config import inner
from farspan.trainer.config import L4Q, LAMB, PEQA, PV, DCTAdamW, FullFineTune, LoRA, Muon, PaCA
from farspan.trainer.optimizers.config import LowRank, Optimizer

At = Callable[[str], str]
"""Where a value of the job was written."""

FEEDBACK_BITS: dict[str, Any] = {"none": 0, "8bit": 8, "4bit": 4}


def optimizer_shape(optim: Optimizer) -> OptimizerShape:
    """What of it bytes and seconds depend on."""
    return OptimizerShape(
        type=optim.type,
        rank=optim.rank if isinstance(optim, LowRank) else 0,
        every=optim.every if isinstance(optim, LowRank) else 1,
        feedback_bits=FEEDBACK_BITS[optim.feedback] if isinstance(optim, DCTAdamW) else 0,
        iterations=optim.ns_steps if isinstance(optim, Muon) else 0,
        in_backward=optim.in_backward,
    )


def only_zero_0(optim: Optimizer) -> str | None:
    """Why this optimizer runs at ZeRO 0 alone; None: it runs at every stage."""
    if optim.type != "adamw":
        return f"{optim.type} keeps state of whole parameters, each on one rank; ZeRO cuts them at any element"
    if optim.in_backward:
        return "weights are updated while backward runs; DeepSpeed steps when all gradients are there"
    return None


def check_zero_0(job: SFTJob, why: str, at: At) -> None:
    """Refuse sharding to an optimizer that runs at ZeRO 0 alone.

    Raises:
        JobError: a higher stage is asked for, or offload, which needs one.
    """
    optim, parallel = job.optim, job.parallel
    name = "an optimizer in backward" if optim.type == "adamw" else optim.type
    other = "optim.in_backward=false" if optim.type == "adamw" else "optim.type=adamw"
    if parallel.cpu_offload:
        raise JobError(
            f"{name} does not run on the host",
            at=at("parallel.cpu_offload"),
            why=f"CPU offload is a part of ZeRO, and {why}",
            try_=f"--set parallel.cpu_offload=false, or --set {other}",
        )
    if parallel.zero not in ("auto", 0):
        raise JobError(
            f"{name} does not go with ZeRO-{parallel.zero}",
            at=at("parallel.zero"),
            why=why,
            try_=f"--set parallel.zero=0, or --set {other}",
        )


def check_optimizer(job: SFTJob, hidden: int, accumulation: int, at: At) -> None:
    """Refuse settings that contradict each other.

    Args:
        hidden: width of the model.
        accumulation: micro-batches of a step in a dp group.

    Raises:
        JobError: an optimizer in backward with clipping or several micro-batches; an optimizer of matrices where none
        is
            trained; a subspace as wide as the matrices; bounds the wrong way round.
    """
    optim, inside = job.optim, inner(job.adapter)
    if optim.in_backward and optim.clip_norm is not None:
        raise JobError(
            "an optimizer in backward cannot clip",
            at=at("optim.clip_norm"),
            why="the norm of all gradients is known when the last one is there; by then the weights are updated",
            try_="--set optim.clip_norm=null, or --set optim.in_backward=false",
        )
    if optim.in_backward and accumulation > 1:
        raise JobError(
            f"an optimizer in backward cannot add up {accumulation} micro-batches",
            at=at("optim.in_backward"),
            why="the first one's gradients would be used and gone before the second one's are there",
            try_="--set optim.tokens_per_step=auto, or --set optim.in_backward=false",
        )
    if optim.in_backward and isinstance(inside, PV):
        raise JobError(
            "PV-Tuning does not go with an optimizer in backward",
            at=at("optim.in_backward"),
            why="in a step that changes integers the scales rest, which is known when all gradients are there",
            try_="--set optim.in_backward=false",
        )
    if isinstance(optim, Muon | LowRank) and isinstance(inside, PEQA | PV):
        raise JobError(
            f"{optim.type} has no matrices to step",
            at=at("optim.type"),
            why=f"{type(inside).__name__} trains scales of rows",
            try_="--set optim.type=adamw",
        )
    narrow = inside.rank if isinstance(inside, LoRA | PaCA | L4Q) else hidden
    if isinstance(optim, LowRank) and optim.rank >= narrow:
        what = "the model is" if isinstance(inside, FullFineTune) else "the adapter's matrices are"
        raise JobError(
            f"a subspace of {optim.rank} is no smaller than the matrices",
            at=at("optim.rank"),
            why=f"{what} {narrow} wide, so every moment would be as large as AdamW's",
            try_=f"--set optim.rank={max(1, narrow // 4)}, or --set optim.type=adamw",
        )
    if isinstance(optim, LAMB) and optim.trust_min > optim.trust_max:
        raise JobError(
            "the trust ratio has bounds the wrong way round",
            at=at("optim.trust_min"),
            why=f"trust_min {optim.trust_min} is above trust_max {optim.trust_max}",
            try_=f"--set optim.trust_min={optim.trust_max} --set optim.trust_max={optim.trust_min}",
        )
