"""The loss of one rank's rows of a pack, and what it says about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farspan.trainer.rl.config import PolicyLoss
from farspan.trainer.rl.losses import token_losses, truncated_weights
from farspan.trainer.rl.mastered import mastered_token_mask

if TYPE_CHECKING:
    from torch import distributed as dist


@dataclass
class PolicyObjective:
    """Callable as `trainer.loss.Objective`; N trained rows of this rank.

    Args:
        samples_N: int64, sample of each row; rewarded_N: bool.
        values: float32 [N] by name, as in `PolicyPack`.
        sp_group: ranks that hold the rest of the pack's rows; None: none.
    """

    loss: PolicyLoss
    temperature: float
    samples_N: Tensor
    rewarded_N: Tensor
    values: dict[str, Tensor]
    sp_group: dist.ProcessGroup | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Over rows, float64: what metrics are made of."""

    def __call__(self, log_probs_N: Tensor, entropies_N: Tensor) -> Tensor:
        loss, values = self.loss, self.values
        behaviour = values["behaviour_log_probs"]
        current = log_probs_N.detach()
        old = {"pois": current, "sais": behaviour, "decoupled": values.get("old_log_probs", current)}[loss.importance]
        weights = truncated_weights(old, behaviour, cap=loss.weight_cap) if loss.importance == "decoupled" else None
        losses = token_losses(
            log_probs_N,
            old,
            values["advantages"],
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            ratio_cap=loss.ratio_cap,
            weights=weights,
            ref_log_probs=values.get("ref_log_probs"),
            kl_weight=loss.kl_weight,
        )
        left_out = self._mastered(current, entropies_N.detach())
        if left_out is not None:
            losses = losses.masked_fill(left_out, 0.0)
        total = (losses * values["weights"]).sum()
        if loss.entropy_weight:
            total = total - loss.entropy_weight * (entropies_N * values["weights"]).sum()
        ratio = (current - old).exp()
        gap = behaviour - current
        self._add(
            tokens=torch.ones_like(current),
            entropy=entropies_N.detach(),
            clipped=((ratio < 1 - loss.clip_low) | (ratio > 1 + loss.clip_high)).double(),
            ratio=ratio,
            log_prob_gap=gap.abs(),
            kl=gap.exp() - gap - 1,
            mastered=torch.zeros_like(current) if left_out is None else left_out.double(),
        )
        return total

    def _mastered(self, log_probs_N: Tensor, entropies_N: Tensor) -> Tensor | None:
        """Rows to leave out, by each sample's entropy over all ranks that hold rows of it."""
        mastered = self.loss.mastered
        if mastered is None:
            return None
        number = 1 + int(self._largest(self.samples_N))
        totals = torch.zeros(2, number, dtype=torch.float64, device=entropies_N.device)
        totals[0].index_add_(0, self.samples_N, entropies_N.double())
        totals[1].index_add_(0, self.samples_N, torch.ones_like(entropies_N, dtype=torch.float64))
        if self.sp_group is not None:
            torch.distributed.all_reduce(totals, group=self.sp_group)
        if mastered.scope == "batch":
            totals = totals.sum(1, keepdim=True).expand(2, number)
        mean = (totals[0] / totals[1].clamp(min=1))[self.samples_N]
        # each row with the mean entropy of its sample: a batch of samples of one token
        return mastered_token_mask(
            log_probs_N[:, None],
            mean[:, None],
            self.rewarded_N,
            torch.ones_like(self.rewarded_N)[:, None],
            threshold=mastered.threshold,
            entropy_target=mastered.entropy_target,
        )[:, 0]

    def _largest(self, samples_N: Tensor) -> Tensor:
        largest = samples_N.max() if samples_N.numel() else samples_N.new_tensor(-1)
        if self.sp_group is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.sp_group)
        return largest

    def _add(self, **rows: Tensor) -> None:
        for name, values in rows.items():
            total = values.double().sum()
            self.sums[name] = self.sums.get(name, torch.zeros_like(total)) + total


@dataclass
class ScoreOnly:
    """Keeps log-probabilities and entropies, and has no loss."""

    temperature: float
    log_probs: Tensor | None = None
    entropies: Tensor | None = None

    def __call__(self, log_probs_N: Tensor, entropies_N: Tensor) -> Tensor:
        self.log_probs, self.entropies = log_probs_N.detach(), entropies_N.detach()
        return log_probs_N.sum() * 0.0
