"""Ulysses against the whole attention in float64, and against DeepSpeed's own implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sp_ranks import (
    attention_inputs,
    deepspeed_ulysses,
    farspan_ulysses,
    on_ranks,
    ulysses_attention,
    weights,
    write_peer_model,
)

from farspan.errors import JobError
from farspan.kernels.attention import causal_attention
from farspan.trainer.parallel.ulysses import head_layout

SHAPES = [(4, 4, 2), (4, 2, 4), (4, 1, 4), (6, 3, 4), (6, 2, 4), (5, 5, 3), (6, 3, 2), (8, 2, 3), (4, 4, 4)]


@given(st.integers(1, 12), st.integers(1, 8), st.data())
def test_every_query_head_is_attended_once_with_its_own_kv_head(kv_heads: int, group: int, data: st.DataObject) -> None:
    heads = kv_heads * group
    ranks = data.draw(st.integers(1, heads))
    layout = head_layout(heads, kv_heads, ranks)
    assert [head for query in layout.query for head in query] == list(range(heads))
    sizes = [len(query) for query in layout.query]
    assert max(sizes) - min(sizes) <= 1
    for rank, (query, kv) in enumerate(zip(layout.query, layout.kv)):
        index = layout.kv_index(rank, group)
        if index is None:  # the kernel's own grouping: consecutive query heads share a KV head
            index = [i // (len(query) // len(kv)) for i in range(len(query))]
        assert [kv[i] for i in index] == [head // group for head in query]


def test_more_ranks_than_heads_is_refused() -> None:
    with pytest.raises(JobError, match="SP degree 8 is more than the model's 4 attention heads"):
        head_layout(4, 2, 8)


def test_outputs_and_gradients_equal_the_whole_attention() -> None:
    results = on_ranks(ulysses_attention, 4, SHAPES)
    for heads, kv_heads, sp in SHAPES:
        q, k, v, lengths = attention_inputs(heads, kv_heads)
        whole = [x.requires_grad_() for x in (q, k, v)]
        out, _ = causal_attention(*whole, lengths=lengths, scale=0.3)
        (out * weights(heads)).sum().backward()
        for index, want in enumerate([out.detach(), *(x.grad for x in whole)]):
            got = torch.cat([results[rank][heads, kv_heads, sp][index] for rank in range(sp)], dim=2)
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("qwen3", 1)])
def test_agrees_with_deepspeed(family: str, kv_heads: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_peer_model(family, kv_heads, folder)
    (our_loss, ours), _ = on_ranks(farspan_ulysses, 2, str(folder))
    (their_loss, theirs), _ = on_ranks(deepspeed_ulysses, 2, str(folder))
    assert our_loss == pytest.approx(their_loss, rel=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 5e-6, (name, float(error))
