"""Integers with a scale, and a zero point, for each row or group of a row's elements."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.quantized import chunk


def whole_int8(integers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """integers * scale, each product in fp32 and rounded once to `dtype`. [N, C]."""
    out = torch.empty(integers.shape, dtype=dtype, device=integers.device)
    rows = max(1, chunk(out) // integers.shape[1])
    for first in range(0, integers.shape[0], rows):
        some = slice(first, first + rows)
        out[some] = integers[some].float().mul_(scale[some, None])
    return out


def quantize_int8(weight: Tensor, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 [N, C] and fp32 [N]: the nearest of 255 steps between minus and plus the largest magnitude of the row, or
    the share `clip` [N] of it."""
    wide = weight.detach().float()
    largest = wide.abs().amax(1)
    scale = (largest if clip is None else largest * clip).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round().clamp_(-127, 127).to(torch.int8), scale


def quantize_rows(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned integers between the smallest and the largest of each row, or of each `group` elements of it.

    Returns:
        integers uint8 [N, C], scale fp32 [N, groups], zero point uint8 [N, groups]: W ~ scale (integer - zero).
    """
    wide = weight.detach().float().view(weight.shape[0], -1, group or weight.shape[1])
    low, high = wide.amin(-1).clamp_max(0), wide.amax(-1).clamp_min(0)
    top = 2**bits - 1
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp_(0, top)
    integers = ((wide / scale[..., None]).round_() + zero[..., None]).clamp_(0, top)
    return integers.to(torch.uint8).view(weight.shape), scale, zero.to(torch.uint8)


def pack(integers: Tensor, bits: int) -> Tensor:
    """uint8 [N, C] below 2^bits as uint8 [N, C * bits / 8]: of 8 elements `bits` bytes, one for each place."""
    groups = integers.view(integers.shape[0], -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=integers.device)
    planes = [(((groups >> j) & 1) << places).sum(-1, dtype=torch.uint8) for j in range(bits)]
    return torch.stack(planes, -1).view(integers.shape[0], -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`."""
    groups = packed.view(packed.shape[0], -1, bits)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    out = torch.zeros((*groups.shape[:2], 8), dtype=torch.uint8, device=packed.device)
    for j in range(bits):
        out.bitwise_or_(((groups[..., j, None] >> places) & 1) << j)
    return out.view(packed.shape[0], -1)
