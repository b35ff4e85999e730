"""Attention over the key blocks that product-quantized codes point to: SPT, for the benchmark beside it. Experimental.

Source: Gui et al., SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification, 2023,
https://arxiv.org/abs/2312.10365. There queries and keys are product-quantized (each of M parts of a vector has the
number of its nearest codeword), a query keeps the S/8 keys that agree with it in most parts, and scores, weights and
products of these alone are computed and stored. Here the choice is of blocks of rows, so that all products are dense,
and only output and log-sum-exp are stored, as in flash attention; the backward makes the scores again on the same
blocks. A block of queries and one of keys agree as often as the inner product of their counts of codes says.

H query heads, K KV heads, S rows, D head size, N blocks of T rows, M parts of C codewords, E = D / M, L blocks kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PARTS, CODEWORDS, BLOCK_ROWS = 8, 16, 64
SAMPLE_ROWS, ROUNDS = 1024, 5
CHUNK_SCORES = 1 << 21
"""Scores that exist at a time, of all heads."""


def codebooks(q_HSD: Tensor, k_KSD: Tensor, *, parts: int = PARTS, codewords: int = CODEWORDS) -> Tensor:
    """Codewords by Lloyd's rounds on evenly spaced rows of keys and of the queries that read them: [K, M, C, E]."""
    kv_heads, _, size = k_KSD.shape
    both = torch.cat([k_KSD, q_HSD.reshape(kv_heads, -1, size)], 1).detach()
    some = both[:, torch.linspace(0, both.shape[1] - 1, min(SAMPLE_ROWS, both.shape[1])).long()]
    vectors = some.unflatten(-1, (parts, size // parts)).transpose(1, 2)  # [K, M, sample, E]
    words = vectors[:, :, torch.linspace(0, vectors.shape[2] - 1, codewords).long()].clone()
    for _ in range(ROUNDS):
        chosen = torch.nn.functional.one_hot(torch.cdist(vectors, words).argmin(-1), codewords).to(vectors.dtype)
        counts = chosen.sum(2)[..., None]
        words = torch.where(counts > 0, chosen.transpose(2, 3) @ vectors / counts.clamp_min(1), words)
    return words


def code_counts(x_HSD: Tensor, words_KMCE: Tensor, block_rows: int) -> Tensor:
    """How often each block of rows has each codeword of each part: [H, N, M * C]."""
    heads, rows, size = x_HSD.shape
    kv_heads, parts, codewords, _ = words_KMCE.shape
    grouped = x_HSD.reshape(kv_heads, -1, size).unflatten(-1, (parts, size // parts)).transpose(1, 2)
    codes = torch.cdist(grouped, words_KMCE).argmin(-1)  # [K, M, H/K * S]
    codes = codes.transpose(1, 2).reshape(heads, rows, parts) + torch.arange(parts, device=codes.device) * codewords
    blocks = codes.reshape(heads, -1, block_rows * parts)
    counts = torch.zeros(heads, blocks.shape[1], parts * codewords, device=codes.device)
    return counts.scatter_add_(2, blocks, torch.ones_like(blocks, dtype=counts.dtype))


def choose_blocks(
    q_HSD: Tensor, k_KSD: Tensor, documents_S: Tensor, *, keep_share: float = 1 / 8, block_rows: int = BLOCK_ROWS
) -> Tensor:
    """Key blocks of each query block, its own among them: int64 [H, N, L]; -1 where fewer can be seen.

    Args:
        documents_S: number of the document of each row, ascending; S a multiple of `block_rows`.
        keep_share: of all S keys, for each query.
    """
    heads, rows, _ = q_HSD.shape
    blocks = rows // block_rows
    words = codebooks(q_HSD, k_KSD)
    queries, keys = (code_counts(x.detach(), words, block_rows) for x in (q_HSD, k_KSD))
    agreement = queries @ keys.repeat_interleave(heads // k_KSD.shape[0], 0).transpose(1, 2)
    first, last = documents_S[::block_rows], documents_S[block_rows - 1 :: block_rows]
    index = torch.arange(blocks, device=q_HSD.device)
    seen = (index[:, None] >= index) & (last >= first[:, None])  # a key block not wholly of earlier documents
    agreement = agreement.masked_fill(~seen, -1.0)
    agreement[:, index, index] = torch.inf
    best = agreement.topk(max(1, min(blocks, round(blocks * keep_share))), -1)
    return best.indices.masked_fill(best.values < 0, -1)


def sparse_attention(
    q_HSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, documents_S: Tensor, blocks_HNL: Tensor, *, scale: float
) -> Tensor:
    """Causal attention per document over the chosen blocks alone; [H, S, D], differentiable in q, k and v."""
    return _Sparse.apply(q_HSD, k_KSD, v_KSD, documents_S, blocks_HNL, scale)  # type: ignore[no-any-return]


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, chosen: Tensor, scale: float) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        for part in chunks(q, chosen):
            scores, _, values, rows = _scores(q, k, v, documents, chosen, scale, part)
            total = scores.logsumexp(-1)
            lse[:, rows] = total.flatten(1)
            out[:, rows] = (scores.sub_(total[..., None]).exp_() @ values).flatten(1, 2)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, documents, chosen, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, k, v, documents, chosen, out, lse = ctx.saved_tensors
        heads, blocks = chosen.shape[:2]
        kv_heads, size, block_rows = k.shape[0], k.shape[-1], q.shape[1] // blocks
        dq = torch.empty_like(q)
        dk, dv = (x.new_zeros(kv_heads * blocks, block_rows, size) for x in (k, v))
        of_kv = torch.arange(heads, device=q.device) // (heads // kv_heads) * blocks
        for part in chunks(q, chosen):
            scores, keys, values, rows = _scores(q, k, v, documents, chosen, ctx.scale, part)
            shape = scores.shape[:3]
            weights = scores.sub_(lse[:, rows].view(shape)[..., None]).exp_()
            d_rows, out_rows, q_rows = (x[:, rows].unflatten(1, shape[1:]) for x in (d_out, out, q))
            target = (of_kv[:, None, None] + chosen[:, part].clamp_min(0)).flatten()
            dv.index_add_(0, target, (weights.transpose(2, 3) @ d_rows).reshape(-1, block_rows, size))
            d_scores = d_rows @ values.transpose(2, 3)
            d_scores = d_scores.sub_((d_rows * out_rows).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
            dq[:, rows] = (d_scores @ keys).flatten(1, 2)
            dk.index_add_(0, target, (d_scores.transpose(2, 3) @ q_rows).reshape(-1, block_rows, size))
        return dq, dk.view_as(k), dv.view_as(v), None, None, None


def chunks(q: Tensor, chosen: Tensor) -> list[slice]:
    """Query blocks that are computed together."""
    heads, blocks, kept = chosen.shape
    block_rows = q.shape[1] // blocks
    step = max(1, CHUNK_SCORES // (heads * block_rows * block_rows * kept))
    return [slice(first, min(blocks, first + step)) for first in range(0, blocks, step)]


def _scores(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, chosen: Tensor, scale: float, part: slice
) -> tuple[Tensor, Tensor, Tensor, slice]:
    """Masked scores [H, n, T, L * T] of some query blocks, with the keys and values [H, n, L * T, D] they are of."""
    blocks = chosen.shape[1]
    block_rows, kv_heads = q.shape[1] // blocks, k.shape[0]
    of_kv = (torch.arange(q.shape[0], device=q.device) // (q.shape[0] // kv_heads))[:, None, None]
    some = chosen[:, part]
    at = some.clamp_min(0)
    keys, values = (x.view(kv_heads, blocks, block_rows, -1)[of_kv, at].flatten(2, 3) for x in (k, v))
    rows = slice(part.start * block_rows, part.stop * block_rows)
    inside = torch.arange(block_rows, device=q.device)
    key_rows = (at[..., None] * block_rows + inside).flatten(2)
    query_rows = torch.arange(rows.start, rows.stop, device=q.device).view(-1, block_rows)
    known = (some >= 0).repeat_interleave(block_rows, -1)
    seen = (key_rows[:, :, None] <= query_rows[None, :, :, None]) & known[:, :, None]
    seen &= documents[key_rows][:, :, None] == documents[query_rows][None, :, :, None]
    scores = (q[:, rows].unflatten(1, (-1, block_rows)) @ keys.transpose(2, 3)).mul_(scale)
    return scores.masked_fill_(~seen, -torch.inf), keys, values, rows


def stored_bytes(rows: int, heads: int, kv_heads: int, size: int, width: int, kept_blocks: int, block_rows: int) -> int:
    """What autograd keeps of one call: q, k, v, O, log-sum-exp, the chosen blocks, the documents."""
    vectors = width * rows * size * (2 * heads + 2 * kv_heads) + width * rows * heads
    return vectors + 8 * heads * (rows // block_rows) * kept_blocks + 8 * rows


def stored_by_csr(rows: int, heads: int, kv_heads: int, size: int, width: int) -> int:
    """What the paper's form keeps: S/8 weights and their column numbers (int32) of each query and head, and q, k, v."""
    return width * rows * size * (heads + 2 * kv_heads) + heads * rows * (rows // 8) * (width + 4)
