"""A rounded matrix and its low-rank part, fitted to what a layer puts out instead of to its weights (ApiQ).

    minimise || X W^T - Xq (Q + s B A)^T ||^2  +  saliency h sum F (W - Q - s B A)^2

X are inputs of the layer in the pretrained model, Xq what reaches it when everything before is rounded already, so that
errors do not add up; h is the mean square of an input. Source: Liao et al., ApiQ, 2024,
https://arxiv.org/abs/2402.05147; weights F by squared gradients: Cao & Aref, Saliency-Aware Partial Retraining, 2025.

The first term depends on the inputs through three products alone, Xq^T Xq, Xq^T X and X^T X, so that no activations are
kept. The papers take gradient steps; here A and B are found in closed form (reduced-rank regression), the share to
which scales are clipped row by row among some, and both in turns; gradient steps follow only where F makes the rows'
problems different. All pairs are measured, those of `decompose` too, and the best is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.quantized.formats import Format
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.linear import QuantizedLinear, quantized
from farspan.trainer.bases.prepared.decompose import Decomposition, Importance, LowRank

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Shares of a block's largest magnitude that its scale may be; below half nothing gains in two bits either."""
DAMPING = 1e-4
"""Of the mean square of an input: directions that calibration hardly shows are not fitted to its noise."""
STEPS, RATE = 100, 0.02
"""Gradient steps under F; the rate is relative to the size of A and B."""


