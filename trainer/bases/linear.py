"""A linear layer whose weight is stored in few bits and made whole where it is used.

`weight` is the whole matrix, made anew each time somebody asks for it, in forward and in backward: adapters, the
executor and tests use it as they use a plain layer's. It is no parameter: it is never trained and no engine sees it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farspan.kernels.quantized import chunk
from farspan.kernels.quantized.formats import Format, named
from farspan.kernels.quantized.integers import pack, quantize_int8, unpack, whole_int8
from farspan.kernels.quantized.normal_float import NormalFloat4, quantize_nf4
from farspan.kernels.quantized.two_level import TwoLevel, quantize_two_level
from farspan.trainer.bases.config import LQ, NF4, Base, Int8

TWO_LEVEL = ("codes", "scale_codes", "steps", "offset")


class QuantizedLinear(nn.Linear):
    """y = x W^T + b. Subclasses store W.

    Args:
        bias: of the layer it replaces; None: without.
        dtype: of W where it is whole.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out_features, in_features] in `dtype`."""
        return self.whole()

    def whole(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, self)
        return functional.linear(x, self.whole(), self.bias)

    def node_of(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's autograd node around an output that is at hand."""
        return _FrozenGiven.apply(x, y, self)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Moved, but never cast: scales are part of the stored bits, and engines make whole models bf16."""
        plain = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        for name, dtype in dtypes.items():
            if dtype in plain:
                self._buffers[name] = self._buffers[name].view(plain[dtype])  # type: ignore[union-attr]
        try:
            super()._apply(fn, recurse)
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self._buffers[name].view(dtype)  # type: ignore[union-attr]
        return self

    @property
    def stored_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers())


class _Frozen(torch.autograd.Function):
    """Makes W again in backward instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.whole(), layer.bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.whole(), None


class _FrozenGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, layer: QuantizedLinear) -> Tensor:
        del x
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.layer.whole(), None, None


class NF4Linear(QuantizedLinear):
    """See `kernels.quantized.normal_float`."""

    def __init__(
        self, shape: tuple[int, int], stored: NormalFloat4, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super().__init__(shape[1], shape[0], bias, dtype)
        self.block = stored.block
        self.register_buffer("packed", stored.packed)
        self.register_buffer("scales", stored.scales)
        self.register_buffer("scales_scale", stored.scales_scale)
        self.register_buffer("scales_mean", stored.mean)

    def whole(self) -> Tensor:
        stored = NormalFloat4(self.packed, self.scales, self.scales_scale, self.scales_mean, self.block)  # type: ignore[arg-type]
        return stored.values((self.out_features, self.in_features), self.dtype)


class Int8Linear(QuantizedLinear):
    """Integers and a scale for each row."""

    def __init__(self, integers: Tensor, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(integers.shape[1], integers.shape[0], bias, dtype)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)

    def whole(self) -> Tensor:
        return whole_int8(self.integers, self.scale, self.dtype)  # type: ignore[arg-type]


class IntegerLinear(QuantizedLinear):
    """Integers of a few bits: W = s (I - z) + o, with s, z and o for each group of a row's elements.

    Args:
        packed: uint8 [N, C * bits / 8], of `pack`.
        scale, offset: fp32 [N, groups]; offset None: 0.
        zero: uint8 [N, groups].
    """

    def __init__(
        self,
        packed: Tensor,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        offset: Tensor | None,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(packed.shape[1] * 8 // bits, packed.shape[0], bias, dtype)
        self.bits = bits
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("offset", offset)

    @classmethod
    def of_codes(cls, codes: Tensor, bits: int, *groups: Any, **rest: Any) -> IntegerLinear:
        """Of integers uint8 [N, C] that are not packed."""
        return cls(pack(codes, bits), bits, *groups, **rest)

    def whole(self) -> Tensor:
        packed: Any = self.packed
        scale: Any = self.scale
        zero: Any = self.zero
        offset: Any = self.offset
        out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=packed.device)
        step = max(1, chunk(out) // self.in_features)
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            integers = unpack(packed[rows], self.bits).view(-1, zero.shape[1], self.in_features // zero.shape[1])
            values = (integers.to(scale.dtype) - zero[rows, :, None]).mul_(scale[rows, :, None])
            if offset is not None:
                values.add_(offset[rows, :, None])
            out[rows] = values.view(-1, self.in_features)
        return out


class TwoLevelLinear(QuantizedLinear):
    """See `kernels.quantized.two_level`."""

    def __init__(self, shape: tuple[int, int], stored: TwoLevel, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(shape[1], shape[0], bias, dtype)
        self.format = stored.format
        for name in TWO_LEVEL:
            self.register_buffer(name, getattr(stored, name))

    def whole(self) -> Tensor:
        parts: dict[str, Any] = {name: getattr(self, name) for name in TWO_LEVEL}
        return TwoLevel(**parts, format=self.format).values((self.out_features, self.in_features), self.dtype)


def quantized(
    weight: Tensor, how: Base | Format, bias: nn.Parameter | None, clip: Tensor | None = None
) -> QuantizedLinear:
    """A layer with this matrix, rounded as `how` says.

    Args:
        clip: fp32 [rows], the share of its largest magnitude that a scale is; None: 1.
    """
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(how, LQ):
        how = how.uniform
    if isinstance(how, Format):
        return TwoLevelLinear(shape, quantize_two_level(weight, how, clip), bias, weight.dtype)
    if isinstance(how, NF4):
        return NF4Linear(shape, quantize_nf4(weight, double=how.double, clip=clip), bias, weight.dtype)
    assert isinstance(how, Int8), how
    return Int8Linear(*quantize_int8(weight, clip), bias, weight.dtype)


def stored_parts(layer: QuantizedLinear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `restored` needs: plain values, and tensors."""
    told: dict[str, Any] = {"kind": type(layer).__name__, "shape": [layer.out_features, layer.in_features]}
    if isinstance(layer, TwoLevelLinear):
        told["format"] = layer.format.name
    if isinstance(layer, NF4Linear):
        told["block"] = layer.block
    return told, dict(layer.named_buffers(recurse=False))


def restored(
    told: dict[str, Any], tensors: dict[str, Tensor], bias: nn.Parameter | None, dtype: torch.dtype
) -> QuantizedLinear:
    """A layer from what `stored_parts` gave.

    Raises:
        KeyError: it is of no kind known here, or a tensor is missing.
    """
    shape = (told["shape"][0], told["shape"][1])
    if told["kind"] == "TwoLevelLinear":
        codes, scale_codes, steps, offset = (tensors[name] for name in TWO_LEVEL)
        two_level = TwoLevel(codes, scale_codes, steps, offset, named(told["format"]))
        return TwoLevelLinear(shape, two_level, bias, dtype)
    if told["kind"] == "NF4Linear":
        stored = NormalFloat4(
            tensors["packed"],
            tensors["scales"],
            tensors.get("scales_scale"),
            tensors.get("scales_mean"),
            told["block"],
        )
        return NF4Linear(shape, stored, bias, dtype)
    if told["kind"] == "Int8Linear":
        return Int8Linear(tensors["integers"], tensors["scale"], bias, dtype)
    raise KeyError(f"kind {told['kind']!r}")
