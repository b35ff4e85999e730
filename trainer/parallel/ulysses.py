"""Ulysses: an all-to-all from rows to heads before attention, and one back after it.

Every rank holds s = S / P rows of all heads; attention needs all S rows of some heads. Source: Jacobs et al., DeepSpeed
Ulysses, 2023. Two things go beyond it. Heads need not divide by P: rank p takes query heads [H*p/P, H*(p+1)/P). KV
heads are sent to every rank whose query heads use them, so GQA works with more ranks than KV heads; the gradients of a
head sent twice are added where its rows live. q, k and v travel in one message.

Volume per rank and layer is about 4 * S * hidden / P elements forward and as many backward, whatever P is.

What crosses may be in codes of few bits (`trainer.parallel.learned_bits`).

B batch, H query heads, K KV heads, S rows of the pack, s rows of this rank, D head size, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import JobError
from farspan.trainer.parallel.learned_bits import LayerBits


@dataclass(frozen=True)
class HeadLayout:
    """Which heads each rank attends with."""

    query: tuple[range, ...]
    """Query heads of each rank, in order and without gaps."""
    kv: tuple[range, ...]
    """KV heads each rank needs; neighbours may share one."""

    def kv_index(self, rank: int, group: int) -> list[int] | None:
        """KV head, within the rank's own, of each of its query heads; None where plain grouping says the same."""
        heads, kv = self.query[rank], self.kv[rank]
        index = [head // group - kv.start for head in heads]
        if len(heads) % len(kv) == 0 and index == [i // (len(heads) // len(kv)) for i in range(len(heads))]:
            return None
        return index


@lru_cache
def head_layout(heads: int, kv_heads: int, ranks: int) -> HeadLayout:
    """Spread `heads` query heads over `ranks` as evenly as whole heads allow.

    Raises:
        JobError: there are more ranks than query heads.
    """
    if ranks > heads:
        raise JobError(
            f"SP degree {ranks} is more than the model's {heads} attention heads",
            at="parallel.sp",
            why=f"Ulysses gives every rank at least one whole head: {heads} heads / {ranks} ranks < 1",
            try_=f"--set parallel.sp={heads} or less; use the other ranks as dp",
        )
    group = heads // kv_heads
    query = tuple(range(heads * p // ranks, heads * (p + 1) // ranks) for p in range(ranks))
    kv = tuple(range(r.start // group, (r.stop - 1) // group + 1) for r in query)
    return HeadLayout(query, kv)


class Ulysses:
    """The two exchanges of one sp group, for a model with `heads` query and `kv_heads` KV heads."""

    lone = False
    """Whether the other ranks are not there."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def to_heads(
        self, q_BHsD: Tensor, k_BKsD: Tensor, v_BKsD: Tensor, bits: LayerBits | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of all heads -> all rows of this rank's heads: [B, h, S, D], [B, k, S, D], [B, k, S, D].

        Where this rank's query heads are not evenly grouped over its KV heads, KV heads are repeated: k == h.

        Args:
            bits: of the codes that cross; None: everything crosses as it is.
        """
        layout = head_layout(q_BHsD.shape[1], k_BKsD.shape[1], self.ranks)
        q, k, v = _ToHeads.apply(q_BHsD, k_BKsD, v_BKsD, layout, self, bits)
        index = layout.kv_index(self.rank, q_BHsD.shape[1] // k_BKsD.shape[1])
        if index is not None:
            at = torch.tensor(index, device=k.device)
            k, v = k.index_select(1, at), v.index_select(1, at)
        return q, k, v

    def spread(self, x_HsD: Tensor, shared_sD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of H things -> all rows of this rank's share of them [h, S, D], and of one that all need [S, D].

        Things are shared out as evenly as whole ones allow; a rank may have none.
        """
        layout, shared = self._shares(len(x_HsD)), shared_sD[None, None]
        # both of the layout's partners of a query: the second is sent along for nothing
        mine, whole, _ = _ToHeads.apply(x_HsD[None], shared, shared.detach(), layout, self, None)
        return mine[0], whole[0, 0]

    def gather(self, x_hSD: Tensor, count: int) -> Tensor:
        """The way back: all rows of this rank's share of `count` things -> rows of all of them [H, s, D]."""
        return _ToRows.apply(x_hSD[None], self._shares(count), self, None)[0]

    def _shares(self, count: int) -> HeadLayout:
        query = tuple(range(count * p // self.ranks, count * (p + 1) // self.ranks) for p in range(self.ranks))
        return HeadLayout(query, (range(1),) * self.ranks)

    def exchange(self, send: Tensor, send_heads: list[int], recv_heads: list[int]) -> Tensor:
        """All-to-all of [sum(send_heads), ...] -> [sum(recv_heads), ...], split along dim 0."""
        recv = send.new_empty((sum(recv_heads), *send.shape[1:]))
        # a reshape that needed no copy may still be strided
        self.all_to_all(recv, send.contiguous(), recv_heads, send_heads)
        return recv

    def all_to_all(self, recv: Tensor, send: Tensor, recv_heads: list[int], send_heads: list[int]) -> None:
        dist.all_to_all_single(recv, send, recv_heads, send_heads, group=self.group)

    def to_rows(self, o_BhSD: Tensor, heads: int, kv_heads: int, bits: LayerBits | None = None) -> Tensor:
        """All rows of this rank's heads -> rows of all heads [B, H, s, D]; `bits` as for `to_heads`."""
        return _ToRows.apply(o_BhSD, head_layout(heads, kv_heads, self.ranks), self, bits)


class LoneRank(Ulysses):
    """One rank of an sp group without the others, for measuring: the same buffers, filled with this rank's own rows."""

    lone = True

    def __init__(self, ranks: int, rank: int = 0) -> None:
        self.ranks, self.rank = ranks, rank

    def all_to_all(self, recv: Tensor, send: Tensor, recv_heads: list[int], send_heads: list[int]) -> None:
        for at, head in enumerate(recv):
            head.copy_(send[at % len(send)])


def _rows_out(x_BhSD: Tensor, ranks: int) -> Tensor:
    """[B, h, S, D] -> [P * h, B, s, D]: the rows of each rank together, ready to be sent."""
    B, h, S, D = x_BhSD.shape
    return x_BhSD.reshape(B, h, ranks, S // ranks, D).permute(2, 1, 0, 3, 4).reshape(ranks * h, B, S // ranks, D)


def _rows_in(x_PhBsD: Tensor, ranks: int) -> Tensor:
    """[P * h, B, s, D] -> [B, h, P * s, D]."""
    Ph, B, s, D = x_PhBsD.shape
    h = Ph // ranks
    return x_PhBsD.view(ranks, h, B, s, D).permute(2, 1, 0, 3, 4).reshape(B, h, ranks * s, D)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, ulysses: Ulysses, bits: LayerBits | None
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.ulysses, ctx.kv_heads, ctx.bits = layout, ulysses, k.shape[1], bits
        pieces = []
        for query, kv in zip(layout.query, layout.kv):
            pieces += [x[:, r.start : r.stop].transpose(0, 1) for x, r in ((q, query), (k, kv), (v, kv))]
        counts = [len(query) + 2 * len(kv) for query, kv in zip(layout.query, layout.kv)]
        mine = counts[ulysses.rank]
        if bits is None:
            recv = ulysses.exchange(torch.cat(pieces), counts, [mine] * ulysses.ranks)
        else:
            items = [bits.inputs(query, kv) for query, kv in zip(layout.query, layout.kv)]
            own, learns = [items[ulysses.rank]] * ulysses.ranks, any(ctx.needs_input_grad)
            recv, ctx.probes = bits.exchange(ulysses, torch.cat(pieces), items, own, learns=learns)
        h, n = len(layout.query[ulysses.rank]), len(layout.kv[ulysses.rank])
        whole = _rows_in(recv, ulysses.ranks)
        return whole[:, :h], whole[:, h : h + n], whole[:, h + n :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layout, ulysses, bits = ctx.layout, ctx.ulysses, ctx.bits
        counts = [len(query) + 2 * len(kv) for query, kv in zip(layout.query, layout.kv)]
        mine = counts[ulysses.rank]
        send = _rows_out(torch.cat(grads, dim=1), ulysses.ranks)
        if bits is None:
            recv = ulysses.exchange(send, [mine] * ulysses.ranks, counts)
        else:
            items = [bits.inputs(query, kv) for query, kv in zip(layout.query, layout.kv)]
            recv = bits.exchange_gradients(ulysses, send, [items[ulysses.rank]] * ulysses.ranks, items, ctx.probes)
        _, B, s, D = recv.shape
        heads = layout.query[-1].stop
        dq = recv.new_empty((heads, B, s, D))
        dk, dv = recv.new_zeros((2, ctx.kv_heads, B, s, D))
        at = 0
        for query, kv in zip(layout.query, layout.kv):
            h, n = len(query), len(kv)
            dq[query.start : query.stop] = recv[at : at + h]
            dk[kv.start : kv.stop] += recv[at + h : at + h + n]  # a head sent to two ranks gets both gradients
            dv[kv.start : kv.stop] += recv[at + h + n : at + h + 2 * n]
            at += h + 2 * n
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None, None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, layout: HeadLayout, ulysses: Ulysses, bits: LayerBits | None) -> Tensor:
        ctx.layout, ctx.ulysses, ctx.bits = layout, ulysses, bits
        counts, mine, send = [len(r) for r in layout.query], o.shape[1], _rows_out(o, ulysses.ranks)
        if bits is None:
            recv = ulysses.exchange(send, [mine] * ulysses.ranks, counts)
        else:
            items, learns = [bits.outputs(r) for r in layout.query], any(ctx.needs_input_grad)
            own = [items[ulysses.rank]] * ulysses.ranks
            recv, ctx.probes = bits.exchange(ulysses, send, own, items, learns=learns)
        return recv.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layout, ulysses, bits = ctx.layout, ctx.ulysses, ctx.bits
        counts = [len(r) for r in layout.query]
        mine, send = counts[ulysses.rank], grad.transpose(0, 1)
        if bits is None:
            recv = ulysses.exchange(send, counts, [mine] * ulysses.ranks)
        else:
            items = [bits.outputs(r) for r in layout.query]
            own = [items[ulysses.rank]] * ulysses.ranks
            recv = bits.exchange_gradients(ulysses, send, items, own, ctx.probes)
        return _rows_in(recv, ulysses.ranks), None, None, None
