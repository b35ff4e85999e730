"""Kernels without packs: they run one document at a time, and a window, if they know masks, block by block.

An S x S mask for packs would cost S^2 bytes and skip nothing (on CPU, 40 times slower at 8192 rows and 64 documents).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from farspan.kernels.attention_backends.contract import HALF, Backend, Grads, Pack

_aten = torch.ops.aten


class PerDocument(Backend):
    """Kernels without packs. They run one document at a time, and a window, if they know masks, block by block."""

    masks: ClassVar[bool] = False

    @abstractmethod
    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Causal attention of one document."""

    @abstractmethod
    def dense_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads: ...

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Under an additive mask [1, 1, rows, keys]."""
        raise NotImplementedError

    def masked_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
    ) -> Grads:
        raise NotImplementedError

    def dense_prefix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int) -> tuple[Tensor, Tensor]:
        """At least the first `rows` rows of one document."""
        run = min(q.shape[2], -(-rows // self.block_rows) * self.block_rows)
        return self.dense(q[:, :, :run], k[:, :, :run], v[:, :, :run], scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        if len(pack.lengths) == 1 and not pack.windowed:
            return self.dense(q, k, v, pack.scale)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        self.prefix(q, k, v, pack, q.shape[2], out, lse)
        return out, lse

    def prefix(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, rows: int, out: Tensor, lse: Tensor) -> None:
        for at in pack.documents():
            if at.start >= rows:
                break
            wanted = min(rows, at.stop) - at.start
            for found, start in self._document(q[:, :, at], k[:, :, at], v[:, :, at], pack, wanted):
                here = slice(at.start + start, at.start + min(wanted, start + found[0].shape[2]))
                count = here.stop - here.start
                out[:, :, here], lse[:, :, here] = found[0][:, :, :count], found[1][:, :, :count]

    def _document(
        self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, wanted: int
    ) -> Iterator[tuple[tuple[Tensor, Tensor], int]]:
        """Output and log-sum-exp of the first rows of a document, piece by piece, each with its first row."""
        window = pack.window
        if window is None or window >= q.shape[2]:
            yield self.dense_prefix(q, k, v, pack.scale, wanted), 0
            return
        for rows, seen in window_blocks(q.shape[2], window):
            if rows.start >= wanted:
                return
            mask = window_mask(rows, seen, window, q)
            yield self.masked(q[:, :, rows], k[:, :, seen], v[:, :, seen], mask, pack.scale), rows.start

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack) -> Grads:
        if len(pack.lengths) == 1 and not pack.windowed:
            return self.dense_backward(grad, q, k, v, out, lse, pack.scale)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for at in pack.documents():
            dq, dk, dv = (x[:, :, at] for x in grads)
            g, q_, k_, v_, o = (x[:, :, at] for x in (grad, q, k, v, out))
            l_, window = lse[:, :, at], pack.window
            if window is None or window >= q_.shape[2]:
                for into, found in zip((dq, dk, dv), self.dense_backward(g, q_, k_, v_, o, l_, pack.scale)):
                    into.copy_(found)
                continue
            dk.zero_()
            dv.zero_()
            for rows, seen in window_blocks(q_.shape[2], window):
                mask = window_mask(rows, seen, window, q)
                g_, q_rows, o_, l_rows = g[:, :, rows], q_[:, :, rows], o[:, :, rows], l_[:, :, rows]
                block_dq, block_dk, block_dv = self.masked_backward(
                    g_, q_rows, k_[:, :, seen], v_[:, :, seen], o_, l_rows, mask, pack.scale
                )
                dq[:, :, rows] = block_dq
                dk[:, :, seen] += block_dk
                dv[:, :, seen] += block_dv
        return grads


def window_blocks(rows: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows and the key rows they see: work per block is block * (block + window)."""
    block = max(window, 256)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        yield slice(start, stop), slice(max(0, start - window + 1), stop)


