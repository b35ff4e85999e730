"""NormalFloat in 2, 3, 4 or 8 bits whose scales are integers of a few bits: see `formats` for the layout's sizes.

The scale of a block of B0 values is offset + code x step: the offset is the smallest scale of the matrix, a step is
shared by B1 scales and reaches from there to the largest of them. Codes of values are the nearest ones given the scales
as they are stored, not as they were before they were rounded.

Source: Guo et al., LQ-LoRA, 2023, https://arxiv.org/abs/2311.12023. Torch only; every operation runs on a GPU too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.quantized import chunk
from farspan.kernels.quantized.formats import Format
from farspan.kernels.quantized.integers import pack, unpack
from farspan.kernels.quantized.normal_float import nearest, normal_float_table

STEP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n] below 2^bits, n a multiple of 8, as uint8 [n bits / 8].

    8 bits as they are; 4 and 2 with the first element in the highest bits; 3 as in `integers.pack`.
    """
    if bits == 8:
        return codes.contiguous()
    if bits == 3:
        return pack(codes.view(1, -1), 3).view(-1)
    per_byte = 8 // bits
    groups = codes.view(-1, per_byte)
    out = groups[:, 0].clone()
    for j in range(1, per_byte):
        out = (out << bits) | groups[:, j]
    return out


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack_codes`: uint8 [n]."""
    if bits == 8:
        return packed
    if bits == 3:
        return unpack(packed.view(1, -1), 3).view(-1)
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & (2**bits - 1)).view(-1)


@lru_cache(maxsize=4)
def _values_of_bytes(bits: int) -> Tensor:
    """fp32 [256, 8 / bits]: what a byte of codes stands for."""
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8), bits)
    return normal_float_table(bits)[codes.long()].view(256, -1)


@dataclass
class TwoLevel:
    """A matrix of n elements, padded to whole blocks.

    Attributes:
        codes: uint8 [blocks B0 b / 8].
        scale_codes: uint8 [blocks b0 / 8], blocks rounded up to a multiple of 8.
        steps: [blocks / B1] in the format's dtype.
        offset: fp32 [].
    """

    codes: Tensor
    scale_codes: Tensor
    steps: Tensor
    offset: Tensor
    format: Format

    def scale_of_blocks(self) -> Tensor:
        """fp32 [blocks]."""
        form = self.format
        blocks = self.codes.numel() * 8 // form.bits // form.block
        codes = unpack_codes(self.scale_codes, form.scale_bits)[:blocks]
        steps = self.steps.float().repeat_interleave(form.scales_block)[:blocks]
        return codes * steps + self.offset

    def values(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix, each product in fp32 and rounded once to `dtype`."""
        bits, block = self.format.bits, self.format.block
        scales = self.scale_of_blocks()
        out = torch.empty(scales.numel() * block, dtype=dtype, device=self.codes.device)
        step = max(1, chunk(out) // block)
        table = (normal_float_table(3) if bits == 3 else _values_of_bytes(bits)).to(out.device)
        for first in range(0, scales.numel(), step):
            some = scales[first : first + step, None]
            held = self.codes[first * block * bits // 8 :][: some.numel() * block * bits // 8]
            codes = unpack_codes(held, 3) if bits == 3 else held
            blocks = table.index_select(0, codes.int()).view(-1, block).mul_(some)
            out[first * block :][: blocks.numel()].view_as(blocks).copy_(blocks)
        return out[: shape[0] * shape[1]].view(shape)


def quantize_two_level(weight: Tensor, form: Format, clip: Tensor | None = None) -> TwoLevel:
    """Round a matrix.

    Args:
        weight: floating point, of any shape.
        clip: [rows], a block's scale is its largest magnitude times this, of the row it begins in. None: 1.
    """
    wide = weight.detach().float()
    flat = wide.reshape(-1)
    blocks = functional.pad(flat, (0, -flat.numel() % form.block)).view(-1, form.block)
    scales = blocks.abs().amax(1)
    if clip is not None:
        begins = torch.arange(0, flat.numel(), form.block, device=flat.device)
        scales = scales * clip[begins // wide.shape[1]]
    offset = scales.min()
    top = 2**form.scale_bits - 1
    short = -scales.numel() % form.scales_block
    above = functional.pad(scales - offset, (0, short)).view(-1, form.scales_block)
    steps = (above.amax(1) / top).to(STEP_DTYPES[form.step])
    tiny = torch.finfo(torch.float32).tiny
    scale_codes = (above / steps.float().clamp_min(tiny)[:, None]).round_().clamp_(0, top).to(torch.uint8).view(-1)
    count = -(-scales.numel() // 8) * 8
    scale_codes = functional.pad(scale_codes, (0, max(0, count - scale_codes.numel())))[:count]
    kept = scale_codes[: scales.numel()] * steps.float().repeat_interleave(form.scales_block)[: scales.numel()] + offset
    table = normal_float_table(form.bits)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=flat.device)
    step = max(1, chunk(blocks) // form.block)
    for first in range(0, blocks.shape[0], step):
        some = slice(first, first + step)
        codes[some] = nearest(blocks[some] / kept[some].clamp_min(tiny)[:, None], table)
    return TwoLevel(
        pack_codes(codes.view(-1), form.bits), pack_codes(scale_codes, form.scale_bits), steps, offset, form
    )
