"""The codes themselves. N heads of D channels each, R rows; C = N * D channels, P planes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.channel_codes import MOST_BITS, SCALE_BYTES

CHUNK_PLANE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Bits that are made a byte each at a time."""


@dataclass(frozen=True, eq=False)
class Planes:
    """Where the bits of N x D channels are in a message."""

    levels_ND: Tensor
    """fp32, 2^bits - 1."""
    channel_P: Tensor
    """int64, the channel of each plane."""
    bit_P: Tensor
    """uint8, how far its bit is from the lowest."""

    @staticmethod
    def of(bits_ND: Tensor, device: torch.device) -> Planes:
        """Args:
        bits_ND: int64 on the CPU, 1 to 8.
        """
        bits_C = bits_ND.flatten()
        assert bits_C.numel() == 0 or 1 <= int(bits_C.min()) <= int(bits_C.max()) <= MOST_BITS, bits_ND
        channel_P = torch.repeat_interleave(torch.arange(bits_C.numel()), bits_C)
        first_C = bits_C.cumsum(0) - bits_C
        bit_P = torch.arange(channel_P.numel()) - first_C[channel_P]
        levels_ND = (2.0**bits_ND - 1).float()
        return Planes(levels_ND.to(device), channel_P.to(device), bit_P.to(torch.uint8).to(device))

    def bytes(self, rows: int) -> int:
        """Of a message of so many rows, a multiple of 8."""
        size_bytes = self.channel_P.numel() * -(-rows // 8) + self.levels_ND.numel() * SCALE_BYTES
        return -(-size_bytes // 8) * 8

    def parts(self, message: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Views of a message that begins at a multiple of 8: fp32 [2, N, D], low and step; uint8 [P, rows / 8]."""
        split, planes, per_plane = self.levels_ND.numel() * SCALE_BYTES, self.channel_P.numel(), -(-rows // 8)
        scales = message[:split].view(torch.float32).view(2, *self.levels_ND.shape)
        return scales, message[split : split + planes * per_plane].view(planes, per_plane)

    def chunks(self, rows: int) -> Iterator[slice]:
        """Rows to be coded at a time, multiples of 8."""
        most = CHUNK_PLANE_ELEMENTS.get(self.levels_ND.device.type, CHUNK_PLANE_ELEMENTS["cuda"])
        step = max(8, most // max(1, self.channel_P.numel()) // 8 * 8)
        for first in range(0, rows, step):
            yield slice(first, min(rows, first + step))


def encode(x_NRD: Tensor, planes: Planes, message: Tensor, noise: torch.Generator | None = None) -> None:
    """Write rows into a message as codes.

    A channel that holds something that is no number, or spans more than fp32 does, comes back as NaN.

    Args:
        x_NRD: floating point.
        message: uint8 [planes.bytes(R)].
        noise: to round at random, right on average; None: to the nearest.
    """
    rows = x_NRD.shape[1]
    scales, packed = planes.parts(message, rows)
    if rows == 0 or x_NRD.numel() == 0:
        return
    low, high = (end.float() for end in x_NRD.aminmax(dim=1))
    scales[0], scales[1] = low, (high - low) / planes.levels_ND
    for part in planes.chunks(rows):
        codes_NrD = _codes(x_NRD[:, part], scales, planes, noise)
        codes_Cr = codes_NrD.to(torch.uint8).transpose(1, 2).reshape(planes.levels_ND.numel(), -1)
        bits_Pr = (codes_Cr[planes.channel_P] >> planes.bit_P[:, None]) & 1
        packed[:, part.start // 8 : -(-part.stop // 8)] = _packed(bits_Pr)


def decode(message: Tensor, planes: Planes, out_NRD: Tensor) -> None:
    """Read a message into rows of any floating-point dtype."""
    rows = out_NRD.shape[1]
    if rows == 0 or out_NRD.numel() == 0:
        return
    scales, packed = planes.parts(message, rows)
    low, step = scales[:, :, None]
    N, D = planes.levels_ND.shape
    for part in planes.chunks(rows):
        bits_Pr = _unpacked(packed[:, part.start // 8 : -(-part.stop // 8)])[:, : part.stop - part.start]
        codes_Cr = torch.zeros(N * D, bits_Pr.shape[1], dtype=torch.uint8, device=message.device)
        codes_Cr.index_add_(0, planes.channel_P, bits_Pr << planes.bit_P[:, None])
        values_NrD = codes_Cr.view(N, D, -1).transpose(1, 2).float()
        out_NRD[:, part] = values_NrD.mul_(step).add_(low)


def rounding_error(x_NRD: Tensor, message: Tensor, planes: Planes, rows: int) -> Tensor:
    """What came back minus what was encoded to the nearest, fp32, of some rows of a message's [N, r, D]."""
    scales, _ = planes.parts(message, rows)
    low, step = scales[:, :, None]
    return _codes(x_NRD, scales, planes, None).mul_(step).add_(low) - x_NRD.float()


def _codes(x_NrD: Tensor, scales: Tensor, planes: Planes, noise: torch.Generator | None) -> Tensor:
    """fp32 [N, r, D], whole numbers."""
    low, step = scales[:, :, None]
    inverse = torch.where(step >= torch.finfo(torch.float32).tiny, 1 / step, torch.zeros_like(step))
    at = (x_NrD.float() - low).mul_(inverse)
    if noise is None:
        at += 0.5
    else:
        at += torch.rand(at.shape, generator=noise, device=at.device)
    return torch.minimum(at.floor_().clamp_(min=0), planes.levels_ND[:, None])


def _packed(bits_Pr: Tensor) -> Tensor:
    """uint8 [P, r / 8] of bits, the first row lowest; missing rows are zeros."""
    missing = -bits_Pr.shape[1] % 8
    if missing:
        bits_Pr = torch.nn.functional.pad(bits_Pr, (0, missing))
    in_bytes = bits_Pr.view(bits_Pr.shape[0], -1, 8)
    packed = in_bytes[..., 0].clone()
    for row in range(1, 8):
        packed |= in_bytes[..., row] << row
    return packed


def _unpacked(packed: Tensor) -> Tensor:
    """uint8 [P, 8 * bytes] of 0 and 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(1)