def window_mask(rows: slice, seen: slice, window: int, like: Tensor) -> Tensor:
    """Additive mask [1, 1, rows, seen]: the fused kernels take it in the dtype of the queries."""
    ahead = torch.arange(rows.start, rows.stop, device=like.device)[:, None]
    ahead = ahead - torch.arange(seen.start, seen.stop, device=like.device)
    mask = torch.zeros(ahead.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_((ahead < 0) | (ahead >= window), float("-inf"))[None, None]


def prefix_rows(wanted: int, rows: int) -> int:
    """Query rows to run on CPU so that the first `wanted` of `rows` come out with the bits of the whole run.

    The kernel cuts queries into blocks of 256 rows (64 or 32 for short sequences), chosen by how many there are; so a
    prefix must be whole blocks, and long enough for the same block size to be chosen.
    """
    block, least = (256, 768) if rows >= 768 else (64, 192) if rows >= 192 else (32, 1)
    return min(rows, max(-(-wanted // block) * block, least))


class CpuFlash(PerDocument):
    """torch's flash attention for CPU: any float dtype, fewer KV heads, masks."""

    name, block_rows, masks = "cpu", 256, True

    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        return None if q.device.type == "cpu" else f"tensors on {q.device.type}"

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, attn_mask=None, scale=scale)

    def dense_prefix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int) -> tuple[Tensor, Tensor]:
        return self.dense(q[:, :, : prefix_rows(rows, q.shape[2])], k, v, scale)

    def dense_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, attn_mask=None, scale=scale
        )

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)

    def masked_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
    ) -> Grads:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )


class Efficient(PerDocument):
    """torch's memory-efficient attention: what CUDA has for fp32. Equal numbers of heads, padded log-sum-exp."""

    name, block_rows, masks = "efficient", 256, True

    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        if q.device.type != "cuda":
            return f"tensors on {q.device.type}"
        return None if q.dtype in (*HALF, torch.float32) else f"{q.dtype}"

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self._forward(q, k, v, None, scale)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self._forward(q, k, v, mask, scale)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        bias = None if mask is None else _bias(mask, q)
        out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(
            q, _repeated(k, q), _repeated(v, q), bias, True, 0.0, mask is None, scale=scale
        )
        return out, lse[:, :, : q.shape[2]]

    def dense_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads:
        return self._backward(grad, q, k, v, out, lse, None, scale)

    def masked_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
    ) -> Grads:
        return self._backward(grad, q, k, v, out, lse, mask, scale)

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> Grads:
        heads, rows = k.shape[1], q.shape[2]
        padded = lse.new_full((*lse.shape[:2], -(-rows // 32) * 32), float("inf"))  # as its forward leaves it
        padded[:, :, :rows] = lse
        bias = None if mask is None else _bias(mask, q)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # it takes rows to be dense, heads inside them
        seed = torch.zeros((), dtype=torch.int64)  # no dropout: not read
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, _repeated(k, q), _repeated(v, q), bias, out, padded, seed, seed, 0.0,
            [True, True, True, False], mask is None, scale=scale,
        )  # fmt: skip
        return dq, _summed(dk, heads), _summed(dv, heads)


class CuDnn(PerDocument):
    """cuDNN's fused attention, without packs and windows."""

    name, block_rows = "cudnn", 512

    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        if q.device.type != "cuda":
            return f"tensors on {q.device.type}"
        if not torch.backends.cudnn.is_available():
            return "no cuDNN"
        if pack.windowed:
            return "a window"
        if min(pack.lengths) < 2:
            return "a document of one row"
        if q.dtype not in HALF:
            return f"{q.dtype}"
        return None if q.shape[3] % 8 == 0 and q.shape[3] <= 128 else f"heads of {q.shape[3]}"

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
        return out, lse.view(q.shape[:3])

    def dense_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Grads:
        seed, rows = torch.zeros((), dtype=torch.int64, device=q.device), q.shape[2]
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.contiguous().unsqueeze(3), seed, seed, None, None, None, rows, rows,
            0.0, True, scale=scale,
        )  # fmt: skip


def _repeated(x_BKSD: Tensor, q_BHSD: Tensor) -> Tensor:
    """KV heads as often as query heads share them."""
    group = q_BHSD.shape[1] // x_BKSD.shape[1]
    return x_BKSD if group == 1 else x_BKSD.repeat_interleave(group, dim=1)


def _summed(grad_BHSD: Tensor, kv_heads: int) -> Tensor:
    return grad_BHSD if grad_BHSD.shape[1] == kv_heads else grad_BHSD.unflatten(1, (kv_heads, -1)).sum(2)


def _bias(mask: Tensor, q_BHSD: Tensor) -> Tensor:
    """The memory-efficient kernel wants its mask expanded over heads, and rows that start on 16 elements."""
    rows, seen = mask.shape[2:]
    padded = mask.new_empty((1, 1, rows, -(-seen // 16) * 16))[..., :seen]
    return padded.copy_(mask).expand(q_BHSD.shape[0], q_BHSD.shape[1], rows, seen)