@dataclass
class Products:
    """Sums over rows of inputs; fp64 [C, C]."""

    rounded: Tensor
    """Xq^T Xq"""
    mixed: Tensor
    """Xq^T X"""
    plain: Tensor
    """X^T X"""

    @classmethod
    def zeros(cls, columns: int, device: torch.device) -> Products:
        return cls(*(torch.zeros(columns, columns, dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, x_RC: Tensor, rounded_RC: Tensor) -> None:
        """Rows of both; the same tokens."""
        x, xq = x_RC.double(), rounded_RC.double()
        self.rounded.addmm_(xq.t(), xq)
        self.mixed.addmm_(xq.t(), x)
        self.plain.addmm_(x.t(), x)


class Fit:
    """The objective of one matrix.

    Args:
        weight: [N, C].
        saliency: what the second term is multiplied with.
        importance: F of the second term; None: 1.
    """

    def __init__(
        self, weight: Tensor, products: Products, *, saliency: float = 0.0, importance: Importance | None = None
    ) -> None:
        self.w = weight.detach().double()
        self.h = products.rounded
        self.target = self.w @ products.mixed.t()
        """Y^T Xq [N, C]"""
        self.constant = (self.w @ products.plain * self.w).sum(1)
        self.penalty: Tensor | None = None
        if saliency > 0:
            size = saliency * self.h.diagonal().mean()
            if importance is None:
                self.penalty = size.expand_as(self.w)
            elif importance.whole is not None:
                self.penalty = size * importance.whole.to(self.w)
            else:
                self.penalty = size * torch.outer(importance.row.to(self.w), importance.column.to(self.w))

    def of_rows(self, v: Tensor) -> Tensor:
        """The objective of each row of V = Q + s B A [N, C]. fp64 [N]."""
        rows = (v @ self.h * v).sum(1) - 2 * (v * self.target).sum(1) + self.constant
        if self.penalty is not None:
            rows = rows + (self.penalty * (self.w - v).square()).sum(1)
        return rows

    def low_rank(self, q: Tensor, rank: int, *, scale: float, dtype: torch.dtype) -> LowRank:
        """The A, B that minimise the first term beside Q, for inputs damped a little.

        With L L^T = Xq^T Xq the term is || (M - M*) L ||^2 and a constant, where M* is its minimum over all matrices;
        the best of rank r has the first r singular directions of M* L.
        """
        size = self.h.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = self.h + DAMPING * size * torch.eye(self.h.shape[0], dtype=self.h.dtype, device=self.h.device)
        lower = torch.linalg.cholesky(damped)
        e = torch.linalg.solve_triangular(lower, (self.target - q @ self.h).t(), upper=False).t()
        u, s, vh = torch.linalg.svd(e, full_matrices=False)
        a = torch.linalg.solve_triangular(lower, vh[:rank], upper=False, left=False)
        # sizes shared evenly between the halves as they are, not as the inputs weigh them
        length = a.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        root = (s[:rank] * length / scale).sqrt()
        return LowRank((a / length[:, None] * root[:, None]).to(dtype), (u[:, :rank] * root).to(dtype))

    def descended(self, q: Tensor, low: LowRank, *, scale: float) -> LowRank:
        """Gradient steps on A and B from where they are."""
        halves = [half.detach().double().clone().requires_grad_() for half in (low.a, low.b)]
        groups = [{"params": [half], "lr": RATE * float(half.detach().square().mean().sqrt())} for half in halves]
        optimizer = torch.optim.Adam(groups)
        best, least = low, float("inf")
        with torch.enable_grad():
            for step in range(STEPS + 1):
                loss = self.of_rows(q + scale * halves[1] @ halves[0]).sum()
                if float(loss.detach()) < least:
                    least = float(loss.detach())
                    best = LowRank(*(half.detach().to(low.a.dtype).clone() for half in halves))
                if step < STEPS:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return best


def calibrate(
    fit: Fit,
    how: Base | Format,
    rank: int,
    *,
    scale: float,
    dtype: torch.dtype,
    rounds: int = 5,
    starts: Sequence[Decomposition] = (),
) -> Decomposition:
    """The best pair for an objective.

    Args:
        rank: of the low-rank part; 0: only scales are clipped.
        rounds: of clipping and low-rank part in turns.
        starts: pairs that were found otherwise.

    Returns:
        the pair; its error is the objective's value.
    """
    best = Decomposition(layer=None, low_rank=None, error=float("inf"))  # type: ignore[arg-type]
    tried: list[float] = []

    def measure(layer: QuantizedLinear, low: LowRank | None) -> None:
        nonlocal best
        error = float(fit.of_rows(_stands_for(layer, low, scale)).sum())
        tried.append(error)
        if error < best.error:
            best = Decomposition(layer, low, error)

    def fitted(layer: QuantizedLinear) -> LowRank | None:
        if rank == 0:
            return None
        low = fit.low_rank(layer.whole().double(), rank, scale=scale, dtype=dtype)
        measure(layer, low)
        return low

    plain = _rounded(fit, how, dtype, None)
    measure(plain, None)
    low = fitted(plain)
    for start in starts:
        measure(start.layer, start.low_rank)
        fitted(start.layer)
    clips = torch.ones(fit.w.shape[0], device=fit.w.device)
    for _ in range(rounds):
        before, clips = clips, _clips(fit, how, dtype, low, scale)
        if torch.equal(clips, before):
            break
        layer = _rounded(fit, how, dtype, clips)
        measure(layer, low)
        low = fitted(layer)
    if fit.penalty is not None and best.low_rank is not None:
        measure(best.layer, fit.descended(best.layer.whole().double(), best.low_rank, scale=scale))
    best.tried = tried
    return best


def _rounded(fit: Fit, how: Base | Format, dtype: torch.dtype, clip: Tensor | None) -> QuantizedLinear:
    layer = quantized(fit.w.float(), how, None, clip)
    layer.dtype = dtype
    return layer


def _stands_for(layer: QuantizedLinear, low: LowRank | None, scale: float) -> Tensor:
    whole = layer.whole().double()
    return whole if low is None else torch.addmm(whole, low.b.double(), low.a.double(), alpha=scale)


def _clips(fit: Fit, how: Base | Format, dtype: torch.dtype, low: LowRank | None, scale: float) -> Tensor:
    """fp32 [N]: for each row the share under which it does best, with the low-rank part as it is."""
    rows = fit.w.shape[0]
    errors = torch.stack(
        [
            fit.of_rows(_stands_for(_rounded(fit, how, dtype, torch.full((rows,), clip).to(fit.w.device)), low, scale))
            for clip in CLIPS
        ]
    )
    return torch.tensor(CLIPS, device=fit.w.device)[errors.argmin(0)]
