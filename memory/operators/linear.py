"""A trained linear layer that keeps of its input what the operator before it says stands for it (`stored`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from farspan.memory.operators.stored import Stored, stored


def keep_stored(layer: nn.Linear) -> None:
    """Have a layer keep its input so, on the instance."""
    layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    layer.node_of = partial(_node, layer)  # type: ignore[assignment]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        y = functional.linear(x, layer.weight, layer.bias)
    return _node(layer, x, y)


def _node(layer: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """The layer's autograd node around an output that is at hand."""
    kept = stored(x)
    return _Linear.apply(x, layer.weight, layer.bias, y, layer, kept.recipe(), *kept.tensors)


class _Linear(torch.autograd.Function):
    """x [..., C], W [N, C], b [N], y [..., N] -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        layer: nn.Linear,
        recipe: Stored,
        *kept: Tensor,
    ) -> Tensor:
        del weight, bias
        # the weight is looked up again in backward: under ZeRO-3 the tensor seen here is gone by then
        ctx.layer, ctx.recipe, ctx.shape = layer, recipe, x.shape
        ctx.save_for_backward(*(kept if ctx.needs_input_grad[1] else ()))
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dy_RN = dy.reshape(-1, dy.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[1]:
            x_RC = ctx.recipe.back(ctx.saved_tensors).reshape(dy_RN.shape[0], -1)
            dw = dy_RN.t() @ x_RC
            del x_RC
        if ctx.needs_input_grad[2]:
            db = dy_RN.sum(0)
        if ctx.needs_input_grad[0]:
            dx = (dy_RN @ ctx.layer.weight).view(ctx.shape)
        return dx, dw, db, *(None,) * (len(ctx.needs_input_grad) - 3)
