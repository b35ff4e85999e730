"""Which tokens need no more training (UloRL's dynamic masking of well-mastered positive tokens, arXiv 2507.19766)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def mastered_token_mask(
    log_probs_NT: Tensor,
    entropies_NT: Tensor,
    rewarded_N: Tensor,
    mask_NT: Tensor,
    *,
    threshold: float = 0.99,
    entropy_target: float = 0.2,
    scope: Literal["sample", "batch"] = "sample",
) -> Tensor:
    """Tokens to leave out of the loss: of rewarded samples, predicted with at least `threshold`, while entropy is low.

    Training them further takes entropy away and teaches nothing. The loss goes on dividing by all tokens, those left
    out included.

    Args:
        log_probs_NT: [N, T] of the generated tokens under the current policy.
        entropies_NT: [N, T] of its distributions, in nats.
        rewarded_N: bool [N], samples with the full reward.
        mask_NT: bool [N, T], generated tokens.
        entropy_target: nothing is left out of a sample (of a batch) whose mean entropy is at or above it.
        scope: whose mean entropy: the sample's, as the paper's formula has it, or the batch's, as its text says.

    Returns:
        bool [N, T], True where the token is left out.
    """
    import torch

    mask = mask_NT.bool()
    counted = torch.where(mask, entropies_NT, 0.0)
    if scope == "sample":
        mean = counted.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        mean = (counted.sum() / mask.sum().clamp(min=1)).expand(mask.shape[0], 1)
    sure = log_probs_NT >= torch.log(torch.as_tensor(threshold, dtype=log_probs_NT.dtype, device=log_probs_NT.device))
    return mask & sure & rewarded_N.bool()[:, None] & (mean < entropy_target)
