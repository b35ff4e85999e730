"""4-bit codes on a GPU: one kernel each way; what rounds at random is made in registers from (key, element).

Each element is read once and half a byte written. Rounded to the nearest, codes and scales have the bits of `codes`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 64
"""Groups of a program."""
HALF_GROUP = 32
"""Bytes that stand for a group of a code without scales."""
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _cut(x):  # type: ignore[no-untyped-def]
    """To bf16, towards zero; as fp32."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _further(x):  # type: ignore[no-untyped-def]
    """The next bf16 number away from zero; as fp32."""
    return (x.to(tl.int32, bitcast=True) + 65536).to(tl.float32, bitcast=True)


@triton.jit
def _codes(at, place, key, DRAWS: tl.constexpr):  # type: ignore[no-untyped-def]
    noise = tl.rand(key, place.to(tl.int32)) if DRAWS else 0.5
    return tl.minimum(tl.maximum(tl.floor(at + noise), 0.0), 15.0).to(tl.int32)


@triton.jit(do_not_specialize=["key"])
def encode_groups_kernel(  # type: ignore[no-untyped-def]
    x, codes, scales, groups, key, GROUP: tl.constexpr, GROUPS: tl.constexpr, DRAWS: tl.constexpr
):
    """x floating [groups, GROUP], codes uint8 [groups, GROUP / 2], scales bf16 [groups, 2]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    byte = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    inside = (group < groups)[:, None]
    first = tl.load(x + byte * 2, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + byte * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    least = tl.minimum(tl.min(first, axis=1), tl.min(second, axis=1))
    most = tl.maximum(tl.max(first, axis=1), tl.max(second, axis=1))
    low = tl.where(_cut(least) > least, _further(_cut(least)), _cut(least))
    step = tl.div_rn(most - low, 15.0)
    step = tl.where(_cut(step) < step, _further(_cut(step)), _cut(step))
    inverse = tl.where(step >= _TINY, tl.div_rn(1.0, tl.maximum(step, _TINY)), 0.0)
    low_code = _codes((first - low[:, None]) * inverse[:, None], byte * 2, key, DRAWS)
    high_code = _codes((second - low[:, None]) * inverse[:, None], byte * 2 + 1, key, DRAWS)
    tl.store(codes + byte, (low_code | (high_code << 4)).to(tl.uint8), mask=inside)
    # minima and maxima pass over what is not a number
    lost = tl.max(tl.where((first == first) & (second == second), 0, 1), axis=1) > 0
    low = tl.where(lost, float("nan"), low)
    tl.store(scales + group * 2, low.to(tl.bfloat16), mask=group < groups)
    tl.store(scales + group * 2 + 1, step.to(tl.bfloat16), mask=group < groups)


@triton.jit
def decode_groups_kernel(codes, scales, out, groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `encode_groups_kernel`; out fp32 [groups, GROUP]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    byte = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    inside = (group < groups)[:, None]
    low = tl.load(scales + group * 2, mask=group < groups, other=0.0).to(tl.float32)[:, None]
    step = tl.load(scales + group * 2 + 1, mask=group < groups, other=0.0).to(tl.float32)[:, None]
    both = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    tl.store(out + byte * 2, (both & 15).to(tl.float32) * step + low, mask=inside)
    tl.store(out + byte * 2 + 1, (both >> 4).to(tl.float32) * step + low, mask=inside)


@triton.jit(do_not_specialize=["key"])
def encode_range_kernel(x, codes, bytes_, low, step, key, BLOCK: tl.constexpr, DRAWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """x floating [2 * bytes_], codes uint8 [bytes_]."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < bytes_
    first = tl.load(x + byte * 2, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + byte * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    low_code = _codes(tl.div_rn(first - low, step), byte * 2, key, DRAWS)
    high_code = _codes(tl.div_rn(second - low, step), byte * 2 + 1, key, DRAWS)
    tl.store(codes + byte, (low_code | (high_code << 4)).to(tl.uint8), mask=inside)


@triton.jit
def decode_range_kernel(codes, out, bytes_, low, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `encode_range_kernel`; out fp32 [2 * bytes_]."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < bytes_
    both = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    tl.store(out + byte * 2, (both & 15).to(tl.float32) * step + low, mask=inside)
    tl.store(out + byte * 2 + 1, (both >> 4).to(tl.float32) * step + low, mask=inside)


def encode_groups(x_RC: Tensor, group: int, key: int | None) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, C / 2] and scales bf16 [R, 2 C / group] of rows of any floating dtype.

    Args:
        key: of the noise; None: to the nearest.
    """
    x_RC = x_RC.contiguous()
    rows, width = x_RC.shape
    groups = x_RC.numel() // group
    codes = torch.empty(rows, width // 2, dtype=torch.uint8, device=x_RC.device)
    scales = torch.empty(rows, 2 * (width // group), dtype=torch.bfloat16, device=x_RC.device)
    encode_groups_kernel[(triton.cdiv(groups, GROUPS),)](
        x_RC, codes, scales, groups, _seed(key), GROUP=group, GROUPS=GROUPS, DRAWS=key is not None
    )
    return codes, scales


def decode_groups(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """fp32 [R, C]."""
    rows, half = codes.shape
    out = torch.empty(rows, 2 * half, device=codes.device)
    groups = out.numel() // group
    decode_groups_kernel[(triton.cdiv(groups, GROUPS),)](
        codes.contiguous(), scales.contiguous(), out, groups, GROUP=group, GROUPS=GROUPS
    )
    return out


def encode_range(x_RC: Tensor, low: float, step: float, key: int | None) -> Tensor:
    """Codes uint8 [R, C / 2]."""
    x_RC = x_RC.contiguous()
    codes = torch.empty(x_RC.shape[0], x_RC.shape[1] // 2, dtype=torch.uint8, device=x_RC.device)
    block = GROUPS * HALF_GROUP
    encode_range_kernel[(triton.cdiv(codes.numel(), block),)](
        x_RC, codes, codes.numel(), low, step, _seed(key), BLOCK=block, DRAWS=key is not None
    )
    return codes


def decode_range(codes: Tensor, low: float, step: float) -> Tensor:
    """fp32 [R, C]."""
    out = torch.empty(codes.shape[0], 2 * codes.shape[1], device=codes.device)
    block = GROUPS * HALF_GROUP
    decode_range_kernel[(triton.cdiv(codes.numel(), block),)](
        codes.contiguous(), out, codes.numel(), low, step, BLOCK=block
    )
    return out


def _seed(key: int | None) -> int:
    """Of Philox: 31 bits of the key."""
    return (key or 0) & 0x7FFFFFFF
