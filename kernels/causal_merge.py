"""Merging a layer's rows by their likeness to an anchor, causally: no matrix of rows x rows is ever made.

Source: Diao et al., UniPT, 2023, https://arxiv.org/abs/2308.14316, whose interaction is L1norm(ReLU(a h^T)) + I over
all tokens. Here row i sees rows j <= i of its own document: with s_ij = max(0, a_i . h_j),

    m_i = h_i + sum_j s_ij h_j / max(sum_j s_ij, eps).

Forward and backward go over blocks of rows x rows and keep a, h, m and the divisor. As a score is no exponential,
no running maximum is needed.

L layers, S rows of the pack, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Of a block's scores, all layers together: what is made beside the rows does not grow with the layers."""
EPS = 1e-12


def causal_merge(anchor_SD: Tensor, rows_LSD: Tensor, *, lengths: Sequence[int]) -> Tensor:
    """m [L, S, D], in the dtype of the rows; see the module.

    Args:
        anchor_SD: [S, D], the same for all layers.
        rows_LSD: [L, S, D].
        lengths: rows of each document; they add up to S.
    """
    assert sum(lengths) == anchor_SD.shape[0] == rows_LSD.shape[1], (tuple(lengths), rows_LSD.shape)
    return _Merge.apply(anchor_SD, rows_LSD, tuple(lengths))


def _blocks(lengths: tuple[int, ...], rows_LSD: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of rows with those that they see, the last of which is the block itself."""
    elements = BLOCK_ELEMENTS.get(rows_LSD.device.type, BLOCK_ELEMENTS["cuda"])
    step, start = max(1, math.isqrt(elements // max(1, len(rows_LSD)))), 0
    step -= step % 16 if step > 16 else 0
    for length in lengths:
        blocks = [slice(start + at, start + min(at + step, length)) for at in range(0, length, step)]
        yield from ((block, blocks[: index + 1]) for index, block in enumerate(blocks))
        start += length


def _scores(anchor_SD: Tensor, rows_LSD: Tensor, block: slice, seen: slice) -> Tensor:
    """max(0, a_i . h_j) [L, i, j], fp32 or wider."""
    found = (anchor_SD[block] @ rows_LSD[:, seen].transpose(1, 2)).clamp_min_(0)
    if seen == block:
        found.tril_()
    return found.to(torch.promote_types(found.dtype, torch.float32))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, h: Tensor, lengths: tuple[int, ...]) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        out, divisor = torch.empty_like(h), torch.empty(h.shape[:2], dtype=wide, device=h.device)
        for block, before in _blocks(lengths, h):
            total = torch.zeros_like(out[:, block], dtype=wide)
            weight = torch.zeros_like(divisor[:, block])
            for seen in before:
                s = _scores(a, h, block, seen)
                weight += s.sum(-1)
                total += s @ h[:, seen].to(wide)
            divisor[:, block] = weight
            out[:, block] = total.div_(weight.clamp_min_(EPS)[..., None]).add_(h[:, block])
        ctx.lengths = lengths
        ctx.save_for_backward(a, h, out, divisor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        a, h, out, divisor = ctx.saved_tensors
        wide = divisor.dtype
        da = torch.zeros(a.shape, dtype=wide, device=a.device)
        dh = torch.zeros(h.shape, dtype=wide, device=h.device)
        for block, before in _blocks(ctx.lengths, h):
            g, weight = d_out[:, block].to(wide), divisor[:, block, None]
            # where nothing is alike the divisor is a constant
            merged = out[:, block].to(wide) - h[:, block]
            through_sum = ((g * merged).sum(-1, keepdim=True) * (weight > EPS)).div_(weight.clamp_min(EPS))
            dh[:, block] += g
            g = g / weight.clamp_min(EPS)
            for seen in before:
                s = _scores(a, h, block, seen)
                some = h[:, seen].to(wide)
                dh[:, seen] += s.transpose(1, 2) @ g
                ds = (g @ some.transpose(1, 2)).sub_(through_sum).mul_(s > 0)
                da[block] += torch.einsum("lij,ljd->id", ds, some)
                dh[:, seen] += ds.transpose(1, 2) @ a[block].to(wide)
        return da.to(a.dtype), dh.to(h.dtype), None


def running_mean(rows_LSD: Tensor, *, lengths: Sequence[int]) -> Tensor:
    """Mean over rows 0..i of the document of row i, in the dtype of the rows; [..., S, D]."""
    wide = torch.promote_types(rows_LSD.dtype, torch.float32)
    found = []
    for part in rows_LSD.split(list(lengths), dim=-2):
        count = torch.arange(1, part.shape[-2] + 1, dtype=wide, device=part.device)
        found.append((part.to(wide).cumsum(-2) / count[:, None]).to(rows_LSD.dtype))
    return torch.cat(found, dim=-2)
