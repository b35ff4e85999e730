"""Exact causal attention over packed documents: forward with log-sum-exp, and backward for an output that is given.

The one place that knows the attention back ends. An S x S mask for packed documents costs S^2 bytes and skips nothing:
at 8192 rows and 64 documents it is 40 times slower on CPU than a call per document, which is also bit-equal to the
document alone. So documents run one by one, windows in blocks.

Every flash kernel's backward takes the output O and its log-sum-exp as inputs. A caller that stored the late rows of
both (`KnownRows`) has only the early rows computed again, and these come out bit for bit as in the first run because
the kernel is called on whole blocks of rows: its inner matrix sizes then do not change.

B batch, H query heads, K KV heads, S rows of the whole pack, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class KnownRows:
    """Attention output whose rows from `first` on are known; the rows before are filled in by whoever computes them."""

    out_BHSD: Tensor
    lse_BHS: Tensor
    first: int


def causal_attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    known: KnownRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which row i of a document sees rows 0..i of the same document, or the last `window` of them.

    Args:
        q_BHSD: queries [B, H, S, D]; any float dtype.
        k_BKSD, v_BKSD: keys and values [B, K, S, D]; K divides H.
        lengths: rows of each document, in order; they add up to S.
        scale: factor on q k^T.
        window: rows a query may look back on, itself included; None: all.
        known: rows not to be computed again; its tensors are completed in place.

    Returns:
        output [B, H, S, D] in the dtype of q, differentiable, and log-sum-exp [B, H, S] (fp32; fp64 for fp64 inputs),
        which is not.
    """
    assert sum(lengths) == q_BHSD.shape[2] == k_BKSD.shape[2], (tuple(lengths), q_BHSD.shape, k_BKSD.shape)
    return _Attention.apply(q_BHSD, k_BKSD, v_BKSD, tuple(lengths), scale, window, known)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        known: KnownRows | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _rows(q, k, v, lengths, scale, window, known)
        # views: autograd marks what a Function returns, and these may be tensors of whoever stored the rows
        out, lse = out.view_as(out), lse.view_as(lse)
        ctx.lengths, ctx.scale, ctx.window = lengths, scale, window
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if len(ctx.lengths) == 1 and not _windowed(q.shape[2], ctx.window):
            grads = _flash_backward(grad, q, k, v, out, lse, ctx.scale)
            return (*grads, None, None, None, None)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for at in _documents(ctx.lengths):
            q_, k_, v_, out_, grad_ = (x[:, :, at] for x in (q, k, v, out, grad))
            lse_ = lse[:, :, at]
            if not _windowed(q_.shape[2], ctx.window):
                dq[:, :, at], dk[:, :, at], dv[:, :, at] = _flash_backward(grad_, q_, k_, v_, out_, lse_, ctx.scale)
                continue
            dk[:, :, at], dv[:, :, at] = 0, 0
            dk_, dv_ = dk[:, :, at], dv[:, :, at]
            for rows, seen in _window_blocks(q_.shape[2], ctx.window):
                mask = _window_mask(rows, seen, ctx.window, q)
                pieces = (grad_[:, :, rows], q_[:, :, rows], k_[:, :, seen], v_[:, :, seen], out_[:, :, rows])
                block_dq, block_dk, block_dv = _masked_backward(*pieces, lse_[:, :, rows], mask, ctx.scale)
                dq[:, :, at][:, :, rows] = block_dq
                dk_[:, :, seen] += block_dk
                dv_[:, :, seen] += block_dv
        return dq, dk, dv, None, None, None, None


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    known: KnownRows | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all rows, computing those before `known.first` (all, if nothing is known)."""
    stop = q.shape[2] if known is None else known.first
    if known is not None:
        out, lse = known.out_BHSD, known.lse_BHS
    elif len(lengths) == 1 and not _windowed(q.shape[2], window):
        return _flash(q, k, v, scale)
    else:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for at in _documents(lengths):
        if at.start >= stop:
            break
        q_, k_, v_ = q[:, :, at], k[:, :, at], v[:, :, at]
        wanted = min(stop, at.stop) - at.start
        if not _windowed(q_.shape[2], window):
            out_, lse_ = _flash_prefix(q_, k_, v_, scale, wanted)
            out[:, :, at.start : at.start + wanted] = out_[:, :, :wanted]
            lse[:, :, at.start : at.start + wanted] = lse_[:, :, :wanted]
            continue
        assert window is not None
        for rows, seen in _window_blocks(q_.shape[2], window):
            if rows.start >= wanted:
                break
            mask = _window_mask(rows, seen, window, q)
            out_, lse_ = _masked(q_[:, :, rows], k_[:, :, seen], v_[:, :, seen], mask, scale)
            count = min(rows.stop, wanted) - rows.start
            first = at.start + rows.start
            out[:, :, first : first + count] = out_[:, :, :count]
            lse[:, :, first : first + count] = lse_[:, :, :count]
    return out, lse


def _documents(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _windowed(rows: int, window: int | None) -> bool:
    return window is not None and window < rows


def _window_blocks(rows: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows and the key rows they see: work per block is block * (block + window)."""
    block = max(window, 256)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        yield slice(start, stop), slice(max(0, start - window + 1), stop)


