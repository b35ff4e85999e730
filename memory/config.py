"""What a user may say about memory, and what a rank is told of its tiers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from farspan.memory.plan import Policy, TierCodec
from farspan.schema import Bytes, Count, Schema, parse_bytes


def split_disk(value: str) -> tuple[str | None, int]:
    """`"/nvme:2TiB"` -> ("/nvme", bytes); a size alone has no folder."""
    folder, _, size = value.rpartition(":")
    size_bytes = parse_bytes(size)
    if not isinstance(size_bytes, int):
        raise ValueError(f"{value!r} is not a folder and a size; write /nvme:2TiB, or 2TiB alone")
    return folder or None, size_bytes


def _whole(value: str) -> str:
    split_disk(value)
    return value


Disk = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value), AfterValidator(_whole)
]


class Tiles(Schema):
    """Rows of wide tensors that exist at one time, and who computes them. Part of the mathematics: sums are grouped by
    tile, and no two kernels agree in the last bit."""

    loss_tile: Count = Field(default=2048, ge=16)
    """Rows of logits that exist at one time; the whole logits matrix is never made."""

    mlp_tile: Count | Literal["off"] = "off"
    """Rows of the MLP that exist at one time in forward and backward; the MLP then runs twice."""

    activations: Literal["autograd", "fused", "fp8", "int4"] = "autograd"
    """What norms, gated units and linear layers keep for their backward. `autograd`: what transformers' operators do;
    `fused`: what the gradient needs, the rest made again. `fp8` and `int4` keep it in 8 or 4 bits: gradients are then
    approximate, by as much as the plan says. Attention keeps its tensors."""

    tier_codec: TierCodec = "exact"
    """What rows that a plan sends to host memory or disk are there: `exact`, or `fp8` or `int4` codes, of about half
    and a quarter of the bytes of bf16, a quarter and an eighth of those of fp32. The loss of given weights keeps its
    bits; gradients are then approximate, by as much as the plan says. What stays on the device is exact."""

    attention: Literal["fastest", "cpu", "flash", "flash3", "flash4", "flash-attn", "cudnn", "efficient"] = "fastest"
    """The attention kernel. `fastest`: of those that run the model, measured when a run starts. `flash` is
    torch's own, `flash3` and `flash4` are those packages called through torch, `flash-attn` is that package."""


class MemoryBudget(Tiles):
    """What a rank may use for a step, and who decides what goes where."""

    plan: Policy = "solve"
    """`solve`: the planner decides. Otherwise a fixed policy: `keep` what autograd saves; `recompute` every layer from
    its input; `offload-inputs` does so from host memory; `memo` and `ssdtrain` follow those papers."""

    device: Bytes | Literal["auto"] = "auto"
    """Device memory of a rank, model states included. `auto`: what the device has."""

    host: Bytes | Literal["auto"] = "auto"
    """Host memory of a rank for what is offloaded. `auto`: a GPU's share of the machine's; none on CPU."""

    disk: Disk | None = None
    """Folder and size of a rank's disk tier (`/nvme:2TiB`); a size alone puts it into the run folder. null: none."""

    profile: Literal["auto", "measured", "analytic"] = "auto"
    """What layers cost: `measured` on this machine, one layer of each kind (kept for later runs); `analytic` from the
    model's shape and the rates of `hardware`. `auto`: measured once it has been, or when memory is scarce."""

    addresses: Literal["torch", "planned"] = "torch"
    """Who gives device memory out: torch's allocator, or, on a GPU, one that packs a recorded step's blocks beforehand
    (experimental; needs a C++ compiler)."""

    hardware: str = "auto"
    """What to plan for: `auto` this machine, `h200`, `h100-80`, `a100-80`, `rtx4090`, `cpu`, or a JSON file."""


class Tiers(Schema):
    """Where a rank's offloaded tensors live."""

    host_bytes: int = Field(ge=0)
    """Arena reserved at start."""
    disk_dir: str | None = None
    disk_bytes: int = Field(default=0, ge=0)
    slots: int = Field(default=2, ge=1)
