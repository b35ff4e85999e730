"""What a projection left out of a gradient, kept for the next step in 8 or 4 bits of an element.

low + code * step in groups of 128 elements, low and step in fp32, to the nearest: error feedback makes up for the
rounding too. Two 4-bit codes to a byte, the first one low.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.optimizer_states import GROUP


def encode(x_N: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x_N`.

    Args:
        x_N: fp32 [N].
        bits: 8 or 4.

    Returns:
        uint8 [G * 128 * bits / 8] and fp32 [G, 2], for G = ceil(N / 128) groups.
    """
    levels = (1 << bits) - 1
    x_GE = functional.pad(x_N, (0, -x_N.numel() % GROUP)).view(-1, GROUP)
    low_G1, high_G1 = x_GE.aminmax(dim=1, keepdim=True)
    step_G1 = (high_G1 - low_G1) / levels
    per_step = torch.where(step_G1 > 0, step_G1, torch.ones_like(step_G1))
    codes = ((x_GE - low_G1) / per_step).round_().clamp_(0, levels).to(torch.uint8).view(-1)
    if bits == 4:
        codes = codes[0::2] | (codes[1::2] << 4)
    return codes, torch.cat([low_G1, step_G1], dim=1)


def decode(codes: Tensor, scales_G2: Tensor, numel: int, bits: int) -> Tensor:
    """fp32 [numel]."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(-1)
    low_G1, step_G1 = scales_G2.split(1, dim=1)
    return torch.addcmul(low_G1, codes.view(-1, GROUP).float(), step_G1).view(-1)[:numel]
