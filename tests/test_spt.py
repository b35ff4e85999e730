"""The sparse attention of `farspan bench spt`: against dense attention on the same mask by autograd, fp64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "infra/bench"))

import _sparse_attention as sparse

SIZE = 16


def inputs(heads: int, kv_heads: int, rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(heads * rows)
    q, k, v = (torch.randn(h, rows, SIZE, generator=made, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def numbered(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def dense_mask(documents: Tensor, chosen: Tensor, block_rows: int) -> Tensor:
    """Pair by pair, as the words have it: [H, S, S]."""
    heads, blocks, _ = chosen.shape
    mask = torch.zeros(heads, blocks * block_rows, blocks * block_rows, dtype=torch.bool)
    for head in range(heads):
        for block in range(blocks):
            for key in chosen[head, block].tolist():
                if key >= 0:
                    rows = slice(block * block_rows, (block + 1) * block_rows)
                    mask[head, rows, key * block_rows : (key + 1) * block_rows] = True
    return mask & (documents[:, None] == documents) & torch.ones_like(mask[0]).tril()


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    return (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[128], [30, 50, 48], [1, 126, 1]])
@pytest.mark.parametrize("keep_share", [1 / 8, 1 / 2, 1.0])
def test_output_and_gradients_are_dense_attention_s(
    heads: int, kv_heads: int, lengths: list[int], keep_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several query blocks at a time and the last of them fewer; to 1e-12."""
    monkeypatch.setattr(sparse, "CHUNK_SCORES", heads * 8 * 8 * round(16 * keep_share) * 3)
    q, k, v = inputs(heads, kv_heads, 128)
    documents = numbered(lengths)
    chosen = sparse.choose_blocks(q, k, documents, keep_share=keep_share, block_rows=8)
    mask = dense_mask(documents, chosen, 8)
    weight = torch.randn(heads, 128, SIZE, dtype=torch.float64)
    got = sparse.sparse_attention(q, k, v, documents, chosen, scale=0.3)
    gradients = torch.autograd.grad((got * weight).sum(), (q, k, v))
    want = dense(q, k, v, mask, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad((want * weight).sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if keep_share == 1.0:
        whole = (documents[:, None] == documents) & torch.ones(128, 128, dtype=torch.bool).tril()
        assert torch.equal(mask, whole.expand_as(mask)), "with all blocks it is plain causal attention"


@pytest.mark.parametrize("lengths", [[128], [30, 50, 48]])
def test_blocks_are_causal_of_the_document_and_hold_their_own(lengths: list[int]) -> None:
    q, k, _ = inputs(4, 2, 128)
    documents = numbered(lengths)
    chosen = sparse.choose_blocks(q, k, documents, keep_share=1 / 4, block_rows=8)
    assert chosen.shape == (4, 16, 4)
    for block in range(16):
        for head in range(4):
            found = [b for b in chosen[head, block].tolist() if b >= 0]
            assert block in found and len(set(found)) == len(found) and max(found) == block
            earliest = int(documents[block * 8])
            assert all(int(documents[b * 8 + 7]) >= earliest for b in found)


def test_codes_find_the_blocks_that_matter() -> None:
    """Where each block of keys has a direction of its own, a query's block is found by its codes."""
    rows, block_rows = 256, 16
    made = torch.Generator().manual_seed(3)
    directions = torch.randn(16, SIZE, generator=made) * 3
    k = directions.repeat_interleave(block_rows, 0)[None] + 0.1 * torch.randn(1, rows, SIZE, generator=made)
    wanted = torch.tensor([max(0, 2 * (b % 8) - 1) if b >= 8 else 0 for b in range(16)])
    wanted = torch.minimum(wanted, torch.arange(16))
    q = directions[wanted].repeat_interleave(block_rows, 0)[None] + 0.1 * torch.randn(1, rows, SIZE, generator=made)
    chosen = sparse.choose_blocks(q, k, torch.zeros(rows).long(), keep_share=1 / 8, block_rows=block_rows)
    found = [int(wanted[b]) in chosen[0, b].tolist() for b in range(16)]
    assert sum(found) >= 15, found


def test_code_counts_are_nearest_codewords() -> None:
    """Brute force over rows, parts and codewords."""
    q, k, _ = inputs(2, 1, 32)
    words = sparse.codebooks(q, k, parts=4, codewords=4)
    counts = sparse.code_counts(q.detach(), words, 16)
    want = torch.zeros(2, 2, 16)
    for head in range(2):
        for row in range(32):
            for part in range(4):
                off = (q.detach()[head, row, 4 * part : 4 * part + 4] - words[0, part]).norm(dim=-1)
                want[head, row // 16, 4 * part + int(off.argmin())] += 1
    assert torch.equal(counts, want)


def test_stored_is_the_formula() -> None:
    q, k, v = inputs(4, 2, 256, torch.float32)
    documents = torch.zeros(256).long()
    chosen = sparse.choose_blocks(q, k, documents, block_rows=16)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = sparse.sparse_attention(q, k, v, documents, chosen, scale=0.25)
    assert out.shape == q.shape
    assert sum(kept.values()) == sparse.stored_bytes(256, 4, 2, SIZE, 4, chosen.shape[-1], 16)
