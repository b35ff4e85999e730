"""What a matrix in NormalFloat with two levels of scales is made of, and the sets of such formats. Without torch.

Source: Guo et al., LQ-LoRA, 2023, https://arxiv.org/abs/2311.12023: values in b bits, scales of blocks of B0 values in
b0 bits, and a step in b1 bits for each B1 of these scales: b + b0 / B0 + b1 / (B0 B1) bits a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

STEP_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
OFFSET_BYTES = 4
"""The smallest scale of a matrix, which the others count from."""


class Format(NamedTuple):
    """How a matrix is stored."""

    bits: int
    """Of a value: 2, 3, 4 or 8."""
    scale_bits: int
    """Of a block's scale: 2, 3, 4 or 8."""
    step: str
    """Dtype of what a scale counts in: bf16, fp16 or fp32."""
    block: int
    """Values that share a scale, a multiple of 8."""
    scales_block: int
    """Scales that share a step, a multiple of 8."""

    def bytes(self, count: int) -> int:
        """Of a matrix with `count` elements, to the byte: whole blocks of values, scales in eights."""
        blocks = -(-count // self.block)
        scales = -(-blocks // 8) * self.scale_bits
        steps = -(-blocks // self.scales_block) * STEP_BITS[self.step] // 8
        return blocks * self.block * self.bits // 8 + scales + steps + OFFSET_BYTES

    @property
    def bits_per_weight(self) -> float:
        """Of a matrix that is whole blocks, without its offset."""
        return self.bits + self.scale_bits / self.block + STEP_BITS[self.step] / (self.block * self.scales_block)

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def named(name: str) -> Format:
    """The reverse of `Format.name`."""
    bits, scale_bits, step, block, scales_block = name.split("-")
    return Format(int(bits), int(scale_bits), step, int(block), int(scales_block))


def every(
    bits: Sequence[int],
    scale_bits: Sequence[int],
    steps: Sequence[str],
    blocks: Sequence[int],
    scales_blocks: Sequence[int],
) -> tuple[Format, ...]:
    """All combinations."""
    return tuple(Format(*each) for each in product(bits, scale_bits, steps, blocks, scales_blocks))


FULL = every((2, 3, 4, 8), (2, 3, 4, 8), ("bf16", "fp16", "fp32"), (16, 32, 64), (16, 64, 256))
"""The paper's 432."""
SMALL = tuple(
    Format(bits, scale_bits, "bf16", block, 256)
    for bits in (2, 3, 4, 8)
    for scale_bits, block in ((4, 64), (8, 64), (8, 32), (8, 16))
)
"""16 of them, 2.06 to 8.5 bits: what others add is the same bits in another way."""
