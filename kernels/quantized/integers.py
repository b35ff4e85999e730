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


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, C] and fp32 [N]: the nearest of 255 steps between minus and plus the largest magnitude of the row."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round().clamp_(-127, 127).to(torch.int8), scale
