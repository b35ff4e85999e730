"""RMSNorm as one node: y = w n with n = x / rms(x) (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

dx = (g - n mean(g n)) / rms with g = w dy, and dw = sum_t dy n: backward needs n and 1 / rms, and not x. n is y / w,
and y is what the linear layers behind it keep anyway, so that a norm stores four bytes a row. transformers' operators
keep x in fp32: 4 bytes an element. In codes, n is stored once for the norm and for all that read y.

The forward is the module's own, some rows at a time: every flavour of RMSNorm gives the bits it gave, without a tensor
in fp32 as large as x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farspan.kernels.activation_codecs.codes import Codec, Encoder, Plain, row_chunks
from farspan.memory.operators.settings import Settings
from farspan.memory.operators.stored import Stored, say_stored


class RMSNorm:
    """Runs a norm of transformers.

    Args:
        module: with `weight` [C] and an epsilon.
        offset: what is added to its weight: 0, or 1 (Gemma).
    """

    def __init__(self, module: nn.Module, settings: Settings, *, offset: float) -> None:
        self.module, self.settings, self.offset = module, settings, offset
        self.plain: Callable[[Tensor], Tensor] = module.forward
        found: Any = module
        self.eps = float(found.variance_epsilon if hasattr(found, "variance_epsilon") else found.eps)
        self._nonzero: bool | None = None

    @property
    def trained(self) -> Tensor:
        weight: Any = self.module.weight
        return weight

    def weight(self) -> Tensor:
        """fp32 [C], what n is multiplied with."""
        return self.trained.detach().float() + self.offset

    def __call__(self, x: Tensor) -> Tensor:
        key = self.settings.key() if self.module.training else None
        x_RC = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y_RC = y.view(x_RC.shape)
        if not torch.is_grad_enabled() or not (x.requires_grad or self.trained.requires_grad):
            for rows in row_chunks(x_RC):
                y_RC[rows] = self.plain(x_RC[rows])
            return y
        codec = self.settings.of_values(x.shape[-1], x.dtype)
        codes = None if isinstance(codec, Plain) else Encoder(codec, x_RC, key)
        inverse_R = torch.empty(x_RC.shape[0], device=x.device)
        with torch.no_grad():
            for rows in row_chunks(x_RC):
                y_RC[rows] = self.plain(x_RC[rows])
                inverse_R[rows] = self._inverse(x_RC[rows])
                if codes is not None:
                    codes.put(rows, x_RC[rows] * inverse_R[rows, None])
        if codes is None:
            keeps = "y" if self._gives_back() else "x"
            return _Norm.apply(x, self.trained, y, inverse_R, self, codec, keeps)
        out: Tensor = _Norm.apply(x, self.trained, y, inverse_R, self, codec, "codes", *codes.parts)
        say_stored(out, Stored(codes.parts, partial(_outputs, self, codec, x.dtype)))
        return out

    def _inverse(self, x_RC: Tensor) -> Tensor:
        """1 / rms, fp32 [R]."""
        return torch.rsqrt(x_RC.float().square().mean(-1) + self.eps)

    def _gives_back(self) -> bool:
        """Whether n can be had from y. A GPU is waited for, so a frozen weight is looked at once."""
        if self._nonzero is None or self.trained.requires_grad:
            self._nonzero = bool((self.weight() != 0).all())
        return self._nonzero


def _outputs(norm: RMSNorm, codec: Codec, dtype: torch.dtype, *parts: Tensor) -> Tensor:
    """y [R, C] again, nearly."""
    weight = norm.weight()
    out = torch.empty(parts[0].shape[0], weight.numel(), dtype=dtype, device=parts[0].device)
    for rows in row_chunks(out):
        out[rows] = codec.decode(*(part[rows] for part in parts)).mul_(weight)
    return out


class _Norm(torch.autograd.Function):
    """x [..., C], w [C] -> y [..., C]. `keeps`: `y`, `x` or `codes`, what n is made of in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        inverse_R: Tensor,
        norm: RMSNorm,
        codec: Codec,
        keeps: str,
        *codes: Tensor,
    ) -> Tensor:
        del weight
        ctx.norm, ctx.codec, ctx.keeps = norm, codec, keeps
        y = y.view_as(y)
        ctx.save_for_backward(inverse_R, *({"x": (x,), "y": (y,)}.get(keeps, codes)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        norm: RMSNorm = ctx.norm
        inverse_R, *kept = ctx.saved_tensors
        width = dy.shape[-1]
        weight = norm.weight()  # asked for again: under ZeRO-3 the one of the forward is gone
        kept = [part.reshape(inverse_R.numel(), -1) for part in kept]
        dy_RC = dy.reshape(-1, width)
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        into_RC = dx.view(dy_RC.shape) if dx is not None else None
        for rows in row_chunks(dy_RC):
            n = _normal(ctx, [part[rows] for part in kept], inverse_R[rows, None], weight)
            if dw is not None:
                dw += (dy_RC[rows] * n).sum(0)
            if into_RC is not None:
                into_RC[rows] = _of_input(n, dy_RC[rows] * weight, inverse_R[rows, None])
            del n  # not beside the next chunk's
        if dw is not None:
            dw = dw.to(norm.trained.dtype)
        return dx, dw, *(None,) * (len(ctx.needs_input_grad) - 2)


def _normal(ctx: Any, kept: list[Tensor], inverse_R1: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) of some rows, fp32."""
    if ctx.keeps == "codes":
        return ctx.codec.decode(*kept)
    return kept[0] * inverse_R1 if ctx.keeps == "x" else kept[0] / weight


def _of_input(n: Tensor, g: Tensor, inverse_R1: Tensor) -> Tensor:
    """The gradient of x, fp32; changes g."""
    mean = (g * n).mean(-1, keepdim=True)
    return g.sub_(n * mean).mul_(inverse_R1)
