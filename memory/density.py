"""A loss on the density of MLP activations, added to gradients where the activations are.

Source: Runwal et al., From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in
Transformers, 2024, https://arxiv.org/abs/2402.01911. With o the activated gate of a decoder layer's MLP, F wide,

    penalty = weight * sum over layers of mean(o^2 / (o^2 + eps)),

a smooth count of what is not zero. The mean is over the tokens that the loss is taken on, of all ranks and
micro-batches, and over F. (The authors' code takes the mean of the layers, and over padding too.)

No penalty is ever formed in forward: it would have to leave layers that are checkpointed, tiled or reversible. A node
on the activation returns it as it is, keeps it (the product with `up` keeps it too, so nothing more is stored) and
adds weight * 2 eps o / (o^2 + eps)^2 / F times what the sum of token losses is multiplied with, which the loss's own
backward sees first. So it is right however the loss is scaled and spread, and whatever runs the layer a second time.
Each row passes once through backward, and there penalty and density are counted.

R rows, F width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farspan.errors import JobError
from farspan.kernels.activation_codecs.codes import row_chunks

FIRST_ROW = "first_row"
"""Attribute of an MLP that is run again in tiles: the row its next tile begins with."""
_ACTIVATIONS = ("act_fn", "activation_fn")


class Density:
    """What the layers of one model share.

    Args:
        weight: of the penalty. eps: where o^2 = eps an activation counts half.
        threshold: an activation is dense when |o| is larger.
    """

    def __init__(self, weight: float, eps: float, threshold: float) -> None:
        self.weight, self.eps, self.threshold = weight, eps, threshold
        self._counted: Tensor | None = None
        self._scale: Tensor | None = None
        self._totals: Tensor | None = None

    def attach(self, loss: Tensor, labels: Tensor, ignored: int) -> Tensor:
        """The sum of token losses, whose backward tells the layers' what to scale by.

        One backward belongs to one forward: losses of two forwards must not be added before.

        Args:
            labels: int64 [1, R] of this rank's rows; those that are `ignored` do not count.
        """
        return _Scale.apply(loss, self, (labels != ignored).flatten()) if loss.requires_grad else loss

    def take(self, device: torch.device) -> Tensor:
        """Sums since the last call, float64 [3]: over layers and counted rows, of the penalty before its weight, of the
        share that is dense, and their number. A sum over ranks makes them those of the whole step."""
        found, self._totals = self._totals, None
        self._counted = self._scale = None
        return torch.zeros(3, dtype=torch.float64, device=device) if found is None else found

    def begin(self, scale: Tensor, counted: Tensor) -> None:
        self._scale, self._counted = scale, counted

    def gradient(self, o_RF: Tensor, first: int) -> Tensor:
        """[R, F] of the penalty, in fp32 or wider, of some rows from `first` on; counts them.

        Without a loss (a layer run alone) it is zero.
        """
        wide = o_RF.to(torch.promote_types(o_RF.dtype, torch.float32))
        dense = (wide.abs() > self.threshold).to(wide.dtype).mean(1)
        square = wide.square()
        below = square + self.eps
        if self._scale is None or self._counted is None:
            return wide.mul(2 * self.eps).div_(below.square_()).mul_(0.0)
        rows = self._counted[first : first + o_RF.shape[0]].to(wide.dtype)
        sums = torch.stack([(square.div_(below).mean(1) * rows).sum(), (dense * rows).sum(), rows.sum()]).double()
        self._totals = sums if self._totals is None else self._totals.add_(sums)
        rows = rows * (self._scale * (2 * self.eps * self.weight / o_RF.shape[1])).to(wide.dtype)
        return wide.mul(rows[:, None]).div_(below.square_())


class _Scale(torch.autograd.Function):
    """Loss, 0-dim -> the same."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, density: Density, counted: Tensor) -> Tensor:
        ctx.density, ctx.counted = density, counted
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        ctx.density.begin(upstream, ctx.counted)
        return upstream, None, None


class _Penalised(torch.autograd.Function):
    """o [..., F] -> o."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, density: Density, first: int) -> Tensor:
        ctx.density, ctx.first = density, first
        ctx.save_for_backward(o)
        return o.view_as(o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        (o,) = ctx.saved_tensors
        o_RF, d_RF = o.reshape(-1, o.shape[-1]), d.reshape(-1, o.shape[-1])
        out = torch.empty(o.shape, dtype=d.dtype, device=d.device)
        out_RF = out.view(o_RF.shape)
        for rows in row_chunks(o_RF):
            out_RF[rows] = ctx.density.gradient(o_RF[rows], ctx.first + rows.start).add_(d_RF[rows])
        return out, None, None


class PenalisedActivation(nn.Module):
    """An MLP's activation function with the penalty on what it gives."""

    def __init__(self, act: nn.Module, density: Density, mlp: nn.Module) -> None:
        super().__init__()
        self.act, self.density = act, density
        self._mlp = (mlp,)  # in a tuple: it is no child of this one

    def forward(self, gate: Tensor) -> Tensor:
        o: Tensor = self.act(gate)
        if not (torch.is_grad_enabled() and o.requires_grad):
            return o
        return _Penalised.apply(o, self.density, getattr(self._mlp[0], FIRST_ROW, 0))


def add_density(layers: list[nn.Module], density: Density) -> None:
    """Put the penalty on the activated gate of every decoder layer.

    Raises:
        JobError: a layer has no single MLP with an activation function (mixture of experts, say).
    """
    for layer in layers:
        mlps = [m for m in layer.modules() if hasattr(m, "down_proj") and any(hasattr(m, n) for n in _ACTIVATIONS)]
        if len(mlps) != 1 or hasattr(mlps[0], "experts"):
            raise JobError(
                f"the density of {type(layer).__name__} cannot be penalised",
                at="density",
                why=f"it has {len(mlps)} MLPs with an activation function of their own, and one is needed",
                try_="--set density.weight=0",
            )
        name = next(n for n in _ACTIVATIONS if hasattr(mlps[0], n))
        setattr(mlps[0], name, PenalisedActivation(getattr(mlps[0], name), density, mlps[0]))
