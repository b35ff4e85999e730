"""What a job may say about the pretrained weights. Neither torch nor ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from farspan.kernels.quantized.formats import FULL, SMALL, Format, every
from farspan.schema import Count, Schema


class Unquantized(Schema):
    """In the dtype of `precision`."""

    type: Literal["bf16"] = "bf16"


class Int8(Schema):
    """8-bit integers with a scale for each row, in the linear layers of the decoder layers."""

    type: Literal["int8"] = "int8"


class NF4(Schema):
    """4-bit NormalFloat in blocks of 64, in the linear layers of the decoder layers.

    Source: Dettmers et al., QLoRA, 2023. The format is bitsandbytes', whose 4-bit checkpoints open as models with this
    base.
    """

    type: Literal["nf4"] = "nf4"
    double: bool = True
    """Quantize the scales too: 4.127 bits a weight instead of 4.5."""


Bits = Literal[2, 3, 4, 8]


class Grid(Schema):
    """Formats a matrix may be stored in: all combinations of what is listed (`kernels.quantized.formats`)."""

    bits: tuple[Bits, ...] = Field(default=(2, 3, 4, 8), min_length=1)
    """Of a weight."""
    scale_bits: tuple[Bits, ...] = Field(default=(8,), min_length=1)
    """Of the scale of a block."""
    steps: tuple[Literal["bf16", "fp16", "fp32"], ...] = Field(default=("bf16",), min_length=1)
    """Dtype of what scales count in."""
    blocks: tuple[Literal[16, 32, 64], ...] = Field(default=(64,), min_length=1)
    """Weights that share a scale."""
    scales_blocks: tuple[Literal[16, 64, 256], ...] = Field(default=(256,), min_length=1)
    """Scales that share a step."""


class LQ(Schema):
    """NormalFloat in 2 to 8 bits, each matrix in bits of its own, chosen so that all together stay within `bits` and
    the sum of squared errors is the least; what is lost is taken up by the LoRA on it, which starts there.

    Made before training, matrix by matrix, as tasks over the cluster. Source: Guo et al., LQ-LoRA, 2023.
    """

    type: Literal["lq"] = "lq"
    bits: float = Field(default=2.75, gt=2, le=16)
    """Of a weight of the decoder layers' matrices, with all scales, on average; the adapter is not counted."""
    grid: Literal["small", "full"] | Grid = "small"
    """What each matrix chooses from: 16 formats, the paper's 432, or combinations of your own
    (`'base.grid={bits: [2, 3], blocks: [32, 64]}'`). Each takes a few decompositions of every matrix."""
    iterations: int = Field(default=5, ge=1)
    """Rounds of low-rank part and rounding at most; the best is kept."""
    fisher: Literal["none", "diagonal", "factored"] = "none"
    """Weight the error by squared gradients on some of the data: of each weight, or of its row times its column.
    Holds the model in 16 bits once, on one rank."""
    samples: int = Field(default=32, ge=1)
    """fisher: sequences whose gradient is taken."""
    sample_tokens: Count = Field(default=1024, ge=2)
    """fisher: of a sequence at most."""

    @property
    def formats(self) -> tuple[Format, ...]:
        grid = self.grid
        if isinstance(grid, Grid):
            return every(grid.bits, grid.scale_bits, grid.steps, grid.blocks, grid.scales_blocks)
        return FULL if grid == "full" else SMALL

    @property
    def uniform(self) -> Format:
        """One format for all matrices: the widest within the budget, or the narrowest."""
        within = [form for form in self.formats if form.bits_per_weight <= self.bits]
        if within:
            return max(within, key=lambda form: form.bits_per_weight)
        return min(self.formats, key=lambda form: form.bits_per_weight)


Base = Annotated[Unquantized | Int8 | NF4 | LQ, Field(discriminator="type")]
