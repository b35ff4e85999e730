"""L4Q's linear layers: y = x W^T with W = t round(clip((W0 + s B A - o) / t)) + o, and A, B, the steps t and the
offsets o trained (Jeon et al., 2024, https://arxiv.org/abs/2402.04902).

Of a layer the input alone is stored, once for all that read it. W is made anew in forward and in backward some rows at
a time; so is its gradient dW = dy^T x, which becomes those of A, B, t and o at once and is never whole. W0 is not
copied to fp32. What is trained is in fp32 whatever the model's dtype: A and B never meet the activations, and an fp32
parameter is its own master.

Steps and offsets are trained in units of a power of two near the matrix's first step, so that one learning rate suits
them and A and B, in any model; and their gradients are scaled by LSQ's 1 / sqrt(elements x highest integer), so that
they do not drown the others where the norm of all is clipped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from farspan.kernels.quantized import chunk, learned_step
from farspan.memory.operators import Stored, stored
from farspan.trainer.adapters.l4q.config import L4Q
from farspan.trainer.adapters.peqa.apply import require_split
from farspan.trainer.adapters.targets import target_linears
from farspan.trainer.bases.linear import IntegerLinear, QuantizedLinear

TRAINED = ("lora_A", "lora_B", "step", "offset")
"""Names of a layer's parameters. fp32 [r, C], [N, r] and, one row's groups after another's, [N * groups] twice: no
matrices, so that no weight decay shrinks them."""
LEAST_STEP = 2.0**-10
"""Of the unit: a step that training drives to zero stays there."""


class L4QLinear(QuantizedLinear):
    """See the module. `original` is W0 [N, C], frozen.

    Args:
        draw: gives A's first values; B starts at zero.
    """

    def __init__(self, layer: nn.Linear, adapter: L4Q, draw: torch.Generator) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias, layer.weight.dtype)
        self.bits, self.group = adapter.bits, adapter.group
        self.scale = (adapter.alpha if adapter.alpha is not None else 2.0 * adapter.rank) / adapter.rank
        self.original = layer.weight.requires_grad_(False)
        self.unit = learned_step.unit_of(layer.weight, self.bits, self.group)
        step, offset = learned_step.first_steps(layer.weight, self.bits, self.group, adapter.start)
        self.groups = step.shape[1]
        self.damping = 1 / math.sqrt(self.in_features // self.groups * learned_step.bounds(self.bits)[1])
        bound = 1 / math.sqrt(self.in_features)  # peft's: kaiming_uniform with a = sqrt(5)
        a = torch.empty(adapter.rank, self.in_features, device="cpu").uniform_(-bound, bound, generator=draw)
        self.lora_A = nn.Parameter(a.to(layer.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, adapter.rank, device=layer.weight.device))
        self.step = nn.Parameter((step / self.unit).flatten())
        self.offset = nn.Parameter((offset / self.unit).flatten())

    def steps(self) -> tuple[Tensor, Tensor]:
        """t and o, [N, groups, 1]."""
        step = self.step.detach().mul(self.unit).clamp_min_(LEAST_STEP * self.unit)
        shape = (self.out_features, self.groups, 1)
        return step.view(shape), self.offset.detach().mul(self.unit).view(shape)

    def places(self, rows: slice, step: Tensor, offset: Tensor) -> Tensor:
        """v of some rows, [n, groups, elements]."""
        merged = torch.addmm(
            self.original[rows].to(step.dtype), self.lora_B.detach()[rows], self.lora_A.detach(), alpha=self.scale
        )
        return learned_step.places(merged.view(-1, self.groups, self.in_features // self.groups), step, offset)

    def row_chunks(self) -> list[slice]:
        rows = max(1, chunk(self.original) // self.in_features)
        return [slice(first, first + rows) for first in range(0, self.out_features, rows)]

    def whole(self) -> Tensor:
        step, offset = self.steps()
        out = torch.empty_like(self.original)
        for rows in self.row_chunks():
            q = learned_step.codes(self.places(rows, step[rows], offset[rows]), self.bits)
            out[rows] = learned_step.values(q, step[rows], offset[rows]).view(-1, self.in_features)
        return out

    def rounded(self) -> IntegerLinear:
        """The integers it stands for, as what runs them."""
        step, offset = self.steps()
        low, _ = learned_step.bounds(self.bits)
        codes = torch.empty(self.original.shape, dtype=torch.uint8, device=self.original.device)
        for rows in self.row_chunks():
            q = learned_step.codes(self.places(rows, step[rows], offset[rows]), self.bits)
            codes[rows] = q.sub_(low).to(torch.uint8).view(-1, self.in_features)
        zero = torch.full((self.out_features, self.groups), -low, dtype=torch.uint8, device=codes.device)
        return IntegerLinear.of_codes(
            codes, self.bits, step[..., 0], zero, offset[..., 0], bias=self.bias, dtype=self.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(x, self.whole(), self.bias)
        with torch.no_grad():
            y = functional.linear(x, self.whole(), self.bias)
        return self.node_of(x, y)

    def node_of(self, x: Tensor, y: Tensor) -> Tensor:
        kept = stored(x)
        trained = (getattr(self, name) for name in TRAINED)
        return _L4QLinear.apply(x, *trained, y, self, kept.recipe(), *kept.tensors)


class _L4QLinear(torch.autograd.Function):
    """x [..., C], the trained four, y [..., N] -> y. `kept`: x, or what it is made from again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        step: Tensor,
        offset: Tensor,
        y: Tensor,
        layer: L4QLinear,
        recipe: Stored,
        *kept: Tensor,
    ) -> Tensor:
        del a, b, step, offset
        ctx.layer, ctx.recipe, ctx.shape = layer, recipe, x.shape
        ctx.save_for_backward(*kept)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        layer: L4QLinear = ctx.layer
        dy_RN = dy.reshape(-1, dy.shape[-1])
        found: tuple[Any, ...] = (None,) * 4
        if any(ctx.needs_input_grad[1:5]):
            x_RC = ctx.recipe.back(ctx.saved_tensors).reshape(dy_RN.shape[0], -1)
            weight, found = _backward(layer, dy_RN, x_RC)
            del x_RC
        else:
            weight = layer.whole()
        dx = (dy_RN @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, *found, *(None,) * (len(ctx.needs_input_grad) - 5)


def _backward(layer: L4QLinear, dy_RN: Tensor, x_RC: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """W, and the gradients of A, B, steps and offsets."""
    step, offset = layer.steps()
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    weight = torch.empty_like(layer.original)
    da, db = torch.zeros_like(a), torch.empty_like(b)
    d_step, d_offset = torch.empty_like(step[..., 0]), torch.empty_like(offset[..., 0])
    for rows in layer.row_chunks():
        v = layer.places(rows, step[rows], offset[rows])
        q = learned_step.codes(v, layer.bits)
        weight[rows] = learned_step.values(q, step[rows], offset[rows]).view(-1, layer.in_features)
        of_w = (dy_RN[:, rows].t() @ x_RC).to(step.dtype)
        of_v, d_step[rows], d_offset[rows] = learned_step.gradients(of_w.view_as(v), v, q, layer.bits)
        del v, q, of_w
        of_v = of_v.view(-1, layer.in_features)
        da.addmm_(b[rows].t(), of_v, alpha=layer.scale)
        db[rows] = torch.mm(of_v, a.t()).mul_(layer.scale)
        del of_v
    damping = layer.damping * layer.unit
    return weight, (da, db, d_step.mul_(damping).flatten(), d_offset.mul_(damping).flatten())


def add_learned_steps(model: nn.Module, adapter: L4Q, *, seed: int) -> list[str]:
    """Freeze the model and have its linear layers learn adapters and their rounding; returns their names.

    Raises:
        JobError: rows do not split into such groups or bytes, or no layer matches.
    """
    targets = target_linears(model, adapter.target_modules)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, layer in targets.items():
        require_split(name, layer, adapter.group)
        model.set_submodule(name, L4QLinear(layer, adapter, draw))
    return list(targets)
