"""A share of the rows of an input that stand for all of them in a weight's gradient (WTA-CRS).

Source: Liu et al., Winner-Take-All Column Row Sampling, 2023, https://arxiv.org/abs/2305.15265. The gradient of a
matrix is a sum over rows, G = sum_t dy_t x_t^T. With row t drawn with probability p_t, the c rows of largest p are
taken as they are and k - c drawn from the others, each weighted by (1 - P_C) / ((k - c) p_t), where P_C is what the
first c have of p: an unbiased estimate from k rows, of least variance at the c that minimises (1 - P_C) / (k - c).
Forward and the gradient of the input stay exact.

p is the size of x_t alone. The paper multiplies it with the size of dy_t from the epoch before, which a single epoch of
packed documents does not have, and leaves the weights out where it is not known, which biases its first epoch.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class KeptRows(NamedTuple):
    """k rows of an input [R, C].

    Attributes:
        x: [k, C]; `at`: their indices, int64 [k]; `weight`: fp32 [k].
    """

    x: Tensor
    at: Tensor
    weight: Tensor


def winners(p: Tensor, k: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices int64 [k] and weights fp32 [k] of the rows that stand for all.

    Args:
        p: fp32 [R], not negative; its sum may be anything.
    """
    rows = p.numel()
    if k >= rows:
        return torch.arange(rows, device=p.device), torch.ones(rows, device=p.device)
    total = p.sum()
    if not bool(total > 0):  # rows of zeros: it does not matter which
        return torch.arange(k, device=p.device), torch.full((k,), rows / k, device=p.device)
    p = (p / total).double()
    ordered, order = p.sort(descending=True)
    taken = torch.cat([ordered.new_zeros(1), ordered[: k - 1].cumsum(0)])
    cost = (1 - taken).clamp_min(0) / torch.arange(k, 0, -1, device=p.device)
    first = int(cost.argmin())
    rest = ordered[first:]
    mass = rest.sum()
    if not bool(mass > 0):  # what is left weighs nothing
        weight = torch.cat([torch.ones(first), torch.zeros(k - first)]).to(p.device)
        return order[:k], weight
    drawn = torch.multinomial(rest, k - first, replacement=True, generator=draw)
    weight = mass / ((k - first) * rest[drawn])
    return torch.cat([order[:first], order[first + drawn]]), torch.cat([weight.new_ones(first), weight]).float()


class RowSampler:
    """Keeps the same rows for all layers that read the same input."""

    draws = True
    """Something is drawn in forward: whoever runs it again restores the generators."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._of: weakref.ref[Tensor] | None = None
        self._key = 0
        self._kept: KeptRows | None = None

    def of(self, x: Tensor, *, wanted: bool) -> KeptRows | None:
        """Draws a key the first time it sees this very x; picks rows where they are `wanted`, for a backward."""
        if self._of is None or self._of() is not x:
            self._of, self._kept = weakref.ref(x, self._forget), None
            self._key = int(torch.randint(2**62, ()).item())
        if wanted and self._kept is None:
            x_RC = x.detach().reshape(-1, x.shape[-1])
            draw = torch.Generator(x.device).manual_seed(self._key)
            size = torch.linalg.vector_norm(x_RC, dim=1).float()  # any p will do: no copy of x in fp32 for it
            index, weight = winners(size, max(1, round(self.share * x_RC.shape[0])), draw)
            self._kept = KeptRows(x_RC.index_select(0, index), index, weight)
        return self._kept if wanted else None

    def _forget(self, of: weakref.ref[Tensor]) -> None:
        if of is self._of:
            self._of = self._kept = None
