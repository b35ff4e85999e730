"""The attention kernels there are, each with the two things a memory plan needs of it.

A forward that also returns the log-sum-exp of each row, and a backward that takes output and log-sum-exp as given. What
differs between kernels is told here and nowhere else: layouts, padding, whether they take fewer KV heads than query
heads, packed documents and windows, and what a call on the first rows alone must look like for these rows to come out
with the bits of the whole run.

- A kernel that packs documents (FlashAttention on CUDA, [rows, heads, D] with cumulative lengths) runs all of them in
  one call. Others run document by document: an S x S mask for packs would cost S^2 bytes and skip nothing (on CPU, 40
  times slower at 8192 rows and 64 documents).
- On CUDA the causal mask is aligned to the last key, so a prefix sees its own keys only. On CPU the keys stay whole:
  their last block is cut by their number, not by the causal limit.
- FlashAttention's packed call is used even for one document: the dense one may split keys among thread blocks when
  there are few rows, which would give a short prefix other bits.

B batch, H query heads, K KV heads, S rows of the whole pack, D head size, T = B * S rows of all packs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


class Pack(NamedTuple):
    """What a call is about, beside its tensors."""

    lengths: tuple[int, ...]
    """Rows of each document; they add up to S."""
    scale: float
    window: int | None = None
    """Rows a query may look back on, itself included; None: all."""

    def documents(self) -> Iterator[slice]:
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length

    def first(self, rows: int) -> Pack:
        """The same of the first rows alone."""
        starts = accumulate(self.lengths, initial=0)
        cut = (min(length, rows - start) for start, length in zip(starts, self.lengths) if start < rows)
        return self._replace(lengths=tuple(cut))

    @property
    def windowed(self) -> bool:
        return self.window is not None and self.window < max(self.lengths)


Grads = tuple[Tensor, Tensor, Tensor]


class Backend(ABC):
    """One kernel. Tensors are [B, H or K, S, D], in any strides; log-sum-exp is [B, H, S], fp32 (fp64 for fp64)."""

    name: ClassVar[str]
    block_rows: ClassVar[int]
    """A prefix of so many rows, or a multiple, has the bits of the whole run."""

    @abstractmethod
    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        """Why it cannot be used for such tensors; None: it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of all rows."""

    @abstractmethod
    def prefix(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, rows: int, out: Tensor, lse: Tensor) -> None:
        """Fill in the first `rows` rows of output and log-sum-exp, with the bits of `forward`."""

    @abstractmethod
    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack) -> Grads:
        """Gradients by q, k, v, with output and log-sum-exp as given."""


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


class Packing(Backend):
    """FlashAttention with cumulative lengths: packs, windows and fewer KV heads in one call.

    `head_groups` cuts its backward: it adds dq up in fp32 and, with fewer KV heads, makes dk and dv for every query
    head, 8 times the size of q in all at four query heads to a KV head; one KV head with its queries at a time, these
    are as many times smaller. Heads are independent, so it changes no bit, and a call is long enough to fill a GPU.
    """

    block_rows = 256
    least_row_heads: ClassVar[int] = 1 << 16
    """Rows times query heads of a call of backward, at least: 512 thread blocks of 128 rows."""

    @abstractmethod
    def packed(self, q: Tensor, k: Tensor, v: Tensor, at: _Offsets, pack: Pack) -> tuple[Tensor, Tensor]:
        """q [T, H, D], k and v [T, K, D] -> output [T, H, D], log-sum-exp [H, T]."""

    @abstractmethod
    def packed_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: _Offsets, pack: Pack
    ) -> Grads: ...

    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        if q.device.type != "cuda":
            return f"tensors on {q.device.type}"
        if q.dtype not in HALF:
            return f"{q.dtype}"
        return None if q.shape[3] % 8 == 0 and q.shape[3] <= 256 else f"heads of {q.shape[3]}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        out, lse = self.packed(_rows_first(q), _rows_first(k), _rows_first(v), _Offsets.of(q, pack), pack)
        return _heads_first(out, q), _lse_heads_first(lse, q)

    def prefix(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, rows: int, out: Tensor, lse: Tensor) -> None:
        if not rows:
            return
        run = _whole_blocks(pack, rows, self.block_rows)
        found = self.forward(q[:, :, :run], k[:, :, :run], v[:, :, :run], pack.first(run))
        out[:, :, :rows], lse[:, :, :rows] = found[0][:, :, :rows], found[1][:, :, :rows]

    def head_groups(self, q: Tensor, k: Tensor) -> int:
        """Into how many calls backward is cut."""
        heads, row_heads = k.shape[1], q.shape[0] * q.shape[1] * q.shape[2]
        fitting = (groups for groups in range(heads, 1, -1) if heads % groups == 0)
        return next((groups for groups in fitting if row_heads // groups >= self.least_row_heads), 1)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack) -> Grads:
        at, groups = _Offsets.of(q, pack), self.head_groups(q, k)
        by_query, by_key = list(map(_rows_first, (grad, q, out))), list(map(_rows_first, (k, v)))
        lse_ = lse.transpose(0, 1).reshape(lse.shape[1], -1)
        if groups == 1:
            (grad_, q_, out_), (k_, v_) = by_query, by_key
            grads = self.packed_backward(grad_, q_, k_, v_, out_, lse_.contiguous(), at, pack)
        else:
            grads = torch.empty_like(by_query[1]), torch.empty_like(by_key[0]), torch.empty_like(by_key[1])
            for group in range(groups):
                grad_, q_, out_, dq = (_part(x, 1, group, groups) for x in (*by_query, grads[0]))
                k_, v_, dk, dv = (_part(x, 1, group, groups) for x in (*by_key, grads[1], grads[2]))
                lse_part = _part(lse_, 0, group, groups).contiguous()
                found = self.packed_backward(grad_, q_, k_, v_, out_, lse_part, at, pack)
                for into, made in zip((dq, dk, dv), found):
                    into.copy_(made)
        return _heads_first(grads[0], q), _heads_first(grads[1], k), _heads_first(grads[2], v)


@contextmanager
def in_small_parts() -> Iterator[None]:
    """Inside, every backward is cut into as many parts as it can be: short runs then need what long ones need."""
    before, Packing.least_row_heads = Packing.least_row_heads, 1
    try:
        yield
    finally:
        Packing.least_row_heads = before


class _Offsets(NamedTuple):
    """Where documents begin and end among T rows."""

    cumulative: Tensor
    """int32 [documents + 1]"""
    longest: int

    @staticmethod
    def of(q: Tensor, pack: Pack) -> _Offsets:
        return _offsets(pack.lengths * q.shape[0], q.device)


@functools.lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> _Offsets:
    """Made once for a pack and not in every layer: the copy to the device waits for it."""
    return _Offsets(torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device), max(lengths))


class TorchFlash(Packing):
    """The FlashAttention that torch calls: its own copy of FlashAttention-2, or another in its place, for the whole
    process (`torch.nn.attention.activate_flash_attention_impl`)."""

    name = "flash"
    stand_in: ClassVar[str | None] = None
    """Name under which torch knows what takes the place of its own."""
    module: ClassVar[str] = "torch"

    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        if (why := super().refusal(q, k, pack)) is not None:
            return why
        if not _installed(self.module):
            return f"{self.module} is not installed"
        return self._put_in_place()

    def _put_in_place(self) -> str | None:
        """Have torch call this implementation; why that cannot be."""
        from torch.nn import attention

        if not hasattr(attention, "activate_flash_attention_impl"):
            return None if self.stand_in is None else f"torch {torch.__version__} calls its own only"
        if attention.current_flash_attention_impl() == self.stand_in:
            return None
        restore = getattr(attention, "restore_flash_attention_impl", None)
        try:
            if self.stand_in is None:
                if restore is None:
                    return "another has taken its place, which this torch does not take back"
                restore()
            else:
                attention.activate_flash_attention_impl(self.stand_in)
        except (ValueError, RuntimeError, ImportError) as error:
            return f"torch cannot call it: {error}"
        return None

    def packed(self, q: Tensor, k: Tensor, v: Tensor, at: _Offsets, pack: Pack) -> tuple[Tensor, Tensor]:
        back = -1 if pack.window is None else pack.window - 1
        out, lse, *_ = _aten._flash_attention_forward(
            q, k, v, at.cumulative, at.cumulative, at.longest, at.longest, 0.0, True, False,
            scale=pack.scale, window_size_left=back, window_size_right=0, **_one_split(),
        )  # fmt: skip
        return out, lse

    def packed_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: _Offsets, pack: Pack
    ) -> Grads:
        back = -1 if pack.window is None else pack.window - 1
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout: not read
        return _aten._flash_attention_backward(
            grad, q, k, v, out, lse, at.cumulative, at.cumulative, at.longest, at.longest, 0.0, True,
            state, torch.zeros((), dtype=torch.uint64, device=q.device),
            scale=pack.scale, window_size_left=back, window_size_right=0,
        )  # fmt: skip


class TorchFlash3(TorchFlash):
    """FlashAttention-3: Hopper."""

    name, stand_in, module = "flash3", "FA3", "flash_attn_interface"


class TorchFlash4(TorchFlash):
    """FlashAttention-4: Hopper and Blackwell."""

    name, stand_in, module = "flash4", "FA4", "flash_attn.cute"


class FlashAttention2(Packing):
    """The package flash-attn, which may be newer than torch's copy."""

    name = "flash-attn"

    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        if not _installed("flash_attn.flash_attn_interface"):
            return "flash_attn is not installed"
        return super().refusal(q, k, pack)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, at: _Offsets, pack: Pack) -> tuple[Tensor, Tensor]:
        found = self._functions()._flash_attn_varlen_forward(
            q=q, k=k, v=v, cu_seqlens_q=at.cumulative, cu_seqlens_k=at.cumulative, max_seqlen_q=at.longest,
            max_seqlen_k=at.longest, dropout_p=0.0, softmax_scale=pack.scale, causal=True, **_window(pack),
        )  # fmt: skip
        return found[0], found[1]

    def packed_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: _Offsets, pack: Pack
    ) -> Grads:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._functions()._flash_attn_varlen_backward(
            dout=grad, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=grads[0], dk=grads[1], dv=grads[2],
            cu_seqlens_q=at.cumulative, cu_seqlens_k=at.cumulative, max_seqlen_q=at.longest, max_seqlen_k=at.longest,
            dropout_p=0.0, softmax_scale=pack.scale, causal=True, **_window(pack), softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads

    @staticmethod
    def _functions() -> Any:
        return importlib.import_module("flash_attn.flash_attn_interface")


@functools.cache
def _one_split() -> dict[str, int]:
    """Keys are not to be split among thread blocks when there are few rows: a prefix would get other bits."""
    schema = _aten._flash_attention_forward.default._schema
    return {"num_splits": 1} if any(a.name == "num_splits" for a in schema.arguments) else {}


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _window(pack: Pack) -> dict[str, int]:
    return {"window_size_left": -1 if pack.window is None else pack.window - 1, "window_size_right": 0}


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CpuFlash(), TorchFlash4(), TorchFlash3(), TorchFlash(), FlashAttention2(), CuDnn(), Efficient())
}
"""By name."""


def _whole_blocks(pack: Pack, rows: int, block: int) -> int:
    """The first rows, up to the end of a block of the document they end in."""
    for at in pack.documents():
        if rows <= at.stop:
            return min(at.stop, at.start + -(-(rows - at.start) // block) * block)
    raise AssertionError((rows, pack.lengths))


def _rows_first(x_BHSD: Tensor) -> Tensor:
    """[T, H, D], a view where rows come before heads in memory, as transformers leaves them."""
    return x_BHSD.transpose(1, 2).flatten(0, 1).contiguous()


def _heads_first(x_THD: Tensor, like_BHSD: Tensor) -> Tensor:
    return x_THD.unflatten(0, (like_BHSD.shape[0], like_BHSD.shape[2])).transpose(1, 2)


def _lse_heads_first(lse_HT: Tensor, like_BHSD: Tensor) -> Tensor:
    return lse_HT.unflatten(1, (like_BHSD.shape[0], like_BHSD.shape[2])).transpose(0, 1)


def _part(x: Tensor, dim: int, index: int, parts: int) -> Tensor:
    size = x.shape[dim] // parts
    return x.narrow(dim, index * size, size)


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
