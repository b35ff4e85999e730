"""What a job may not ask of bases that are not in 16 bits."""

from __future__ import annotations

from farspan.errors import JobError
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import ModelFacts
from farspan.jobs.optimizers import At
from farspan.trainer.adapters.config import PV, FullFineTune, inner
from farspan.trainer.bases.config import Base, Unquantized


def check_quantized(job: SFTJob, facts: ModelFacts, base: Base, *, zero: int, at: At) -> None:
    """Refuse what does not go with quantized matrices under an adapter."""
    if isinstance(inner(job.adapter), FullFineTune):
        raise JobError(
            f"nothing would be trained on a base in {base.type}",
            at=at("base"),
            why="quantized weights stay as they are, and the job has no adapter inside its layers",
            try_="--set adapter.type=lora, or --set base=bf16",
        )
    if zero == 3:
        raise JobError(
            f"a base in {base.type} cannot be sharded",
            at=at("parallel.zero"),
            why="ZeRO-3 gathers parameters, and quantized weights are none; each rank holds them all",
            try_="--set parallel.zero=2, or --set base=bf16",
        )
    if facts.experts > 1:
        raise JobError(
            f"experts in {base.type} are not known here",
            at=at("base"),
            why="transformers holds the experts of a layer in one tensor, which is no linear layer",
            try_="--set base=bf16",
        )


def check_rounding(job: SFTJob, facts: ModelFacts, base: Base, *, zero: int, sp: int, at: At) -> None:
    """Refuse what does not go with adapters that round the matrices themselves."""
    inside = inner(job.adapter)
    what = type(inside).__name__
    if not isinstance(base, Unquantized):
        given = facts.stored_as is not None
        raise JobError(
            f"{what} does its own rounding, and the base is in {base.type} already",
            at=at("model" if given else "base"),
            why="its integers are made from 16 bits",
            try_="give the checkpoint in 16 bits" if given else "--set base=bf16",
        )
    if isinstance(inside, PV):
        _check_codes(job, zero=zero, sp=sp, at=at)
    if zero == 3 or (zero and job.precision == "bf16"):
        raise JobError(
            f"{what} does not go with ZeRO-{zero}",
            at=at("parallel.zero"),
            why="each rank rounds whole matrices, which ZeRO-3 cuts up"
            if zero == 3
            else "DeepSpeed makes every trained weight bf16; scales and steps of integers need fp32, and are few",
            try_="--set parallel.zero=0",
        )
    if facts.experts > 1:
        raise JobError(
            f"{what} does not round experts",
            at=at("adapter.type"),
            why="transformers holds the experts of a layer in one tensor, which is no linear layer",
            try_="--set adapter.type=lora",
        )


def _check_codes(job: SFTJob, *, zero: int, sp: int, at: At) -> None:
    """Of trained integers."""
    if zero:
        raise JobError(
            f"PV-Tuning does not go with ZeRO-{zero}",
            at=at("parallel.zero"),
            why="integers change where one gradient of a matrix is at hand; sharded engines cut it into buckets",
            try_="--set parallel.zero=0",
        )
    tile, rows = job.memory.mlp_tile, -(-job.data.context // sp)
    if tile != "off" and rows > tile:
        raise JobError(
            "PV-Tuning does not go with tiles of the MLP",
            at=at("memory.mlp_tile"),
            why=f"which integers change is chosen by the gradient of all {rows} rows, tiles have {tile} at a time",
            try_="--set memory.mlp_tile=off",
        )
