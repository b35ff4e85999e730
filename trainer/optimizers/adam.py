"""AdamW, LAMB, and the step that all Adams share.

m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
AdamW:  w <- (1 - lr decay) w - lr u                               (Loshchilov and Hutter, 2019)
LAMB:   s = u + decay w;  w <- w - lr |w| / |s| s                  (You et al., 2020)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from farspan.trainer.optimizer import global_norm
from farspan.trainer.optimizers.rule import HasBetas, Rule

if TYPE_CHECKING:
    from farspan.trainer.optimizers.config import LAMB


class AdamW(Rule):
    """torch's fused AdamW over all given masters in one call; states `exp_avg`, `exp_avg_sq`."""

    def __init__(self, masters: Mapping[str, Tensor], decay: Mapping[str, float], betas: HasBetas) -> None:
        super().__init__(masters, decay)
        self.betas = betas
        self._counts = {name: torch.zeros((), device=m.device) for name, m in masters.items()}
        for name, master in masters.items():
            plain = master.detach()
            self.states[name] = {"exp_avg": torch.zeros_like(plain), "exp_avg_sq": torch.zeros_like(plain)}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, count: int) -> None:
        for decay in dict.fromkeys(self.decay[name] for name in gradients):
            names = [name for name in gradients if self.decay[name] == decay]
            adamw(
                [self.masters[name] for name in names],
                [gradients[name] for name in names],
                [self.states[name]["exp_avg"] for name in names],
                [self.states[name]["exp_avg_sq"] for name in names],
                [],
                [self._counts[name] for name in names],  # torch adds one to each
                fused=True,
                amsgrad=False,
                beta1=self.betas.beta1,
                beta2=self.betas.beta2,
                lr=lr,
                weight_decay=decay,
                eps=self.betas.eps,
                maximize=False,
            )

    def restored(self, count: int) -> None:
        for counter in self._counts.values():
            counter.fill_(count)


class TrustRatio(Rule):
    """LAMB. Vectors and scalars have no ratio, as in the reference: a norm's gain is no direction to keep the length
    of. The ratio is 1 where either length is 0, and stays within the bounds of the job.

    States `exp_avg`, `exp_avg_sq`.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: Mapping[str, float], optim: LAMB) -> None:
        super().__init__(masters, decay)
        self.optim = optim
        for name, master in masters.items():
            plain = master.detach()
            self.states[name] = {"exp_avg": torch.zeros_like(plain), "exp_avg_sq": torch.zeros_like(plain)}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, count: int) -> None:
        for name, gradient in gradients.items():
            self._step(name, gradient, lr, count)

    def _step(self, name: str, gradient: Tensor, lr: float, count: int) -> None:
        master, state = self.masters[name], self.states[name]
        direction = adam_direction(gradient, state["exp_avg"], state["exp_avg_sq"], self.optim, count)
        direction.add_(master, alpha=self.decay[name])
        if master.dim() > 1:
            length, of_step = global_norm([master.detach()]), global_norm([direction])
            bounded = (length / of_step).clamp(self.optim.trust_min, self.optim.trust_max)
            direction.mul_(torch.where((length > 0) & (of_step > 0), bounded, 1.0))
        master.sub_(direction, alpha=lr)


def adam_direction(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: HasBetas, count: int) -> Tensor:
    """Averages updated in place; u of the module text, a new tensor."""
    exp_avg.lerp_(gradient, 1 - betas.beta1)
    exp_avg_sq.mul_(betas.beta2).addcmul_(gradient, gradient, value=1 - betas.beta2)
    correction1, correction2 = 1 - betas.beta1**count, 1 - betas.beta2**count
    length = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(betas.eps)
    return torch.div(exp_avg, length, out=length).div_(correction1)