def _window_mask(rows: slice, seen: slice, window: int, like: Tensor) -> Tensor:
    """Additive mask [1, 1, rows, seen]: the fused kernels take it in the dtype of the queries."""
    ahead = torch.arange(rows.start, rows.stop, device=like.device)[:, None]
    ahead = ahead - torch.arange(seen.start, seen.stop, device=like.device)
    mask = torch.zeros(ahead.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_((ahead < 0) | (ahead >= window), float("-inf"))[None, None]


def prefix_rows(wanted: int, rows: int) -> int:
    """Query rows to run so that the first `wanted` of `rows` come out with the bits of the whole run.

    The CPU kernel cuts queries into blocks of 256 rows (64 or 32 for short sequences), chosen by how many there are;
    so a prefix must be whole blocks, and long enough for the same block size to be chosen.
    """
    block, least = (256, 768) if rows >= 768 else (64, 192) if rows >= 192 else (32, 1)
    return min(rows, max(-(-wanted // block) * block, least))


def _flash_prefix(q: Tensor, k: Tensor, v: Tensor, scale: float, wanted: int) -> tuple[Tensor, Tensor]:
    """At least the first `wanted` rows."""
    run = prefix_rows(wanted, q.shape[2])
    if q.device.type == "cuda":  # there the causal mask is aligned to the last key: the prefix sees its own keys only
        return _flash(q[:, :, :run], k[:, :, :run], v[:, :, :run], scale)
    # keys whole: the last block of keys is cut by their number, not by the causal limit
    return _flash(q[:, :, :run], k, v, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of one document by the device's fused kernel."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, attn_mask=None, scale=scale)
    k, v = _repeated(k, q), _repeated(v, q)
    if _cuda_flash(q):
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[:2]
    return _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)[:2]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, attn_mask=None, scale=scale
        )
    heads, k, v = k.shape[1], _repeated(k, q), _repeated(v, q)
    zero = torch.zeros((), dtype=torch.int64)  # no dropout: the kernels' generator state is not read
    if _cuda_flash(q):
        S = q.shape[2]
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, S, S, 0.0, True, zero, zero, scale=scale
        )
    else:
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, zero, zero, 0.0, [True, True, True, False], True, scale=scale
        )
    return dq, _summed(dk, heads), _summed(dv, heads)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a block of rows under an additive mask."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    k, v, mask = _repeated(k, q), _repeated(v, q), _bias(mask, q)
    return _aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, False, scale=scale)[:2]


def _masked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    heads, k, v, mask = k.shape[1], _repeated(k, q), _repeated(v, q), _bias(mask, q)
    zero = torch.zeros((), dtype=torch.int64)
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, mask, out, lse, zero, zero, 0.0, [True, True, True, False], False, scale=scale
    )
    return dq, _summed(dk, heads), _summed(dv, heads)


def _cuda_flash(q: Tensor) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256


def _repeated(x_BKSD: Tensor, q_BHSD: Tensor) -> Tensor:
    """KV heads as often as query heads share them: the CUDA kernels take equal numbers only."""
    return x_BKSD.repeat_interleave(q_BHSD.shape[1] // x_BKSD.shape[1], dim=1)


def _summed(grad_BHSD: Tensor, kv_heads: int) -> Tensor:
    return grad_BHSD.unflatten(1, (kv_heads, -1)).sum(2)


def _bias(mask: Tensor, q_BHSD: Tensor) -> Tensor:
    """The CUDA kernel wants its mask expanded over heads, and rows that start on 16 elements."""
    rows, seen = mask.shape[2:]
    padded = mask.new_empty((1, 1, rows, -(-seen // 16) * 16))[..., :seen]
    return padded.copy_(mask).expand(q_BHSD.shape[0], q_BHSD.shape[1], rows, seen)
