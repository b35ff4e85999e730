"""Causal attention behind a prefix of keys and values that every row of every document sees (prefix tuning).

Source: Li and Liang, Prefix-Tuning, 2021, https://arxiv.org/abs/2101.00190. Attention over [prefix; document] is the
document's, from whichever kernel, mixed with the prefix's by their log-sum-exps; and the kernel's own backward, given
the mixed output and log-sum-exp, yields the document's share of the gradients exactly. So the prefix is no row of the
pack. It costs H n D for a row, beside what the document costs, and stores nothing that attention does not.

The prefix's products are made for blocks of rows at fixed places, so that rows which are computed again have the bits
of the first run.

B batch, H query heads, K KV heads, S rows of the pack, D head size, n prefix tokens, G query heads of a KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.attention import KnownRows, backend_for
from farspan.kernels.attention_backends import Pack

BLOCK_ROWS = 256


class Prefix(NamedTuple):
    """keys, values: [K, n, D], as attention reads them: past any rotary embedding."""

    keys: Tensor
    values: Tensor


def prefixed_attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    prefix: Prefix,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    known: KnownRows | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.attention.causal_attention` with a prefix, which a sliding window does not hide.

    Returns:
        output [B, H, S, D], differentiable by q, k, v and the prefix, and log-sum-exp [B, H, S], which is not.
    """
    pack = Pack(tuple(lengths), scale, window)
    return _Prefixed.apply(q_BHSD, k_BKSD, v_BKSD, *prefix, pack, known)


class _Prefixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pack: Pack, known: KnownRows | None
    ) -> tuple[Tensor, Tensor]:
        backend = backend_for(q, k, pack)
        if known is None:
            out, lse = backend.forward(q, k, v, pack)
            _mix(q, keys, values, pack.scale, out, lse, q.shape[2])
        else:
            out, lse = known.out_BHSD, known.lse_BHS
            if known.first:
                backend.prefix(q, k, v, pack, known.first, out, lse)
                _mix(q, keys, values, pack.scale, out, lse, known.first)
        out, lse = out.view_as(out), lse.view_as(lse)
        ctx.pack = pack
        ctx.save_for_backward(q, k, v, keys, values, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, k, v, keys, values, out, lse = ctx.saved_tensors
        pack: Pack = ctx.pack
        dq, dk, dv = backend_for(q, k, pack).backward(grad, q, k, v, out, lse, pack)
        d_keys, d_values = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (keys, values))
        wide_keys, wide_values = keys.to(lse.dtype), values.to(lse.dtype)
        for rows in _blocks(q.shape[2]):
            q_KGr, grad_KGr = _heads(q[:, :, rows], keys, lse), _heads(grad[:, :, rows], keys, lse)
            p = (_scores(q_KGr, wide_keys, pack.scale) - _heads(lse[:, :, rows, None], keys, lse)).exp_()
            delta = (grad_KGr * _heads(out[:, :, rows], keys, lse)).sum(-1, keepdim=True)
            ds = (torch.einsum("bkgrd,knd->bkgrn", grad_KGr, wide_values) - delta).mul_(p).mul_(pack.scale)
            d_keys += torch.einsum("bkgrn,bkgrd->knd", ds, q_KGr)
            d_values += torch.einsum("bkgrn,bkgrd->knd", p, grad_KGr)
            dq[:, :, rows] += torch.einsum("bkgrn,knd->bkgrd", ds, wide_keys).flatten(1, 2).to(dq.dtype)
        return dq, dk, dv, d_keys.to(keys.dtype), d_values.to(values.dtype), None, None


def _blocks(rows: int) -> list[slice]:
    return [slice(first, min(rows, first + BLOCK_ROWS)) for first in range(0, rows, BLOCK_ROWS)]


def _heads(x_BHrX: Tensor, keys: Tensor, like: Tensor) -> Tensor:
    """[B, K, G, r, X], fp32 or wider."""
    return x_BHrX.to(like.dtype).unflatten(1, (keys.shape[0], -1))


def _scores(q_BKGrD: Tensor, keys_KnD: Tensor, scale: float) -> Tensor:
    return torch.einsum("bkgrd,knd->bkgrn", q_BKGrD, keys_KnD).mul_(scale)


def _mix(q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor, lse: Tensor, count: int) -> None:
    """Change the first `count` rows of output and log-sum-exp to those with the prefix.

    All is computed for whole blocks, since matmuls of fewer rows and the last few elements of a vectorised loop may
    round otherwise; of rows that are known already the result is thrown away.
    """
    wide_keys, wide_values = keys.to(lse.dtype), values.to(lse.dtype)
    for rows in _blocks(q.shape[2]):
        if rows.start >= count:
            return
        scores = _scores(_heads(q[:, :, rows], keys, lse), wide_keys, scale)
        of_prefix = scores.logsumexp(-1)
        added = torch.einsum("bkgrn,knd->bkgrd", (scores - of_prefix[..., None]).exp_(), wide_values).flatten(1, 2)
        of_prefix = of_prefix.flatten(1, 2)
        before = lse[:, :, rows].contiguous()
        whole = torch.logaddexp(before, of_prefix)
        mixed = out[:, :, rows].to(lse.dtype) * (before - whole).exp_()[..., None]
        mixed += added * (of_prefix - whole).exp_()[..., None]
        new = min(rows.stop, count) - rows.start
        at = slice(rows.start, rows.start + new)
        out[:, :, at] = mixed[:, :, :new].to(out.dtype)
        lse[:, :, at] = whole[:, :, :new]
