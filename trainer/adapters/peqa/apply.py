"""PEQA's linear layers: W = s (I - z) with the integers I and zero points z frozen and the scales s trained
(Kim et al., 2023, https://arxiv.org/abs/2305.14152).

With a scale for each row, ds_o = sum_t dy_to y_to / s_o: backward needs the layer's output, which mostly somebody else
keeps anyway (v, gate, up), and neither the input nor a gradient as large as W. With a scale for each group of a row it
needs the input, and makes the gradient of W some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from farspan.errors import JobError
from farspan.kernels.quantized import chunk
from farspan.kernels.quantized.integers import pack, quantize_rows, unpack
from farspan.memory.operators.stored import Stored, stored
from farspan.trainer.adapters.peqa.config import PEQA
from farspan.trainer.adapters.targets import target_linears
from farspan.trainer.bases.linear import QuantizedLinear

if TYPE_CHECKING:
    from farspan.trainer.adapters.pv.config import PV

SCALE = "scale"
"""Name of the trained parameter. fp32 [N, groups]."""


class PeqaLinear(QuantizedLinear):
    """See the module."""

    def __init__(self, layer: nn.Linear, bits: int, group: int | None) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias, layer.weight.dtype)
        self.bits, self.group = bits, group
        self.reads_output = group is None
        integers, scale, zero = quantize_rows(layer.weight, bits, group)
        self.register_buffer("packed", pack(integers, bits))
        self.register_buffer("zero", zero)
        self.scale = nn.Parameter(scale)
        self.scale.scales_weights = True  # type: ignore[attr-defined]  # see `trainer.optimizer.split_by_decay`

    def integers(self, rows: slice = slice(None)) -> Tensor:
        """I - z of some rows, fp32 [n, groups, elements]."""
        packed: Any = self.packed
        zero: Any = self.zero
        values = unpack(packed[rows], self.bits).view(-1, zero.shape[1], self.in_features // zero.shape[1])
        return values.float() - zero[rows, :, None]

    def whole(self) -> Tensor:
        scale = self.scale.detach()
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))  # DeepSpeed makes it bf16
        out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=scale.device)
        for rows in self.row_chunks(out):
            out[rows] = self.integers(rows).to(scale.dtype).mul_(scale[rows, :, None]).view(-1, self.in_features)
        return out

    def row_chunks(self, like: Tensor) -> list[slice]:
        step = max(1, chunk(like) // self.in_features)
        return [slice(first, first + step) for first in range(0, self.out_features, step)]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(x, self.whole(), self.bias)
        with torch.no_grad():
            y = functional.linear(x, self.whole(), self.bias)
        return self.node_of(x, y)

    def node_of(self, x: Tensor, y: Tensor) -> Tensor:
        kept = stored(x) if self.scale.shape[1] > 1 else Stored((y,))
        return _PeqaLinear.apply(x, self.scale, y, self, kept.recipe(), *kept.tensors)


class _PeqaLinear(torch.autograd.Function):
    """x [..., C], s [N, groups], y [..., N] -> y. `kept`: y, or of grouped scales what `recipe` makes x from."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, y: Tensor, layer: PeqaLinear, recipe: Stored, *kept: Tensor
    ) -> Tensor:
        ctx.layer, ctx.recipe = layer, recipe
        y = y.view_as(y)
        ctx.save_for_backward(*((y,) if scale.shape[1] == 1 else kept))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layer: PeqaLinear = ctx.layer
        dy_RN = dy.reshape(-1, dy.shape[-1])
        ds = None
        if ctx.needs_input_grad[1]:
            kept = ctx.recipe.back(ctx.saved_tensors).reshape(dy_RN.shape[0], -1)
            ds = _of_rows(layer, dy_RN, kept) if layer.scale.shape[1] == 1 else _of_groups(layer, dy_RN, kept)
        dx = (dy_RN @ layer.whole()).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return dx, ds, *(None,) * (len(ctx.needs_input_grad) - 2)


def _of_rows(layer: PeqaLinear, dy_RN: Tensor, y_RN: Tensor) -> Tensor:
    total = torch.zeros(layer.out_features, dtype=layer.scale.dtype, device=dy_RN.device)
    step = max(1, chunk(dy_RN) // layer.out_features)
    for first in range(0, dy_RN.shape[0], step):
        some = y_RN[first : first + step].to(total.dtype)
        if layer.bias is not None:
            some = some - layer.bias
        total += (some * dy_RN[first : first + step]).sum(0)
    scale = layer.scale.detach()[:, 0]
    return torch.where(scale != 0, total / scale, torch.zeros_like(total))[:, None]


def _of_groups(layer: PeqaLinear, dy_RN: Tensor, x_RC: Tensor) -> Tensor:
    found = torch.empty_like(layer.scale)
    for rows in layer.row_chunks(dy_RN):
        of_weight = (dy_RN[:, rows].t() @ x_RC).to(found.dtype)
        integers = layer.integers(rows).to(found.dtype)
        found[rows] = (of_weight.view_as(integers) * integers).sum(-1)
    return found


def add_scales(model: nn.Module, adapter: PEQA) -> list[str]:
    """Freeze the model, round its linear layers, and make their scales trainable; returns their names.

    Raises:
        JobError: rows do not split into such groups or bytes, or no layer matches.
    """
    return replace_rounded(model, adapter, lambda layer: PeqaLinear(layer, adapter.bits, adapter.group))


def replace_rounded(model: nn.Module, adapter: PEQA | PV, made: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Freeze the model and put what rounds them in the place of its linear layers; returns their names.

    Raises:
        JobError: rows do not split into such groups or bytes, or no layer matches.
    """
    targets = target_linears(model, adapter.target_modules)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in targets.items():
        require_split(name, layer, adapter.group)
        model.set_submodule(name, made(layer))
    return list(targets)


def require_split(name: str, layer: nn.Linear, group: int | None) -> None:
    """Refuse a layer whose rows do not split into groups and bytes.

    Raises:
        JobError: they do not.
    """
    group = group or 8
    if layer.in_features % group or layer.in_features % 8:
        raise JobError(
            f"rows of {layer.in_features} elements do not split into groups of {group}",
            at="adapter.group",
            why=f"{name} has {layer.in_features} inputs; 8 elements are packed into whole bytes",
            try_="--set adapter.group=null, or a divisor",
        )
