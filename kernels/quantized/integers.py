"""Integers with a scale, and a zero point, for each row or group of a row's elements."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, C] and fp32 [N]: the nearest of 255 steps between minus and plus the largest magnitude of the row."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round().clamp_(-127, 127).to(torch.int8), scale
