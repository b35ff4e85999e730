"""Fixed-point residual streams that can be run backwards bit for bit: shift, add, and keep the bits shifted out.

A stream is int32, h = stream / 2^fraction. One step of a reversible layer takes two of them,

    other <- (other >> bits) - (main >> bits) + round(y * 2^fraction)

integer operations but for the rounding of y, so that with the same main and the same y it is undone exactly; the `bits`
lowest bits of each element, which the shift of other loses, are handed back packed: `bits` bytes for every 8 elements,
byte j of a group holding bit j of its 8 elements, the first in the lowest place. Side information as in Maclaurin et
al., 2015, https://arxiv.org/abs/1502.03492; the multiplication by 2^-bits makes it this simple.

`reference` has it in torch and numpy, which defines it and runs on CPU; `triton_kernels` has the step and its undoing
on GPUs, one kernel each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.reversible_streams import reference

LIMIT = reference.LIMIT
"""Elements of a stream, and what is added to one, must stay below this in magnitude."""

__all__ = ["LIMIT", "add_", "advance_", "packed_width", "retreat_", "to_fixed", "to_float"]


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row's side bits. `width` elements, a multiple of 8."""
    assert width % 8 == 0, f"rows of {width} elements do not pack into bytes"
    return width // 8 * bits


def to_fixed(x: Tensor, fraction: int, overflow: Tensor) -> Tensor:
    """int32 of x's shape; `overflow` (int32 []) becomes 1 if an element is out of range or not a number."""
    stream = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
    add_(stream, x, fraction, overflow)
    return stream


def to_float(stream: Tensor, fraction: int, dtype: torch.dtype) -> Tensor:
    """The numbers a stream holds, rounded to `dtype`."""
    return reference.to_float(stream, fraction, dtype)


def add_(stream: Tensor, y: Tensor, fraction: int, overflow: Tensor, *, subtract: bool = False) -> None:
    """stream += round(y * 2^fraction), in place; `subtract` undoes it."""
    reference.add_(stream, y, fraction, overflow, subtract=subtract)


def advance_(other: Tensor, main: Tensor, y: Tensor, bits: int, fraction: int, overflow: Tensor) -> Tensor:
    """other <- (other >> bits) - (main >> bits) + round(y * 2^fraction), in place.

    Args:
        other, main: int32 [..., d], contiguous; d a multiple of 8.
        y: floating point, of the same shape.
        bits: 1 to 8.
        overflow: int32 []; set to 1 where the limit is broken. Not read here, so that nothing waits for the device.

    Returns:
        the side bits, uint8 [..., bits * d / 8].
    """
    if other.device.type == "cuda" and y.dtype != torch.float64:
        from farspan.kernels.reversible_streams import triton_kernels

        return triton_kernels.advance_(other, main, y, bits, fraction, overflow)
    return reference.advance_(other, main, y, bits, fraction, overflow)


def retreat_(other: Tensor, main: Tensor, y: Tensor, bits: int, fraction: int, side: Tensor) -> None:
    """Undoes `advance_`, in place, given the same main, the same y and the side bits."""
    if other.device.type == "cuda" and y.dtype != torch.float64:
        from farspan.kernels.reversible_streams import triton_kernels

        triton_kernels.retreat_(other, main, y, bits, fraction, side)
    else:
        reference.retreat_(other, main, y, bits, fraction, side)
