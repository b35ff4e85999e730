"""PaCA's linear layers: y = x W^T with some columns of W trained (Woo et al., 2025, https://arxiv.org/abs/2503.01905).

With I the columns and P = W[:, I] the trained parameter, forward puts P into W and runs one matmul; of x only x[:, I]
is stored; backward is dP = dy^T x[:, I] and dx = dy W. P is a parameter of its own, so that engines give it an fp32
master, and W is written in every forward and backward: whoever changed P, and whoever gave out another copy of W
(ZeRO-3 gathers it anew), what runs is the trained matrix, in training and in evaluation. That costs a thousandth of
the matmul.

On a quantized base (QPaCA) the columns are kept in the model's dtype and put into the matrix whenever it is made whole:
y = x Q^T + x[:, I] (P - Q[:, I])^T in one matmul.

Layers that read the same input (q, k, v; gate, up) have the same columns and share one slice.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farspan.errors import JobError
from farspan.trainer.adapters.paca.config import PaCA
from farspan.trainer.adapters.targets import SHARED, target_linears
from farspan.trainer.bases.linear import QuantizedLinear

COLUMNS, INDICES = "paca_columns", "paca_indices"


class Columns:
    """The columns that some layers share, and the slice of the input they have all been given last."""

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices
        self._of: weakref.ref[Tensor] | None = None
        self._slice: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """x[..., I], the same tensor for the same x; let go of with x."""
        if self._slice is None or self._of is None or self._of() is not x:
            self._slice = x.detach().index_select(-1, self.indices.to(x.device))
            self._of = weakref.ref(x, self._forget)
        return self._slice

    def _forget(self, of: weakref.ref[Tensor]) -> None:
        if of is self._of:
            self._of = self._slice = None


def add_columns(model: nn.Module, adapter: PaCA, *, seed: int) -> dict[str, Tensor]:
    """Freeze the model and make the columns of its linear layers trainable. Every rank draws the same ones.

    Returns:
        their indices, int64 [rank], by the name of the layer.

    Raises:
        JobError: a matrix has fewer columns, or no layer matches.
    """
    targets = target_linears(model, adapter.target_modules)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in targets.items():
        if layer is head:
            raise JobError(
                "columns of the output projection cannot be trained",
                at="adapter.target_modules",
                why=f"logits are never held whole: the loss reads the weight of {name} itself, tile by tile",
                try_="leave it out, or --set adapter.type=lora with adapter.modules_to_save",
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    groups: dict[str, Columns] = {}
    found: dict[str, Tensor] = {}
    for name, layer in targets.items():
        block, _, last = name.rpartition(".")
        if layer.in_features < adapter.rank:
            raise JobError(
                f"{name} has {layer.in_features} columns, fewer than the {adapter.rank} to be trained",
                at="adapter.rank",
                why="columns are drawn without repetition",
                try_=f"--set adapter.rank={layer.in_features} or less",
            )
        key = f"{block}.{SHARED.get(last, last)}"
        if key not in groups:
            drawn = torch.randperm(layer.in_features, generator=draw, device="cpu")[: adapter.rank]
            groups[key] = Columns(drawn.sort().values)
        _adapt(layer, groups[key])
        found[name] = groups[key].indices
    return found


def _adapt(layer: nn.Linear, columns: Columns) -> None:
    given = layer.weight  # of a quantized layer, made for this
    with _whole(given):
        started = given.detach().index_select(1, columns.indices.to(given.device))
    layer.register_parameter(COLUMNS, nn.Parameter(started.clone()))
    layer.register_buffer(INDICES, columns.indices.to(given.device))
    if isinstance(layer, QuantizedLinear):
        layer.whole = partial(_with_columns, layer, layer.whole)  # type: ignore[method-assign]
    plain = layer.forward
    layer.forward = partial(_forward, layer, columns, plain)  # type: ignore[method-assign]
    layer.node_of = partial(_node, layer, columns)  # type: ignore[assignment]


def _whole(weight: Any) -> AbstractContextManager[object]:
    """Around a look at a weight that ZeRO-3 may have cut up."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from farspan.trainer.engine_deepspeed import gathered

    return gathered([weight])


def _with_columns(layer: Any, whole: Any) -> Tensor:
    """What a quantized layer makes of its weight each time, the trained columns in their place."""
    weight: Tensor = whole()
    return weight.index_copy_(1, getattr(layer, INDICES), getattr(layer, COLUMNS).detach().to(weight.dtype))


def write_back(layer: Any) -> None:
    """Put the trained columns into the weight; a quantized one is made with them."""
    if isinstance(layer, QuantizedLinear):
        return
    layer.weight.data.index_copy_(1, getattr(layer, INDICES), getattr(layer, COLUMNS).data)


def _forward(layer: nn.Linear, columns: Columns, plain: Any, x: Tensor) -> Tensor:
    write_back(layer)
    if not torch.is_grad_enabled():
        return plain(x)
    with torch.no_grad():
        y = plain(x)
    return _node(layer, columns, x, y)


def _node(layer: nn.Linear, columns: Columns, x: Tensor, y: Tensor) -> Tensor:
    """The layer's autograd node around an output that is at hand."""
    return _PacaLinear.apply(x, getattr(layer, COLUMNS), columns.of(x), y, layer)


class _PacaLinear(torch.autograd.Function):
    """x [..., C], P [N, r], x[..., I] [..., r], y [..., N] -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor, x_I: Tensor, y: Tensor, layer: nn.Linear) -> Tensor:
        del x, columns
        ctx.layer = layer
        ctx.save_for_backward(x_I)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x_I,) = ctx.saved_tensors
        dy_RN = dy.reshape(-1, dy.shape[-1])
        d_columns = dy_RN.t() @ x_I.reshape(-1, x_I.shape[-1]) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            write_back(ctx.layer)
            dx = (dy_RN @ ctx.layer.weight).view(*dy.shape[:-1], -1)
        return dx, d_columns, None, None, None
