"""NormalFloat: codes at the quantiles of a normal distribution, with a scale for each block of elements.

Source: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314. A block's scale is its largest magnitude; these
scales are quantized themselves (double quantization): their mean is taken off, and blocks of them are stored in 8 bits
of a table whose steps grow with the magnitude. Layout and tables of 4 bits are those of bitsandbytes, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from farspan.kernels.quantized import chunk

OFFSET = 0.9677083
"""The outermost quantile, so that 4 bits have no code at infinity."""
SCALES_BLOCK = 256
"""Scales that share a scale."""


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The table as it is stored in checkpoints; the formula's differs from it in the last bit."""


@lru_cache(maxsize=8)
def normal_float_table(bits: int) -> Tensor:
    """The 2^bits values, ascending, from -1 to 1 with an exact zero. fp32."""
    return torch.tensor(NF4) if bits == 4 else quantile_table(bits)


def quantile_table(bits: int) -> Tensor:
    """The same by the formula."""
    positive, negative = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, positive + 1, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, negative + 1, dtype=torch.float64))[:-1]
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values.float()
    return values / values.max()


@lru_cache(maxsize=1)
def dynamic_table() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type, ascending. fp32."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the table's value next to each element. uint8."""
    table = table.to(x.device)
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2).to(torch.uint8)


@dataclass
class NormalFloat4:
    """A matrix in 4 bits.

    Attributes:
        packed: uint8 [n / 2], the first of two elements in the high half.
        scales: fp32 [n / block], or uint8 codes of them if doubly quantized.
        scales_scale: fp32 [blocks / 256]; None: scales are as they are.
        mean: fp32 [], taken off the scales.
    """

    packed: Tensor
    scales: Tensor
    scales_scale: Tensor | None
    mean: Tensor | None
    block: int

    def scale_of_blocks(self) -> Tensor:
        """fp32 [n / block]."""
        if self.scales_scale is None or self.mean is None:
            return self.scales
        values = dynamic_table().to(self.scales.device)[self.scales.long()]
        return values * self.scales_scale.repeat_interleave(SCALES_BLOCK)[: values.numel()] + self.mean

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The matrix, rounded to `dtype`."""
        if self.packed.is_cuda and find_spec("bitsandbytes") is not None:
            return self.by_bitsandbytes(shape, dtype)
        table = normal_float_table(4).to(self.packed.device)
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], -1)  # of each byte
        out = torch.empty(self.packed.numel() * 2, dtype=dtype, device=self.packed.device)
        scales, step = self.scale_of_blocks(), max(1, chunk(out) // self.block)
        for first in range(0, scales.numel(), step):
            some = scales[first : first + step, None]
            codes = self.packed[first * self.block // 2 :][: some.numel() * self.block // 2]
            blocks = pairs.index_select(0, codes.int()).view(-1, self.block).mul_(some)
            out[first * self.block :][: blocks.numel()].view_as(blocks).copy_(blocks)
        return out.view(shape)

    def by_bitsandbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The same by its kernel, for the block sizes that it has."""
        from bitsandbytes import functional

        device, nested = self.packed.device, None
        if self.scales_scale is not None:
            table = dynamic_table().to(device)
            nested = functional.QuantState(self.scales_scale, blocksize=SCALES_BLOCK, code=table, dtype=torch.float32)
        state = functional.QuantState(
            self.scales,
            shape=torch.Size(shape),
            code=normal_float_table(4).to(device),
            blocksize=self.block,
            quant_type="nf4",
            dtype=dtype,
            offset=self.mean,
            state2=nested,
        )
        made: Tensor = functional.dequantize_4bit(self.packed.view(-1, 1), state)
        return made


def quantize_nf4(weight: Tensor, *, block: int = 64, double: bool = True, clip: Tensor | None = None) -> NormalFloat4:
    """Round a matrix to 4 bits.

    Args:
        weight: floating point, its number of elements a multiple of `block`.
        block: elements that share a scale.
        double: whether scales are quantized too.
        clip: [rows], a block's scale is its largest magnitude times this, of the row it begins in. None: 1.
    """
    blocks = weight.detach().float().reshape(-1, block)
    scales = blocks.abs().amax(1)
    if clip is not None:
        begins = torch.arange(0, weight.numel(), block, device=scales.device)
        scales = scales * clip[begins // weight.shape[1]]
    codes = nearest(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None], normal_float_table(4))
    codes = codes.view(-1, 2)
    packed = (codes[:, 0] << 4) | codes[:, 1]
    if not double:
        return NormalFloat4(packed, scales, None, None, block)
    mean = scales.mean()
    centred = torch.nn.functional.pad(scales - mean, (0, -scales.numel() % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    largest = centred.abs().amax(1)
    of_scales = nearest(centred / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None], dynamic_table())
    return NormalFloat4(packed, of_scales.view(-1)[: scales.numel()].contiguous(), largest, mean, block)
