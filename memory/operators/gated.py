"""The gated unit of an MLP as one node: product = act(gate) * up (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

Backward needs act'(gate) up and act(gate); the product itself is what the last linear layer reads, whose weight or
adapter needs it in its own backward. As separate operators all four are stored: gate, act(gate), up and the product. As
one node, gate and up are, and the rest is made again, some rows at a time, by the same operators: the same bits.

In 4 bits it is the derivative that is stored and not its argument (S2A, see `kernels.activation_codecs`): act'(gate) in
its known range, act(gate) and up by groups; the product is made of the last two.

R rows, F width of the MLP.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from farspan.kernels.activation_codecs.codes import Codec, Encoder, Plain, row_chunks
from farspan.memory.density import Density
from farspan.memory.operators.settings import Settings
from farspan.memory.operators.stored import Stored, say_stored

_aten = torch.ops.aten


class GatedUnit:
    """act(gate) * up.

    Args:
        activation: `silu`, `gelu` or `gelu_tanh`.
        density: a penalty on act(gate), if there is one; of codes, on what they stand for.
    """

    def __init__(self, settings: Settings, activation: str, density: Density | None = None) -> None:
        self.settings, self.activation, self.density = settings, activation, density
        self._approximate = "tanh" if activation == "gelu_tanh" else "none"

    def act(self, gate: Tensor) -> Tensor:
        if self.activation == "silu":
            return functional.silu(gate)
        return functional.gelu(gate, approximate=self._approximate)

    def act_backward(self, d: Tensor, gate: Tensor) -> Tensor:
        """d act'(gate), by autograd's own operator."""
        if self.activation == "silu":
            return _aten.silu_backward(d, gate)
        return _aten.gelu_backward(d, gate, approximate=self._approximate)

    def __call__(self, gate: Tensor, up: Tensor, *, training: bool, first: int = 0) -> Tensor:
        """The product [..., F]; its `Stored` form says how to make it again. `first`: see `memory.density`."""
        key = self.settings.key() if training else None
        gate_RF, up_RF = _rows(gate), _rows(up)
        product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        product_RF = product.view(gate_RF.shape)
        recorded = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
        codecs = self.codecs(gate.shape[-1], gate.dtype) if recorded else ()
        keys = [None if key is None else key + i for i in range(len(codecs))]  # noise of its own for each
        codes = [Encoder(c, gate_RF, k) for c, k in zip(codecs, keys)]
        with torch.no_grad():
            for rows in row_chunks(gate_RF):
                torch.mul(self.act(gate_RF[rows]), up_RF[rows], out=product_RF[rows])
                if codes:
                    self._store(codes, rows, gate_RF[rows], up_RF[rows])
        if not recorded:
            return product
        parts = tuple(part for encoder in codes for part in encoder.parts) if codes else (gate, up)
        out: Tensor = _Gated.apply(gate, up, product, self, codecs, first, *parts)
        say_stored(out, Stored(parts, partial(_product, self, codecs, gate.dtype, gate.shape[-1])))
        return out

    def codecs(self, width: int, dtype: torch.dtype) -> tuple[Codec, ...]:
        """Of gate and up; or of act'(gate), act(gate) and up; none where gate and up are kept as they are."""
        values = self.settings.of_values(width, dtype)
        if isinstance(values, Plain):
            return ()
        if self.settings.kept_as == "fp8":
            return values, values
        return self.settings.of_derivative(self.activation), values, values

    def _store(self, codes: list[Encoder], rows: slice, gate: Tensor, up: Tensor) -> None:
        if self.settings.kept_as == "fp8":
            codes[0].put(rows, gate.float())
        else:
            wide = gate.float()
            codes[0].put(rows, self.act_backward(torch.ones_like(wide), wide))
            codes[1].put(rows, self.act(wide))
        codes[-1].put(rows, up.float())


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _decoded(codecs: tuple[Codec, ...], parts: list[Tensor], rows: slice, first: int = 0) -> list[Tensor]:
    """What each code from the `first` on stands for, of some rows, fp32; without codes gate and up."""
    if not codecs:
        return [part[rows] for part in parts]
    found, at = [], sum(codec.count for codec in codecs[:first])
    for codec in codecs[first:]:
        found.append(codec.decode(*(part[rows] for part in parts[at : at + codec.count])))
        at += codec.count
    return found


def _product(unit: GatedUnit, codecs: tuple[Codec, ...], dtype: torch.dtype, width: int, *parts: Tensor) -> Tensor:
    """[R, F] again: of gate and up the same bits, of codes nearly."""
    kept = [_rows(part) for part in parts]
    out = torch.empty(kept[0].shape[0], width, dtype=dtype, device=kept[0].device)
    for rows in row_chunks(out):
        out[rows] = _multiplied(unit, _decoded(codecs, kept, rows, first=max(0, len(codecs) - 2)))
    return out


def _multiplied(unit: GatedUnit, values: list[Tensor]) -> Tensor:
    """Of act(gate), or gate, and up."""
    act = values[0] if unit.settings.kept_as == "int4" else unit.act(values[0])
    return act * values[1]


class _Gated(torch.autograd.Function):
    """gate, up [..., F] -> product [..., F]."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        product: Tensor,
        unit: GatedUnit,
        codecs: tuple[Codec, ...],
        first: int,
        *parts: Tensor,
    ) -> Tensor:
        del gate, up
        ctx.unit, ctx.codecs, ctx.first = unit, codecs, first
        ctx.save_for_backward(*parts)
        return product.view_as(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        unit: GatedUnit = ctx.unit
        kept = [_rows(part) for part in ctx.saved_tensors]
        d_RF = _rows(d)
        d_gate, d_up = (torch.empty(d.shape, dtype=d.dtype, device=d.device) for _ in range(2))
        into_gate, into_up = d_gate.view(d_RF.shape), d_up.view(d_RF.shape)
        for rows in row_chunks(d_RF):
            first = ctx.first + rows.start
            _backward(unit, _decoded(ctx.codecs, kept, rows), d_RF[rows], into_gate[rows], into_up[rows], first)
        return d_gate, d_up, *(None,) * (len(ctx.needs_input_grad) - 2)


def _backward(unit: GatedUnit, values: list[Tensor], d: Tensor, into_gate: Tensor, into_up: Tensor, first: int) -> None:
    """Some rows; `values` are those of `_decoded`."""
    if len(values) == 3:
        derivative, act, up = values
        if unit.density is not None:
            into_gate.copy_(unit.density.gradient(act, first).add_(up.mul_(d)).mul_(derivative))
        else:
            into_gate.copy_(derivative.mul_(up).mul_(d))
        into_up.copy_(act.mul_(d))
        return
    gate, up = values
    d = d.to(gate.dtype)
    if unit.density is not None:
        act = unit.act(gate)
        into_up.copy_(act * d)
        act = unit.density.gradient(act, first).addcmul_(d.to(_wide(act)), up.to(_wide(act))).to(gate.dtype)
        into_gate.copy_(unit.act_backward(act, gate))
        return
    into_up.copy_(unit.act(gate) * d)
    into_gate.copy_(unit.act_backward(d * up, gate))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
