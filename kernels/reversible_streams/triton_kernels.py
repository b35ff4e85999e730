"""Fixed-point streams on a GPU: one kernel each way, the side bits packed in registers.

Each element is read and written once; a program has `GROUPS` groups of 8 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.reversible_streams.reference import LIMIT

GROUPS = 256
_LIMIT = tl.constexpr(LIMIT)


@triton.jit
def _rounded(x):  # type: ignore[no-untyped-def]
    """To the nearest integer, ties to even, as `torch.round`."""
    down = tl.floor(x)
    above = x - down
    odd = down - 2.0 * tl.floor(down * 0.5)
    return down + tl.where(above > 0.5, 1.0, tl.where(above == 0.5, odd, 0.0))


@triton.jit
def advance_kernel(other, main, y, side, overflow, groups, scale, BITS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """other, main int32 [8 * groups], y floating [8 * groups], side uint8 [BITS * groups], overflow int32 [1]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, 8)
    at = group[:, None] * 8 + place[None, :]
    inside = (group < groups)[:, None]
    old = tl.load(other + at, mask=inside, other=0)
    for j in tl.static_range(BITS):
        byte = tl.sum(((old >> j) & 1) << place[None, :], axis=1)
        tl.store(side + group * BITS + j, byte.to(tl.uint8), mask=group < groups)
    scaled = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * scale
    beside = tl.load(main + at, mask=inside, other=0)
    new = (old >> BITS) - (beside >> BITS) + _rounded(scaled).to(tl.int32)
    fits = (tl.abs(scaled) < _LIMIT) & (new < _LIMIT) & (new > -_LIMIT)
    tl.atomic_or(overflow, tl.max(tl.max(tl.where(fits, 0, 1), axis=1), axis=0))
    tl.store(other + at, new, mask=inside)


@triton.jit
def retreat_kernel(other, main, y, side, groups, scale, BITS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `advance_kernel`, the other way."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, 8)
    at = group[:, None] * 8 + place[None, :]
    inside = (group < groups)[:, None]
    new = tl.load(other + at, mask=inside, other=0)
    scaled = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * scale
    beside = tl.load(main + at, mask=inside, other=0)
    old = (new - _rounded(scaled).to(tl.int32) + (beside >> BITS)) << BITS
    for j in tl.static_range(BITS):
        byte = tl.load(side + group * BITS + j, mask=group < groups, other=0).to(tl.int32)
        old = old | (((byte[:, None] >> place[None, :]) & 1) << j)
    tl.store(other + at, old, mask=inside)


def advance_(other: Tensor, main: Tensor, y: Tensor, bits: int, fraction: int, overflow: Tensor) -> Tensor:
    groups = _groups(other, main, y)
    side = torch.empty((*other.shape[:-1], other.shape[-1] // 8 * bits), dtype=torch.uint8, device=other.device)
    advance_kernel[(triton.cdiv(groups, GROUPS),)](
        other, main, y.contiguous(), side, overflow, groups, 2.0**fraction, BITS=bits, GROUPS=GROUPS
    )
    return side


def retreat_(other: Tensor, main: Tensor, y: Tensor, bits: int, fraction: int, side: Tensor) -> None:
    groups = _groups(other, main, y)
    retreat_kernel[(triton.cdiv(groups, GROUPS),)](
        other, main, y.contiguous(), side.contiguous(), groups, 2.0**fraction, BITS=bits, GROUPS=GROUPS
    )


def _groups(other: Tensor, main: Tensor, y: Tensor) -> int:
    assert other.is_contiguous() and main.is_contiguous() and other.shape == main.shape == y.shape
    assert other.shape[-1] % 8 == 0
    return other.numel() // 8
