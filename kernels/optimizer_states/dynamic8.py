"""Moments in 8 bits: the largest element of a block of 256 in fp32, the others as one of 256 shares of it.

The shares are denser towards zero: an exponent of ten of varying length, then a linear fraction (Dettmers, 8-Bit
Approximations for Parallelism in Deep Learning, 2016; Dettmers et al., 2022). Signed for the first moment, without sign
and with one more bit for the second. The format is that of bitsandbytes; its codes on a CPU
are not always the nearest ones, these are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.optimizer_states import BLOCK

EXPONENTS = 7


def encode(x_N: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x_N`.

    Args:
        x_N: fp32 [N]; of a longer tensor's pieces all but the last are a multiple of 256 long.
        signed: whether elements may be negative.

    Returns:
        uint8 [N], to the nearest; fp32 [ceil(N / 256)].
    """
    x_BE = functional.pad(x_N, (0, -x_N.numel() % BLOCK)).view(-1, BLOCK)
    largest_B = x_BE.abs().amax(dim=1)
    share = x_BE / torch.where(largest_B > 0, largest_B, torch.ones_like(largest_B))[:, None]
    return _nearest(share.view(-1), signed)[: x_N.numel()], largest_B


def decode(codes_N: Tensor, largest_B: Tensor, *, signed: bool) -> Tensor:
    """fp32 [N]."""
    table, _ = _table(signed, codes_N.device)
    x_N = table.index_select(0, codes_N.int())
    whole = x_N.numel() // BLOCK * BLOCK
    x_N[:whole].view(-1, BLOCK).mul_(largest_B[: whole // BLOCK, None])
    x_N[whole:] *= largest_B[whole // BLOCK :]
    return x_N


def _nearest(share_N: Tensor, signed: bool) -> Tensor:
    """uint8 [N]: how many of the numbers half way between two shares lie below each element.

    Numbers with the same upper 16 bits lie so close together that at most one such limit is among them: two look-ups
    and a comparison give what a binary search gives, sooner.
    """
    first, limit = _places(signed, share_N.device)
    place = (share_N.view(torch.int32) >> 16).add_(1 << 15)
    codes = first.index_select(0, place)
    return codes.add_(share_N > limit.index_select(0, place))


@lru_cache(maxsize=16)
def _places(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """By the upper 16 bits of a number, as an integer from -2^15: the code of the least number that has them (uint8),
    and the limit above which the next code begins (fp32)."""
    _, between = _table(signed, torch.device("cpu"))
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    ends = ends.nan_to_num(0.0, 0.0, 0.0)  # no shares, but they have a place
    first, last = torch.bucketize(ends.sort(dim=0).values, between)
    assert int((last - first).max()) <= 1, "two limits have the same upper bits"
    return first.to(torch.uint8).to(device), torch.cat([between, torch.tensor([torch.inf])])[first].to(device)


@lru_cache(maxsize=16)
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 shares in order, fp32, and the 255 numbers half way between neighbours."""
    shares = [torch.tensor([0.0, 1.0])]
    for exponent in range(EXPONENTS):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        middles = 10.0 ** (exponent - EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2)
        shares += [middles, -middles] if signed else [middles]
    table = torch.cat(shares).sort().values.to(device)
    return table, (table[1:] + table[:-1]) / 2
