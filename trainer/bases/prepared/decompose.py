"""W ~ Q + s B A: a rounded matrix and a low-rank part that takes up what rounding loses.

    minimise || sqrt(F) * (W - Q - s B A) ||,    F = 1, or the diagonal of the empirical Fisher matrix

    lorc    Q from W, then A, B from the singular vectors of W - Q   (Yao et al., ZeroQuant-V2, 2023,
            https://arxiv.org/abs/2303.08302)
    loftq   the same in turns: Q from W - s B A, A, B from W - Q     (Li et al., LoftQ, 2023,
            https://arxiv.org/abs/2310.08659)
    lq      in turns too, from A, B of W itself, weighted by F       (Guo et al., LQ-LoRA, 2023,
            https://arxiv.org/abs/2311.12023)

With F the low-rank step is approximate: rows and columns are scaled by the roots of F's means, decomposed, and scaled
back. Every pair that comes up on the way is measured and the best one kept, where the reference implementation returns
the last: plain rounding is among them, so that the result is never worse. All of A, B and Q are measured as they will
be held, in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from farspan.kernels.quantized.formats import Format
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.linear import QuantizedLinear, quantized

Order = Literal["plain", "lorc", "loftq", "lq"]
WHOLE_SVD = 512
"""Matrices no wider are decomposed whole; wider ones by subspace iteration."""
OVERSAMPLE = 16
POWER = 4
"""Passes of subspace iteration: what rounding loses has a flat spectrum, whose first vectors take some to find."""
LEAST_IMPORTANCE = 1e-3
"""Of the mean: rows and columns that get no gradient are not divided by zero."""


@dataclass(frozen=True)
class Importance:
    """Weights of squared errors: F as it is, [N, C], or as a row's [N] times a column's [C]. fp32, mean 1."""

    whole: Tensor | None
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, whole: Tensor) -> Importance:
        wide = whole.float()
        wide = wide / wide.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return cls(wide, wide.mean(1), wide.mean(0))

    @classmethod
    def factored(cls, row: Tensor, column: Tensor) -> Importance:
        tiny = torch.finfo(torch.float32).tiny
        row, column = row.float(), column.float()
        return cls(None, row / row.mean().clamp_min(tiny), column / column.mean().clamp_min(tiny))

    def squared(self, off: Tensor) -> float:
        """Sum of F * off^2."""
        if self.whole is not None:
            return float((off.square() * self.whole).sum(dtype=torch.float64))
        return float((off.square() @ self.column).double() @ self.row.double())

    def scales(self) -> tuple[Tensor, Tensor]:
        """What rows and columns are scaled by before they are decomposed."""
        return self.row.clamp_min(LEAST_IMPORTANCE).sqrt(), self.column.clamp_min(LEAST_IMPORTANCE).sqrt()


@dataclass(frozen=True)
class LowRank:
    """A [r, C] and B [N, r] in the model's dtype."""

    a: Tensor
    b: Tensor


@dataclass
class Decomposition:
    """The best pair."""

    layer: QuantizedLinear
    """Holds Q."""
    low_rank: LowRank | None
    """None: of rank 0."""
    error: float
    """Sum of F * (W - Q - s B A)^2."""
    tried: list[float] = field(default_factory=list)
    """The errors of all pairs, in order."""


