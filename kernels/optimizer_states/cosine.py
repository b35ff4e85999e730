"""The discrete cosine transform as a fixed orthonormal basis of the rows of a matrix.

Basis vector k of n has the elements sqrt(2/n) cos(k (2j + 1) pi / 2n), j = 0 .. n-1, the zeroth divided by sqrt(2).
All coefficients at once take n log n a row by one real FFT (Makhoul, A Fast Cosine Transform in One and Two
Dimensions, 1980); some vectors are made when they are needed, n r cosines, so that no n x n matrix exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def transform(x_MN: Tensor) -> Tensor:
    """Coefficients of each row in the basis, orthonormal (DCT-II): `x_MN @ vectors(N, arange(N))`.

    Args:
        x_MN: fp32 or fp64 [..., N].
    """
    n = x_MN.shape[-1]
    # even places upwards, odd ones downwards: then the FFT of a row, turned by k quarter periods of 2n, is its DCT
    folded = torch.cat([x_MN[..., 0::2], x_MN[..., 1::2].flip(-1)], dim=-1)
    half = torch.fft.rfft(folded)
    k = torch.arange(half.shape[-1], device=x_MN.device, dtype=torch.float64)
    turned = half * torch.polar(torch.ones_like(k), -math.pi * k / (2 * n)).to(half.dtype)
    # coefficient n - k is minus the imaginary part of coefficient k
    found = torch.cat([turned.real, -turned.imag[..., 1 : (n + 1) // 2].flip(-1)], dim=-1)
    found *= math.sqrt(2 / n)
    found[..., 0] /= math.sqrt(2)
    return found


def vectors(n: int, index_R: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Basis vectors as columns.

    Args:
        n: elements of a vector.
        index_R: int [R], of 0 .. n-1.

    Returns:
        `dtype` [n, R] on the device of `index_R`.
    """
    j = torch.arange(n, device=index_R.device)
    # angles in whole parts of a period, which floats would lose at large k
    part = (2 * j + 1)[:, None] * index_R.long() % (4 * n)
    table = torch.cos(torch.arange(4 * n, device=index_R.device, dtype=torch.float64) * (math.pi / (2 * n)))
    scaled = (table * math.sqrt(2 / n)).to(dtype)
    found = scaled[part]
    return found.mul_(torch.where(index_R == 0, torch.tensor(0.5, dtype=dtype).sqrt(), torch.tensor(1.0, dtype=dtype)))
