"""Muon: the momentum of a matrix, with all its singular values made one.

    b <- momentum b + (1 - momentum) g;   n = (1 - momentum) g + momentum b (Nesterov) or b
    w <- (1 - lr decay) w - lr 0.2 sqrt(max(M, N)) orthogonal(n)

A quintic Newton-Schulz iteration makes U V^T of U S V^T nearly, all singular values between about 0.7 and 1.2 (Jordan
et al., 2024); the factor makes a step as large as AdamW's on average (Liu et al., 2025). torch has the same rule
(`torch.optim.Muon`), which always iterates in bf16; there two ranks whose gradients differ in the last bit part by a
thousandth. Here fp32 models iterate in fp32, and bf16 ones get torch's bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farspan.trainer.optimizers.rule import Rule

if TYPE_CHECKING:
    from farspan.trainer.optimizers.config import Muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5: the steepest at 0 that stays bounded (Jordan et al.)."""
EPS = 1e-7
RMS_OF_ADAMW = 0.2


class Orthogonal(Rule):
    """Muon for matrices. State `momentum` [M, N].

    Args:
        dtype: of the iteration.
    """

    def __init__(
        self, masters: Mapping[str, Tensor], decay: Mapping[str, float], optim: Muon, dtype: torch.dtype
    ) -> None:
        super().__init__(masters, decay)
        self.optim, self.dtype = optim, dtype
        self.states = {name: {"momentum": torch.zeros_like(master.detach())} for name, master in masters.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, count: int) -> None:
        for name, gradient in gradients.items():
            self._step(name, gradient, lr)

    def _step(self, name: str, gradient: Tensor, lr: float) -> None:
        master, momentum, decayed = self.masters[name], self.states[name]["momentum"], self.optim.momentum
        # averages, not sums, as torch has it: the iteration starts from a matrix of length one either way
        momentum.lerp_(gradient, 1 - decayed)
        ahead = gradient.lerp_(momentum, decayed) if self.optim.nesterov else momentum
        update = orthogonal(ahead, self.optim.ns_steps, self.dtype)
        size = RMS_OF_ADAMW * math.sqrt(max(master.shape))
        master.mul_(1 - lr * self.decay[name]).add_(update, alpha=-lr * size)


def orthogonal(x_MN: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearly U V^T of a matrix U S V^T, in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = x_MN.shape[0] > x_MN.shape[1]
    x = x_MN.to(dtype, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=EPS))  # no singular value above one
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
