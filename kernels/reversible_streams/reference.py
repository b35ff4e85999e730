"""Fixed-point streams in torch and, where bits are packed, numpy: what the kernels must agree with bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

LIMIT = 1 << 30
"""Half of what int32 holds, so that the sum of two numbers below it never wraps."""
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Worked on at a time: temporaries stay in a core's cache on CPU, launches are few on a GPU."""


def to_float(stream: Tensor, fraction: int, dtype: torch.dtype) -> Tensor:
    """fp64 exactly; others through one rounding to fp32 and one to `dtype`."""
    out = torch.empty(stream.shape, dtype=dtype, device=stream.device)
    for rows, target in _chunks(stream, out):
        wide = rows.to(torch.float64 if dtype == torch.float64 else torch.float32)
        target.copy_(wide.mul_(2.0**-fraction))
    return out


def add_(stream: Tensor, y: Tensor, fraction: int, overflow: Tensor, *, subtract: bool = False) -> None:
    for rows, added in _chunks(stream, y):
        fixed = _fixed(added, fraction, overflow)
        rows.sub_(fixed) if subtract else rows.add_(fixed)
        _check(rows, overflow)


def advance_(other: Tensor, main: Tensor, y: Tensor, bits: int, fraction: int, overflow: Tensor) -> Tensor:
    side = torch.empty((*other.shape[:-1], other.shape[-1] // 8 * bits), dtype=torch.uint8, device=other.device)
    for rows, beside, added, packed in _chunks(other, main, y, side):
        packed.copy_(_pack(rows, bits))
        rows.bitwise_right_shift_(bits).sub_(beside >> bits).add_(_fixed(added, fraction, overflow))
        _check(rows, overflow)
    return side


def retreat_(other: Tensor, main: Tensor, y: Tensor, bits: int, fraction: int, side: Tensor) -> None:
    ignored = torch.zeros((), dtype=torch.int32, device=other.device)
    for rows, beside, added, packed in _chunks(other, main, y, side):
        rows.sub_(_fixed(added, fraction, ignored)).add_(beside >> bits).bitwise_left_shift_(bits)
        rows.bitwise_or_(_unpack(packed, bits))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, as views [rows, width]."""
    assert tensors[0].is_contiguous(), "a stream is written in place"
    flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
    step = max(1, CHUNK_ELEMENTS.get(tensors[0].device.type, CHUNK_ELEMENTS["cuda"]) // tensors[0].shape[-1])
    for first in range(0, flat[0].shape[0], step):
        yield tuple(rows[first : first + step] for rows in flat)


def _fixed(y: Tensor, fraction: int, overflow: Tensor) -> Tensor:
    scaled = y.to(torch.float64 if y.dtype == torch.float64 else torch.float32) * 2.0**fraction
    overflow.bitwise_or_((~(scaled.abs().amax() < LIMIT)).to(torch.int32))  # so that NaN breaks it too
    return scaled.round_().to(torch.int32)


def _check(rows: Tensor, overflow: Tensor) -> None:
    low, high = torch.aminmax(rows)
    overflow.bitwise_or_(((low <= -LIMIT) | (high >= LIMIT)).to(torch.int32))


def _pack(rows: Tensor, bits: int) -> Tensor:
    planes = [((rows >> j) & 1).to(torch.uint8) for j in range(bits)]
    packed = [np.packbits(plane.cpu().numpy(), axis=-1, bitorder="little") for plane in planes]
    return torch.from_numpy(np.stack(packed, axis=-1).reshape(rows.shape[0], -1))


def _unpack(packed: Tensor, bits: int) -> Tensor:
    groups = packed.cpu().numpy().reshape(packed.shape[0], -1, bits)
    low = np.zeros((packed.shape[0], groups.shape[1] * 8), np.int32)
    for j in range(bits):
        low |= np.unpackbits(groups[..., j], axis=-1, bitorder="little").astype(np.int32) << j
    return torch.from_numpy(low).to(packed.device)
