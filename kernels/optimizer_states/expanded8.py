"""Moments in E4M3 after their range was expanded to what E4M3 spans.

FP8 has as many numbers between 2^-9 and 2^-8 as between 128 and 256; a group of 128 moments spans a few powers of two
and would use a few dozen of them. COAT raises magnitudes to a power k first, k = floor(8 log2(448^2 / 2) / log2(max /
min)) / 8, so that the group's own range fills E4M3's; decoding takes the 1/k-th power. (Xi et al., COAT, 2024,
https://arxiv.org/abs/2410.19313)

The paper scales by c = sqrt(max min) before the power and by (max / c)^k / 448 after it; c cancels, so that max and k
say all: x = sign(q) max (|q| / 448)^(1/k). Zeros stay zeros and do not count for min; a group of equal magnitudes has
no range, and the largest k; k is 1/8 at least, however wide a range is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.optimizer_states import GROUP

LARGEST = 448.0
STEPS = 8
"""Powers are multiples of 1/8."""
RANGE_BITS = 2 * torch.log2(torch.tensor(LARGEST)).item() - 1
"""log2(448^2 / 2): what the range is expanded to."""
MOST = 255
"""Of the byte that holds 8 k."""


def encode(x_N: Tensor, *, expand: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, largest magnitude and power of `x_N`.

    Args:
        x_N: fp32 [N]; of a longer tensor's pieces all but the last are a multiple of 128 long.
        expand: False: every power is 1, which is plain FP8 with a scale for each group.

    Returns:
        uint8 [N], the bits of E4M3 to the nearest; fp32 [ceil(N / 128)]; uint8 [ceil(N / 128)], eight times the power.
    """
    x_GE = functional.pad(x_N, (0, -x_N.numel() % GROUP)).view(-1, GROUP)
    size_GE = x_GE.abs()
    largest_G = size_GE.amax(dim=1)
    if expand:
        least_G = size_GE.masked_fill(size_GE == 0, torch.inf).amin(dim=1)
        bits_G = largest_G.log2() - least_G.log2()
        eighths_G = (STEPS * RANGE_BITS / bits_G).nan_to_num_(MOST, MOST, 1).floor_().clamp_(1, MOST)
    else:
        eighths_G = torch.full_like(largest_G, STEPS)
    top_G = torch.where(largest_G > 0, largest_G, torch.ones_like(largest_G))
    share_GE = size_GE.div_(top_G[:, None]).pow_(eighths_G[:, None] / STEPS)
    q_GE = share_GE.mul_(LARGEST).clamp_(max=LARGEST).copysign_(x_GE).to(torch.float8_e4m3fn)
    return q_GE.view(torch.uint8).view(-1)[: x_N.numel()], largest_G, eighths_G.to(torch.uint8)


def decode(codes_N: Tensor, largest_G: Tensor, eighths_G: Tensor) -> Tensor:
    """fp32 [N]."""
    numel = codes_N.numel()
    q_GE = functional.pad(codes_N, (0, -numel % GROUP)).view(torch.float8_e4m3fn).float().view(-1, GROUP)
    root_G = STEPS / eighths_G.clamp(min=1).float()
    size_GE = q_GE.abs().div_(LARGEST).pow_(root_G[:, None]).mul_(largest_G[:, None])
    return size_GE.copysign_(q_GE).view(-1)[:numel]
