"""How a token is drawn: by its sample's seed and its position, and by nothing else.

One uniform number per token decides where in the cumulated distribution the draw falls. It comes from a hash of (seed,
position), so tokens do not depend on what else is in a batch, on how a response is cut into segments, or on which
worker generates it. B samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from farspan.trainer.rl.messages import Sampling

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: two rounds of splitmix64 over seed and position (Steele et al. 2014)."""
    return (_mix(_mix(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def draw_tokens(
    logits_BV: Tensor, seeds: Sequence[int], positions: Sequence[int], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] and their log-probabilities fp32 [B], of the distribution that was drawn from.

    With temperature 0 the most likely token, with its log-probability at temperature 1.
    """
    logits = logits_BV.float()
    if sampling.temperature == 0:
        logs = torch.log_softmax(logits, 1)
        tokens = logs.argmax(1)
        return tokens, logs.gather(1, tokens[:, None])[:, 0]
    logits = _cut(logits / sampling.temperature, sampling)
    logs = torch.log_softmax(logits, 1)
    points = torch.from_numpy(np.array([uniform(s, p) for s, p in zip(seeds, positions, strict=True)]))
    cumulated = logs.double().exp().cumsum(1)
    # below the total, however the sum was rounded; of equal ends the first, so no impossible token is drawn
    points = (points.to(logits.device) * cumulated[:, -1]).clamp(
        max=torch.nextafter(cumulated[:, -1], points.new_zeros(()).to(logits.device))
    )
    tokens = torch.searchsorted(cumulated, points[:, None], right=True)[:, 0]
    return tokens, logs.gather(1, tokens[:, None])[:, 0]


def _cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """Without what top-k and top-p leave out."""
    if sampling.top_k and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, 1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ranked, order = logits.sort(1, descending=True)
        probs = torch.softmax(ranked, 1)
        outside = probs.cumsum(1) - probs >= sampling.top_p  # the first is always in
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return logits
