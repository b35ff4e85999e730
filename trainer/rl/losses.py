"""Losses of RL with a clipped importance ratio: GRPO, DAPO, Dr.GRPO, PPO, on padded or on packed tokens.

All of them are a sum over tokens of a weight times the same token loss. Weights depend on lengths alone, so whoever
knows the whole step (all ranks, all micro-batches) computes them, and ranks add up what they have: the result does not
depend on how samples were packed or split. `policy_loss` does both for samples that are at hand as a whole.

N samples of at most T generated tokens. Log-probabilities are of the generated tokens, at the temperature they were
sampled with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["grpo", "dapo", "dr_grpo"]


def sample_weights(
    lengths: Sequence[int], aggregation: Aggregation, *, cap: int | None = None, counted: Sequence[int] | None = None
) -> list[float]:
    """What every token of a sample counts in the loss of a step.

    `grpo`: a mean over samples of means over their tokens, 1 / (N l_i). `dapo` (arXiv 2503.14476): a mean over all
    tokens, 1 / sum l. `dr_grpo` (arXiv 2503.20783): 1 / (N cap), so that long samples weigh no less a token.

    Args:
        lengths: tokens of each sample of the whole step that are trained on; samples with 0 are in no denominator.
        cap: most tokens a response may have, for `dr_grpo`.
        counted: tokens of each sample in the denominator, where that is more than what is trained on.
    """
    lengths = lengths if counted is None else counted
    number, total = sum(length > 0 for length in lengths), sum(lengths)
    if aggregation == "dr_grpo":
        if cap is None:
            raise ValueError("dr_grpo divides by the most tokens a response may have: give cap")
        return [1.0 / (number * cap) if length else 0.0 for length in lengths]
    if aggregation == "dapo":
        return [1.0 / total if length else 0.0 for length in lengths]
    return [1.0 / (number * length) if length else 0.0 for length in lengths]


def token_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    weights: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_weight: float = 0.0,
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of every token, with rho = pi / pi_old; all of one shape.

    Args:
        advantages: broadcast against the others.
        clip_high: above `clip_low` it is DAPO's clip-higher.
        ratio_cap: no ratio counts more, where the minimum would take any (two-sided clipping, dual clip).
        weights: importance weights of old policy against behaviour (`truncated_weights`).
        ref_log_probs: of a reference policy, with `kl_weight`: e^d - d - 1 with d = log pi_ref - log pi is added.
    """
    import torch

    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if ratio_cap is not None:
        ratio = ratio.clamp(max=ratio_cap)
    losses = -torch.min(ratio * advantages, clipped * advantages)
    if weights is not None:
        losses = losses * weights
    if kl_weight:
        if ref_log_probs is None:
            raise ValueError("kl_weight needs ref_log_probs")
        ahead = ref_log_probs - log_probs
        losses = losses + kl_weight * (torch.exp(ahead) - ahead - 1)
    return losses


def truncated_weights(old_log_probs: Tensor, behaviour_log_probs: Tensor, *, cap: float = 2.0) -> Tensor:
    """min(pi_old / pi_behaviour, cap) of every token, without gradient.

    What corrects for samples that a policy generated which is not the one that ratios are taken against: an older one,
    or the same in another engine.
    """
    return (old_log_probs - behaviour_log_probs).detach().exp().clamp(max=cap)


def policy_loss(
    log_probs_NT: Tensor,
    old_log_probs_NT: Tensor,
    advantages: Tensor,
    mask_NT: Tensor,
    *,
    aggregation: Aggregation = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    weights_NT: Tensor | None = None,
    ref_log_probs_NT: Tensor | None = None,
    kl_weight: float = 0.0,
    left_out_NT: Tensor | None = None,
    cap: int | None = None,
) -> Tensor:
    """Loss of a step whose samples are all here.

    Args:
        log_probs_NT: [N, T] of the generated tokens under the policy that trains.
        old_log_probs_NT: [N, T] of the policy that ratios are taken against. The same, detached, is POIS: every ratio
            is 1 and nothing is clipped.
        advantages: [N], or [N, T] from a critic.
        mask_NT: [N, T], nonzero where a token is trained on. A sample of which none is leaves every denominator.
        left_out_NT: bool [N, T], tokens that add nothing and still count in the denominator (mastered tokens).
        cap: most tokens a response may have, for `dr_grpo`.

    Returns:
        0-dim loss. The other arguments are those of `token_losses` and `sample_weights`.
    """
    import torch

    if advantages.dim() == 1:
        advantages = advantages[:, None]
    mask = mask_NT.bool()
    losses = token_losses(
        log_probs_NT, old_log_probs_NT, advantages,
        clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap,
        weights=weights_NT, ref_log_probs=ref_log_probs_NT, kl_weight=kl_weight,
    )  # fmt: skip
    of_sample = sample_weights(mask.sum(1).tolist(), aggregation, cap=cap)
    counts = mask if left_out_NT is None else mask & ~left_out_NT.bool()
    # where, not a product: a padded position may hold what is not a number
    losses = torch.where(counts, losses, 0.0)
    return (losses.sum(1) * torch.tensor(of_sample, dtype=losses.dtype, device=losses.device)).sum()


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None = None, *, clip: float | None = None
) -> Tensor:
    """Half the squared error of every token's value; clipped (PPO): the larger of it and that of a value that moved no
    further than `clip` from the one advantages were taken with."""
    import torch

    errors = (values - returns).square()
    if clip is not None and old_values is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.max(errors, (held - returns).square())
    return 0.5 * errors