def decompose(
    weight: Tensor,
    how: Base | Format,
    rank: int,
    *,
    order: Order,
    scale: float,
    dtype: torch.dtype,
    iterations: int = 5,
    importance: Importance | None = None,
    seed: int = 0,
    first: LowRank | None = None,
) -> Decomposition:
    """Decompose a matrix.

    Args:
        weight: [N, C].
        rank: of the low-rank part; 0: there is none.
        scale: s, what the adapter is multiplied with.
        dtype: of the model.
        iterations: rounds at most of `loftq` and `lq`; `lq` ends when the error rises.
        first: for `lq`, `low_rank_of(weight)`, which is the same for every format.
    """
    wide = weight.detach().float()
    find = _Search(wide, how, scale, dtype, importance)
    plain = find.rounded(None)
    find.measure(plain, None)
    if rank == 0 or order == "plain":
        return find.best

    def low_rank(q: QuantizedLinear) -> LowRank:
        left = wide - q.whole().float()
        return low_rank_of(left, rank, scale=scale, dtype=dtype, importance=importance, seed=seed)

    now = low_rank(plain)
    find.measure(plain, now)
    if order == "lorc":
        return find.best
    if order == "lq":
        now = first or low_rank_of(wide, rank, scale=scale, dtype=dtype, importance=importance, seed=seed)
    before = float("inf")
    for _ in range(iterations - (order == "loftq")):
        q = find.rounded(now)
        error = find.measure(q, now)
        if order == "lq" and error > before:
            break
        before = error
        now = low_rank(q)
        find.measure(q, now)
    return find.best


class _Search:
    """Keeps the best of the pairs it measures."""

    def __init__(
        self, wide: Tensor, how: Base | Format, scale: float, dtype: torch.dtype, importance: Importance | None
    ) -> None:
        self.wide, self.how, self.scale, self.dtype, self.importance = wide, how, scale, dtype, importance
        self.best = Decomposition(layer=None, low_rank=None, error=float("inf"))  # type: ignore[arg-type]

    def rounded(self, low: LowRank | None) -> QuantizedLinear:
        """Q from W - s B A."""
        layer = quantized(self._without(self.wide, low), self.how, None)
        layer.dtype = self.dtype
        return layer

    def measure(self, q: QuantizedLinear, low: LowRank | None) -> float:
        off = (
            self._without(self.wide, low).sub_(q.whole().float()) if low is not None else self.wide - q.whole().float()
        )
        if self.importance is None:
            error = float(off.square_().sum(dtype=torch.float64))
        else:
            error = self.importance.squared(off)
        tried = [*self.best.tried, error]
        if error < self.best.error:
            self.best = Decomposition(q, low, error)
        self.best.tried = tried
        return error

    def _without(self, wide: Tensor, low: LowRank | None) -> Tensor:
        if low is None:
            return wide
        return torch.addmm(wide, low.b.float(), low.a.float(), alpha=-self.scale)


def low_rank_of(
    left: Tensor, rank: int, *, scale: float, dtype: torch.dtype, importance: Importance | None, seed: int
) -> LowRank:
    """A, B whose product times `scale` is next to `left` [N, C], singular values shared evenly."""
    rows, columns = importance.scales() if importance is not None else (None, None)
    if rows is not None and columns is not None:
        left = left * rows[:, None] * columns
    u, s, vh = truncated_svd(left, rank, seed=seed)
    root = (s / scale).sqrt()
    a, b = root[:, None] * vh, u * root
    if rows is not None and columns is not None:
        a, b = a / columns, b / rows[:, None]
    return LowRank(a.to(dtype), b.to(dtype))


def truncated_svd(matrix: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, r], S [r], Vh [r, C]; of wide matrices by randomized subspace iteration with oversampling.

    Source: Halko et al., 2011, https://arxiv.org/abs/0909.4061.
    """
    if min(matrix.shape) <= WHOLE_SVD:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    k = min(rank + OVERSAMPLE, *matrix.shape)
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(matrix.shape[1], k, generator=draw).to(matrix)
    orthonormal: Callable[[Tensor], Tensor] = lambda m: torch.linalg.qr(m)[0]  # noqa: E731
    y = orthonormal(matrix @ drawn)
    for _ in range(POWER):
        y = orthonormal(matrix @ orthonormal(matrix.t() @ y))
    u, s, vh = torch.linalg.svd(y.t() @ matrix, full_matrices=False)
    return (y @ u)[:, :rank], s[:rank], vh[:rank]
