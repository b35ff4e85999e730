"""Rounding with a learned step and offset for each group: W = t q + o with q = round(clip((V - o) / t, low, high)).

The steps of LSQ (Esser et al., 2019, https://arxiv.org/abs/1902.08153), with an offset as in LSQ+ (Bhalgat et al.,
2020, https://arxiv.org/abs/2004.09576). Shapes: V [n, G, E], t and o [n, G, 1]; fp32, or fp64 where V is.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def bounds(bits: int) -> tuple[int, int]:
    """The lowest and the highest integer."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def unit_of(weight: Tensor, bits: int, group: int | None) -> float:
    """A power of two near the step of a matrix's groups: 2^-bits of the median width of a group, rounded down.

    Found without rounding, so that whoever has the same weights finds the same unit, on whatever device.
    """
    wide = weight.detach().view(weight.shape[0], -1, group or weight.shape[1])
    width = float((wide.amax(-1).float() - wide.amin(-1).float()).flatten().median())
    return math.ldexp(0.5, math.frexp(width)[1] - bits) if width > 0 else 1.0


def first_steps(weight: Tensor, bits: int, group: int | None, rule: Literal["minmax", "lsq"]) -> tuple[Tensor, Tensor]:
    """Steps and offsets fp32 [N, groups] of a matrix [N, C] before training.

    `minmax`: the integers span the group; `lsq`: 2^(bits - 1) steps reach three standard deviations from the mean.
    """
    low, _ = bounds(bits)
    wide = weight.detach().float().view(weight.shape[0], -1, group or weight.shape[1])
    if rule == "lsq":
        deviation, mean = torch.std_mean(wide, -1, correction=0)
        step = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 2 ** (bits - 1)
        offset = torch.zeros_like(step)
    else:
        least = wide.amin(-1)
        step = (wide.amax(-1) - least) / (2**bits - 1)
        offset = least - low * step
    flat = step <= 0  # a group of one value: the offset alone is it
    step = torch.where(flat, torch.full_like(step, unit_of(weight, bits, group)), step)
    return step, torch.where(flat, wide[..., 0], offset)


def places(merged: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """v = (V - o) / t, written over V."""
    return merged.sub_(offset).div_(step)


def codes(v: Tensor, bits: int) -> Tensor:
    """q of v, integers in V's dtype; a new tensor."""
    return v.clamp(*bounds(bits)).round_()


def values(q: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """t q + o; a new tensor. The one place where it is computed: training and what is exported have the same bits."""
    return (q * step).add_(offset)


class StepGradients(NamedTuple):
    """What a gradient of W becomes, by the straight-through estimator.

    Attributes:
        merged: of V, [n, G, E]: that of W where nothing was clipped. The tensor that was given.
        step, offset: [n, G].
    """

    merged: Tensor
    step: Tensor
    offset: Tensor


def gradients(of_w: Tensor, v: Tensor, q: Tensor, bits: int) -> StepGradients:
    """All three, in place of `of_w`, `v` and `q`.

    dt = sum of dW (q - v) within and dW q beyond the ends; do = sum of dW beyond them.
    """
    low, high = bounds(bits)
    beyond = (v < low).logical_or_(v > high)
    step = q.sub_(v.masked_fill_(beyond, 0)).mul_(of_w).sum(-1)
    offset = v.copy_(beyond).mul_(of_w).sum(-1)
    return StepGradients(of_w.masked_fill_(beyond, 0), step, offset)
