"""Which jobs may have their base rounded before training, together with where the adapter starts."""

from __future__ import annotations

from collections.abc import Callable

from farspan.errors import JobError
from farspan.trainer.adapters.config import inner
from farspan.trainer.config import LQ, PREPARED_INITS, Adapter, Base, FullFineTune, LoRA, Unquantized


def check_prepared(base: Base, adapter: Adapter, stored_as: str | None, at: Callable[[str], str]) -> None:
    """Refuse what has no meaning.

    Args:
        stored_as: how the checkpoint is quantized already; None: in 16 bits.
        at: a path of the job with where it was set.

    Raises:
        JobError: such a job.
    """
    inside = inner(adapter)
    init = inside.init if isinstance(inside, LoRA) else None
    path = "adapter" if inside is adapter else "adapter.inside"
    if not isinstance(base, LQ) and init not in PREPARED_INITS:
        return
    if stored_as is not None:
        what = "base=lq" if isinstance(base, LQ) else f"an adapter that starts at {init}"
        raise JobError(
            f"{what} does its own rounding, and the checkpoint is in {stored_as} already",
            at=at("model"),
            why="the matrices are decomposed from 16 bits",
            try_=f"give the checkpoint in 16 bits, or --set base=bf16 --set {path}.init=default",
        )
    if isinstance(inside, LoRA) and inside.dora:
        raise JobError(
            "DoRA does not start where rounding left off",
            at=at(f"{path}.dora"),
            why="its lengths of rows are those of the base's weights, to which B A must add nothing at first",
            try_=f"--set {path}.dora=false",
        )
    if isinstance(base, LQ):
        _check_lq(base, inside, path, at)
    elif isinstance(base, Unquantized):
        raise JobError(
            f"an adapter has nothing to start from at {init}",
            at=at(f"{path}.init"),
            why="it starts at what rounding lost, and the base is not rounded",
            try_=f"--set base=nf4, or --set {path}.init=default",
        )


def _check_lq(base: LQ, inside: Adapter, path: str, at: Callable[[str], str]) -> None:
    if isinstance(inside, FullFineTune):
        return  # refused for every quantized base
    if not isinstance(inside, LoRA):
        raise JobError(
            f"base=lq does not go with adapter.type={inside.type}",
            at=at("base"),
            why="it is one half of a decomposition whose other half is a LoRA",
            try_=f"--set {path}.type=lora, or --set base=nf4",
        )
    if inside.init not in ("default", "apiq"):
        raise JobError(
            f"on base=lq an adapter does not start at {inside.init}",
            at=at(f"{path}.init"),
            why="it starts at the low-rank half of the decomposition that the base is the other half of",
            try_=f"--set {path}.init=default, or --set base=nf4",
        )
    least = min(form.bits_per_weight for form in base.formats)
    if base.bits < least:
        raise JobError(
            f"no matrix can be stored in {base.bits:g} bits a weight",
            at=at("base.bits"),
            why=f"the narrowest format of base.grid takes {least:.4f}",
            try_=f"--set base.bits={least + 0.01:.2f}, or narrower formats in base.grid",
        )
