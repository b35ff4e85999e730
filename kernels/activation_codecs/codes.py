"""The codes themselves. R rows, C elements and G groups of a row; two 4-bit codes to a byte, the first one low."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.activation_codecs import CHUNK_ELEMENTS, GROUP_4, GROUP_8

LARGEST_E4M3 = 448.0
LEVELS = 15
"""Steps between the least and the largest 4-bit code."""


class Codec(ABC):
    """A way to store a row of `width` numbers."""

    draws = False
    """Whether encoding rounds at random."""
    count = 1
    """Tensors that a row becomes."""

    @abstractmethod
    def parts(self, width: int) -> tuple[tuple[int, torch.dtype], ...]:
        """Elements and dtype of what a row becomes."""

    @abstractmethod
    def encode(self, x_RC: Tensor, noise_RC: Tensor | None) -> tuple[Tensor, ...]:
        """The parts of some rows.

        Args:
            x_RC: fp32.
            noise_RC: fp32, uniform in [0, 1); None: to the nearest.
        """

    def encode_on_gpu(self, x_RC: Tensor, key: int | None) -> tuple[Tensor, ...]:
        """The same of rows on a GPU, whose noise is made where it is used."""
        del key
        return self.encode(x_RC.float(), None)

    @abstractmethod
    def decode(self, *parts: Tensor) -> Tensor:
        """fp32 [R, C]."""

    def bytes(self, width: int) -> int:
        """Of a row."""
        return sum(count * dtype.itemsize for count, dtype in self.parts(width))


@dataclass(frozen=True)
class Plain(Codec):
    """The numbers themselves, rounded to a dtype."""

    dtype: torch.dtype

    def parts(self, width: int) -> tuple[tuple[int, torch.dtype], ...]:
        return ((width, self.dtype),)

    def encode(self, x_RC: Tensor, noise_RC: Tensor | None) -> tuple[Tensor, ...]:
        return (x_RC.to(self.dtype),)

    def decode(self, *parts: Tensor) -> Tensor:
        return parts[0].float()


@dataclass(frozen=True)
class Groups4(Codec):
    """low + code * step, low and step of each group in bf16.

    low is rounded down and step up, so that every number of the group lies between the ends and rounding at random has
    its mean. Not a number anywhere in a group makes all of it so.
    """

    group: int = GROUP_4
    draws = True
    count = 2

    def parts(self, width: int) -> tuple[tuple[int, torch.dtype], ...]:
        return ((width // 2, torch.uint8), (2 * (width // self.group), torch.bfloat16))

    def encode(self, x_RC: Tensor, noise_RC: Tensor | None) -> tuple[Tensor, ...]:
        rows, width = x_RC.shape
        x_RGg = x_RC.view(rows, width // self.group, self.group)
        low, high = x_RGg.aminmax(dim=-1, keepdim=True)
        low = _bf16_below(low)
        step = _bf16_above((high - low) / LEVELS)
        at = (x_RGg - low) * _inverse(step)
        codes = _rounded(at.view(rows, width), noise_RC)
        return _packed(codes), torch.cat([low, step], dim=-1).view(rows, -1).to(torch.bfloat16)

    def encode_on_gpu(self, x_RC: Tensor, key: int | None) -> tuple[Tensor, ...]:
        from farspan.kernels.activation_codecs import triton_kernels

        return triton_kernels.encode_groups(x_RC, self.group, key)

    def decode(self, *parts: Tensor) -> Tensor:
        codes, scales = parts
        if codes.device.type == "cuda":
            from farspan.kernels.activation_codecs import triton_kernels

            return triton_kernels.decode_groups(codes, scales, self.group)
        values = _unpacked(codes)
        low, step = scales.float().view(codes.shape[0], -1, 2, 1).unbind(2)
        return values.view(codes.shape[0], -1, self.group).mul_(step).add_(low).view(values.shape)


@dataclass(frozen=True)
class Range4(Codec):
    """low + code * (high - low) / 15."""

    low: float
    high: float
    draws = True

    @property
    def step(self) -> float:
        return (self.high - self.low) / LEVELS

    def parts(self, width: int) -> tuple[tuple[int, torch.dtype], ...]:
        return ((width // 2, torch.uint8),)

    def encode(self, x_RC: Tensor, noise_RC: Tensor | None) -> tuple[Tensor, ...]:
        return (_packed(_rounded((x_RC - self.low) / self.step, noise_RC)),)

    def encode_on_gpu(self, x_RC: Tensor, key: int | None) -> tuple[Tensor, ...]:
        from farspan.kernels.activation_codecs import triton_kernels

        return (triton_kernels.encode_range(x_RC, self.low, self.step, key),)

    def decode(self, *parts: Tensor) -> Tensor:
        if parts[0].device.type == "cuda":
            from farspan.kernels.activation_codecs import triton_kernels

            return triton_kernels.decode_range(parts[0], self.low, self.step)
        return _unpacked(parts[0]).mul_(self.step).add_(self.low)


@dataclass(frozen=True)
class Groups8(Codec):
    """E4M3, the largest of a group at 448; the scale in bf16, rounded up, so that nothing overflows."""

    group: int = GROUP_8
    count = 2

    def parts(self, width: int) -> tuple[tuple[int, torch.dtype], ...]:
        return ((width, torch.float8_e4m3fn), (width // self.group, torch.bfloat16))

    def encode(self, x_RC: Tensor, noise_RC: Tensor | None) -> tuple[Tensor, ...]:
        rows, width = x_RC.shape
        x_RGg = x_RC.view(rows, width // self.group, self.group)
        scale = _bf16_above(x_RGg.abs().amax(dim=-1, keepdim=True) / LARGEST_E4M3)
        scaled = (x_RGg * _inverse(scale)).clamp_(-LARGEST_E4M3, LARGEST_E4M3)
        return scaled.to(torch.float8_e4m3fn).view(rows, width), scale.view(rows, -1).to(torch.bfloat16)

    def decode(self, *parts: Tensor) -> Tensor:
        codes, scale = parts
        values = codes.float()
        return values.view(codes.shape[0], -1, self.group).mul_(scale.float()[..., None]).view(values.shape)


def row_chunks(like_RC: Tensor) -> Iterator[slice]:
    """Rows to be made whole at a time."""
    rows, width = like_RC.shape
    step = max(1, CHUNK_ELEMENTS.get(like_RC.device.type, CHUNK_ELEMENTS["cuda"]) // width)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


class Encoder:
    """Codes of a tensor that is made some rows at a time.

    Args:
        like_RC: of the tensor's shape and device.
        key: of the noise; None: to the nearest.
        parts: where the codes go, as `codec.parts` has them; None: into memory allocated here.
    """

    def __init__(self, codec: Codec, like_RC: Tensor, key: int | None, parts: tuple[Tensor, ...] | None = None) -> None:
        self.codec = codec
        (rows, width), device = like_RC.shape, like_RC.device
        if parts is None:
            parts = tuple(torch.empty(rows, n, dtype=dtype, device=device) for n, dtype in codec.parts(width))
        self.parts = parts
        self._key = key if codec.draws else None
        self._draw: torch.Generator | None = None
        if device.type != "cuda" and self._key is not None:
            self._draw = torch.Generator(device).manual_seed(self._key)

    def put(self, rows: slice, x_RC: Tensor) -> None:
        """Encode these rows; in order, each once."""
        if x_RC.device.type == "cuda":
            found = self.codec.encode_on_gpu(x_RC, self._key_of(rows))
        else:
            noise = torch.rand(x_RC.shape, generator=self._draw) if self._draw is not None else None
            found = self.codec.encode(x_RC, noise)
        for part, made in zip(self.parts, found):
            part[rows] = made

    def _key_of(self, rows: slice) -> int | None:
        """Far apart for rows and for neighbouring keys."""
        return None if self._key is None else (self._key + 0x9E3779B97F4A7C15 * (rows.start + 1)) >> 16


def _inverse(step: Tensor) -> Tensor:
    """1 / step; 0 where there is next to nothing to divide."""
    return torch.where(step >= torch.finfo(torch.float32).tiny, 1 / step, torch.zeros_like(step))


def _rounded(at: Tensor, noise: Tensor | None) -> Tensor:
    return (at + (0.5 if noise is None else noise)).floor_().clamp_(0, LEVELS).to(torch.uint8)


def _packed(codes_RC: Tensor) -> Tensor:
    return codes_RC[:, 0::2] | (codes_RC[:, 1::2] << 4)


def _unpacked(packed: Tensor) -> Tensor:
    """fp32, twice as wide."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(packed.shape[0], -1).float()


def _bf16_below(x: Tensor) -> Tensor:
    """The largest bf16 number that is not above x, as fp32."""
    cut = (x.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    return torch.where(cut > x, (cut.view(torch.int32) + 65536).view(torch.float32), cut)


def _bf16_above(x: Tensor) -> Tensor:
    """The least bf16 number that is not below x, as fp32."""
    cut = (x.view(torch.int32) & -65536).view(torch.float32)
    return torch.where(cut < x, (cut.view(torch.int32) + 65536).view(torch.float32), cut)
