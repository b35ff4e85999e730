"""From rewards to advantages: in a group of samples of one prompt, or along one sample with a critic.

`group_advantages` runs where rewards are shaped, on plain numbers. `gae` runs on tensors without a loop over tokens:
the recursion A_t = delta_t + gamma lambda A_{t+1} is a product with powers of gamma lambda inside blocks, and one
number handed from block to block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-4
"""Added to a standard deviation, as in TRL."""
_BLOCK = 128


def group_advantages(
    rewards: Sequence[Sequence[float]],
    *,
    scale: Literal["group", "batch", "none"] = "group",
    judged: Sequence[Sequence[bool]] | None = None,
    eps: float = EPS,
) -> list[list[float]]:
    """Reward of each sample less its group's mean, over a standard deviation (GRPO, arXiv 2402.03300).

    Args:
        rewards: one row for each prompt, of any lengths.
        scale: `group` divides by the group's sample standard deviation plus `eps`; `batch` by that of all rewards of
            the step (REINFORCE++); `none` does not divide (Dr.GRPO, arXiv 2503.20783).
        judged: False where there is no verdict: such samples are in no mean and have advantage 0.

    Returns:
        Rows like those of `rewards`. A group whose rewards are all equal, or that has one sample, gets zeros.

    Raises:
        ValueError: a reward is NaN or infinite.
    """
    import numpy as np

    rows = [np.asarray([float(reward) for reward in row], dtype=np.float64) for row in rewards]
    counted = [np.ones(len(row), bool) for row in rows] if judged is None else [np.asarray(row, bool) for row in judged]
    for index, (row, counts) in enumerate(zip(rows, counted, strict=True)):
        if not np.isfinite(row[counts]).all():
            raise ValueError(f"rewards of group {index} are not finite: {row.tolist()}")
    everything = np.concatenate([row[counts] for row, counts in zip(rows, counted)]) if rows else np.zeros(0)
    over_all = float(everything.std(ddof=1)) if everything.size > 1 else 0.0
    found = []
    for row, counts in zip(rows, counted):
        advantages, inside = np.zeros(len(row)), row[counts]
        # equal rewards differ from their mean by rounding alone, which must not be divided by eps
        if inside.size > 1 and inside.min() < inside.max():
            advantages[counts] = inside - inside.mean()
            if scale != "none":
                advantages /= (float(inside.std(ddof=1)) if scale == "group" else over_all) + eps
        found.append(advantages.tolist())
    return found


def gae(
    rewards_NT: Tensor,
    values_NT: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    finished: bool | Tensor = True,
    bootstrap: Literal["repeat", "value"] = "repeat",
    next_values_N: Tensor | None = None,
    lengths_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates of tokens (arXiv 1506.02438), of unfinished samples too (EGAE, arXiv 2506.15050).

    With l tokens so far, delta_t = r_t + gamma V_{t+1} - V_t and A_t = sum_k (gamma lam)^k delta_{t+k} up to t+k = l-1.
    V_l is 0 behind a finished sample. Behind an unfinished one nothing was generated yet: EGAE takes V_l = V_{l-1}
    (`repeat`), so that with gamma = 1 the last difference is r_{l-1} alone; `value` takes the critic's own value behind
    the last token, which the same forward pass has.

    Args:
        rewards_NT: [N, T], or [T] for one sample.
        values_NT: of the same shape; V_t is the value before token t is generated.
        finished: of all samples, or bool [N].
        next_values_N: [N], for `bootstrap="value"`: V_l. Read for unfinished samples only.
        lengths_N: int64 [N], tokens of each sample, at least 1; what is beyond is padding and gets zeros. Default T.

    Returns:
        advantages and returns (advantages plus values), in the shape and dtype of `values_NT`.

    Raises:
        ValueError: `bootstrap="repeat"` with gamma other than 1 on unfinished samples, which would add
            (gamma - 1) V to their last difference; `bootstrap="value"` without values.
    """
    import torch

    if values_NT.dim() == 1:
        more = None if lengths_N is None else lengths_N.reshape(1)
        behind = None if next_values_N is None else next_values_N.reshape(1)
        alone = gae(
            rewards_NT[None], values_NT[None], gamma=gamma, lam=lam, finished=finished,
            bootstrap=bootstrap, next_values_N=behind, lengths_N=more,
        )  # fmt: skip
        return alone[0][0], alone[1][0]
    count, length = values_NT.shape
    device = values_NT.device
    values, rewards = values_NT.double(), rewards_NT.double()
    lengths = torch.full((count,), length, device=device) if lengths_N is None else lengths_N.to(device)
    done = torch.as_tensor(finished, device=device).expand(count)
    inside = torch.arange(length, device=device) < lengths[:, None]
    last = (lengths - 1)[:, None]
    behind_N = values.new_zeros(count)
    if not bool(done.all()):
        behind_N = _values_behind(values.gather(1, last)[:, 0], next_values_N, bootstrap, gamma)
    following = torch.cat([values[:, 1:], values.new_zeros(count, 1)], 1)
    following.scatter_(1, last, torch.where(done, 0.0, behind_N)[:, None])
    delta = torch.where(inside, rewards + gamma * following - values, 0.0)
    advantages = torch.where(inside, _discounted_sums(delta, gamma * lam), 0.0)
    returns = torch.where(inside, advantages + values, 0.0)
    return advantages.to(values_NT.dtype), returns.to(values_NT.dtype)


def _values_behind(
    last_N: Tensor, next_values_N: Tensor | None, bootstrap: Literal["repeat", "value"], gamma: float
) -> Tensor:
    """V_l of unfinished samples, float64 [N]."""
    if bootstrap == "repeat":
        if gamma != 1.0:
            raise ValueError(f"an unfinished sample needs gamma = 1, not {gamma:g}: its last value stands for the next")
        return last_N
    if next_values_N is None:
        raise ValueError("bootstrap='value' needs next_values_N, the values behind unfinished samples")
    return next_values_N.double()


def _discounted_sums(delta_NT: Tensor, factor: float) -> Tensor:
    """sum over k of factor^k delta_{t+k}, in float64, whose powers underflow to 0 and never overflow."""
    import torch

    count, length = delta_NT.shape
    blocks = -(-length // _BLOCK)
    padded = torch.zeros(count, blocks * _BLOCK, dtype=torch.float64, device=delta_NT.device)
    padded[:, :length] = delta_NT
    steps = torch.arange(_BLOCK, device=delta_NT.device, dtype=torch.float64)
    ahead = steps[:, None] - steps[None]  # [from, to]
    powers = torch.where(ahead >= 0, factor ** ahead.clamp(min=0), 0.0)
    inside = padded.view(count, blocks, _BLOCK) @ powers
    to_the_end = factor ** (_BLOCK - steps)
    carried = torch.zeros(count, dtype=torch.float64, device=delta_NT.device)
    for block in range(blocks - 1, -1, -1):
        inside[:, block] += carried[:, None] * to_the_end
        carried = inside[:, block, 0]
    return inside.reshape(count, -1)[:, :length]
