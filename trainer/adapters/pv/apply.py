"""PV-Tuning's linear layers: W = s (I - z), with the scales s trained by the optimizer and the integers I by
`trainer.engine_codes` (Malinovskii et al., 2024, https://arxiv.org/abs/2405.14852).

Of a layer the input is stored, once for all that read it. Backward makes the gradient of W some rows at a time, which
becomes that of the scales; in a step that chooses integers it is summed over the ranks, and its largest elements are
kept until the optimizer step (`choose`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farspan.memory.operators import Stored, stored
from farspan.trainer.adapters.peqa.apply import PeqaLinear, replace_rounded
from farspan.trainer.adapters.pv.choose import Changes, Largest, change
from farspan.trainer.adapters.pv.config import PV
from farspan.trainer.bases.linear import IntegerLinear

WORD = 4
"""Bytes: checkpoints hold fp32, and take integers as such."""


class PVLinear(PeqaLinear):
    """See the module.

    Attributes:
        adapter: how its integers are trained.
        trust: of the matrix's length, what the backwards from now on may propose to move; None: they propose nothing.
        proposed: what the last one did.
    """

    def __init__(self, layer: nn.Linear, adapter: PV) -> None:
        super().__init__(layer, adapter.bits, adapter.group)
        self.reads_output = False
        self.adapter = adapter
        self.count = max(1, round(adapter.share * layer.in_features * layer.out_features))
        self.trust: float | None = None
        self.proposed: Changes | None = None
        packed: Any = self.get_buffer("packed")
        store = packed.new_zeros(-(-packed.numel() // WORD) * WORD)  # the matrix, and what fills its last word
        store[: packed.numel()] = packed.view(-1)
        self.register_buffer("packed", store[: packed.numel()].view(packed.shape))

    def words(self) -> Tensor:
        """The packed integers as fp32 [n], live: for those who store or send bits, not numbers."""
        packed: Any = self.packed
        whole = packed.as_strided((-(-packed.numel() // WORD) * WORD,), (1,))
        words: Tensor = whole.view(torch.float32)
        return words

    def node_of(self, x: Tensor, y: Tensor) -> Tensor:
        kept = stored(x)
        return _PVLinear.apply(x, self.scale, y, self, kept.recipe(), *kept.tensors)

    def take_proposed(self) -> int:
        """Change the integers as proposed; returns how many."""
        packed: Any = self.packed
        changes, self.proposed = self.proposed, None
        if changes is None or not changes.at.numel():
            return 0
        change(packed, self.bits, changes)
        return changes.at.numel()

    def rounded(self) -> IntegerLinear:
        """The same, as what runs it."""
        packed: Any = self.packed
        zero: Any = self.zero
        scale = self.scale.detach().clone()
        return IntegerLinear(packed, self.bits, scale, zero, None, bias=self.bias, dtype=self.dtype)


class _PVLinear(torch.autograd.Function):
    """x [..., C], s [N, groups], y [..., N] -> y. `kept`: x, or what it is made from again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, y: Tensor, layer: PVLinear, recipe: Stored, *kept: Tensor
    ) -> Tensor:
        del scale
        ctx.layer, ctx.recipe, ctx.shape = layer, recipe, x.shape
        ctx.save_for_backward(*kept)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layer: PVLinear = ctx.layer
        dy_RN = dy.reshape(-1, dy.shape[-1])
        ds = None
        if ctx.needs_input_grad[1]:
            ds = _backward(layer, dy_RN, ctx.recipe.back(ctx.saved_tensors).reshape(dy_RN.shape[0], -1))
        dx = (dy_RN @ layer.whole()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, ds, *(None,) * (len(ctx.needs_input_grad) - 2)


def _backward(layer: PVLinear, dy_RN: Tensor, x_RC: Tensor) -> Tensor:
    """The gradient of the scales; leaves proposals, where they are wanted."""
    ds, scale = torch.empty_like(layer.scale), layer.scale.detach()
    zero: Any = layer.zero
    packed: Any = layer.packed
    largest = Largest(layer.count, 2**layer.bits - 1) if layer.trust is not None else None
    several = largest is not None and dist.is_initialized() and dist.get_world_size() > 1
    for rows in layer.row_chunks(dy_RN):
        of_weight = (dy_RN[:, rows].t() @ x_RC).to(ds.dtype)
        integers = layer.integers(rows).to(ds.dtype)
        of_weight = of_weight.view_as(integers)
        ds[rows] = (of_weight * integers).sum(-1)
        if several:
            dist.all_reduce(of_weight)
        if largest is not None:
            first = rows.start * layer.in_features
            largest.look(first, of_weight, integers, zero[rows, :, None], scale[rows, :, None])
        del of_weight, integers
    if largest is not None and layer.trust is not None:
        layer.proposed = largest.changes(packed, layer.bits, zero, scale, layer.trust)
    return ds


def add_codes(model: nn.Module, adapter: PV) -> list[str]:
    """Freeze the model, round its linear layers, and make their scales trainable; returns their names.

    Raises:
        JobError: rows do not split into such groups or bytes, or no layer matches.
    """
    return replace_rounded(model, adapter, lambda layer: PVLinear(layer, adapter))


def coded_layers(model: nn.Module) -> dict[str, PVLinear]:
    """Layers whose integers are trained, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PVLinear)}
