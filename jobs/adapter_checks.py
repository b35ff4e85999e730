"""What LoRA's starts, S2A's parts, UniPT's network and reversible streams do not go with."""

from __future__ import annotations

import math

from farspan.errors import JobError
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import ModelFacts
from farspan.jobs.optimizers import At
from farspan.memory.amplification import STREAM_ROUNDING, most_layers
from farspan.trainer.config import S2A, LoRA, Reversible, UniPT

STARTED = ("pissa", "olora", "lora_ga")
"""Initialisations of LoRA that are not zero."""


def check_lora(adapter: LoRA, *, zero: int, at: At) -> None:
    """Refuse starts and samples that LoRA does not have everywhere."""
    if adapter.init in STARTED and zero == 3:
        raise JobError(
            f"an adapter that starts at {adapter.init} does not go with ZeRO-3",
            at=at("adapter.init"),
            why="the frozen pair that takes the start off is no parameter, and peft's own forward runs there",
            try_="--set parallel.zero=2, or --set adapter.init=default",
        )
    if adapter.dora and adapter.init not in ("default", "gaussian"):
        raise JobError(
            f"DoRA does not start at {adapter.init}",
            at=at("adapter.init"),
            why="its lengths of rows are those of the pretrained weights, to which B A must add nothing at first",
            try_="--set adapter.init=default",
        )
    if adapter.keep_rows < 1 and (zero == 3 or adapter.dora):
        raise JobError(
            "a share of the rows needs LoRA layers of one node",
            at=at("adapter.keep_rows"),
            why="under ZeRO-3 and with DoRA peft's own forward runs, which stores every row",
            try_="--set adapter.keep_rows=1, or --set parallel.zero=2",
        )


def check_s2a(job: SFTJob, facts: ModelFacts, adapter: S2A, *, zero: int, at: At) -> None:
    """Refuse parts that are none, or that do not fit the model or the engine.

    Raises:
        JobError: so it is.
    """
    if not (adapter.bias or adapter.prompt or adapter.side):
        raise JobError(
            "nothing would be trained",
            at=at("adapter.bias"),
            why="the job has neither biases nor a prompt nor side modules",
            try_="--set adapter.bias=true, or --set adapter.prompt=16",
        )
    if (adapter.prompt or adapter.side) and zero == 3:
        raise JobError(
            "a prompt and side modules do not go with ZeRO-3",
            at=at("parallel.zero"),
            why="they are read outside of the linear layers whose weights it gathers",
            try_="--set parallel.zero=2, or biases alone",
        )
    if adapter.side and facts.hidden % adapter.side:
        raise JobError(
            f"side modules of width {adapter.side} do not fit a hidden size of {facts.hidden}",
            at=at("adapter.side"),
            why=f"channels are pooled in even groups: {facts.hidden} / {adapter.side} = "
            f"{facts.hidden / adapter.side:.4g}",
            try_=f"--set adapter.side={math.gcd(adapter.side, facts.hidden)}",
        )
    rows = job.data.context + adapter.prompt
    windows = [w for w in facts.windows if w is not None and w < rows]
    if adapter.prompt and (windows or facts.linear_layers):
        what = f"a window of {windows[0]} rows" if windows else "a recurrence"
        raise JobError(
            "a prompt needs layers that see the whole context",
            at=at("adapter.prompt"),
            why=f"{what} does not reach back over {job.data.context} + {adapter.prompt} rows; "
            "peft would hide the prompt there",
            try_="--set adapter.prompt=0, or a shorter data.context",
        )


def check_unipt(job: SFTJob, facts: ModelFacts, adapter: UniPT, *, zero: int, at: At) -> None:
    """Refuse a network that does not fit the model, the engine or the plan.

    Raises:
        JobError: so it is.
    """
    hidden, layers, memory = facts.hidden, facts.layers, job.memory
    if hidden % adapter.reduction or layers < 2:
        raise JobError(
            f"a side network of 1/{adapter.reduction} does not fit the model",
            at=at("adapter.reduction"),
            why=f"hidden size {hidden} / {adapter.reduction} = {hidden / adapter.reduction:.4g}; of {layers} "
            "layers the last is the anchor of the others",
            try_=f"--set adapter.reduction={math.gcd(adapter.reduction, hidden)}, on two layers or more",
        )
    if zero == 3:
        raise JobError(
            "a side network does not go with ZeRO-3",
            at=at("parallel.zero"),
            why="it runs the frozen model a second time inside one node, where weights are not gathered again",
            try_="--set parallel.zero=2, or --set base=nf4 for a model that is too large",
        )
    if facts.must_be_measured:
        raise JobError(
            "a side network is not planned for such a model",
            at=at("adapter.type"),
            why="its plan is counted, and layers with experts or a recurrence have to be measured",
            try_="--set adapter.type=lora",
        )
    if job.density.weight:
        raise JobError(
            "a side network does not change the model's activations",
            at=at("density.weight"),
            why="no gradient passes through the frozen model, so that a penalty on them would do nothing",
            try_="--set density.weight=0, or --set adapter.type=lora",
        )
    for path, given, allowed in (
        ("memory.plan", memory.plan, ("solve", "keep")),
        ("memory.profile", memory.profile, ("auto", "analytic")),
    ):
        if given not in allowed:
            raise JobError(
                f"{path}={given} does not go with a side network",
                at=at(path),
                why="layers of the frozen model store nothing that a plan could place, and are counted",
                try_=f"--set {path}={allowed[0]}",
            )


def check_streams(adapter: Reversible, at: At) -> None:
    """Refuse what the other form of reversible streams would read, and anchors too far apart.

    Raises:
        JobError: so it is.
    """
    other = {"exact": ("factors", "anchor_every", "tolerance"), "float": ("bits", "fraction_bits")}[adapter.form]
    for name in other:
        default = Reversible.model_fields[name].default
        if getattr(adapter, name) != default:
            needed = "exact" if adapter.form == "float" else "float"
            raise JobError(
                f"adapter.{name} is not read with adapter.form={adapter.form}",
                at=at(f"adapter.{name}"),
                why="side bits belong to integer streams, factors and anchors to those in floating point",
                try_=f"--set adapter.form={needed}, or leave adapter.{name} at {default}",
            )
    if adapter.form == "exact" or adapter.store == "inputs" or adapter.least_error <= adapter.tolerance:
        return
    every = adapter.anchor_every
    fitting = max(1, most_layers(adapter.kappa, adapter.tolerance))
    raise JobError(
        f"streams cannot be computed back over {every} layers",
        at=at("adapter.anchor_every"),
        why=f"a layer multiplies their error by {adapter.kappa:.3g}: {STREAM_ROUNDING:.2g} x {adapter.kappa:.3g}^"
        f"{every} = {adapter.least_error:.2g}, and adapter.tolerance is {adapter.tolerance:g}",
        try_=f"--set adapter.anchor_every={fitting}, or --set adapter.form=exact",
    )
