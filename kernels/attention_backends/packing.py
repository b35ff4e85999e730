"""FlashAttention with cumulative lengths: packs, windows and fewer KV heads in one call.

The packed call is used even for one document: the dense one may split keys among thread blocks when there are few rows,
which would give a short prefix other bits.

T = B * S rows of all packs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from farspan.kernels.attention_backends.contract import HALF, Backend, Grads, Pack

_aten = torch.ops.aten


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
