"""The attention function against the explicit formula, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.errors import JobError
from farspan.kernels.attention import KnownRows, causal_attention
from farspan.trainer.attention import PackedSequence, attend


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float, window: int | None):
    """softmax(scale q k^T + mask) v with the whole S x S mask."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(sum(lengths))
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if window is not None:
        seen &= at[:, None] - at < window
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 80),
)
def test_equals_the_formula(lengths: list[int], kv_heads: int, group: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = (kv_heads * group, kv_heads, kv_heads)
    q, k, v = (torch.randn(1, n, sum(lengths), 16, generator=generator, dtype=torch.float64) for n in shapes)
    grads = []
    for function in (causal_attention, explicit):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = (
            causal_attention(*inputs, lengths=lengths, scale=0.2, window=window)[0]
            if function is causal_attention
            else explicit(*inputs, lengths, 0.2, window)
        )
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        grads.append([out.detach(), *(x.grad for x in inputs)])
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [200, 700])
def test_a_window_over_several_blocks(window: int) -> None:
    q, k, v = (torch.randn(1, 2, 1500, 8, dtype=torch.float64) for _ in range(3))
    got, _ = causal_attention(q, k, v, lengths=[1500], scale=0.3, window=window)
    torch.testing.assert_close(got, explicit(q, k, v, [1500], 0.3, window), rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 1100), min_size=1, max_size=3),
    window=st.none() | st.sampled_from([40, 300]),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_known_rows_change_no_bit(
    lengths: list[int], window: int | None, share: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    kv_heads, group, size = data.draw(st.sampled_from([(1, 1, 16), (2, 2, 32), (1, 4, 64)]))
    generator, S = torch.Generator().manual_seed(sum(lengths)), sum(lengths)
    # as transformers hands them over: rows before heads in memory
    q, k, v = (
        torch.randn(1, S, n, size, generator=generator).to(dtype).transpose(1, 2)
        for n in (kv_heads * group, kv_heads, kv_heads)
    )
    first, runs = round(share * S), []
    for known in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        rows = None
        if known:
            out, lse = runs[0][0].clone(), runs[0][1].clone()
            out[:, :, :first], lse[:, :, :first] = float("nan"), float("nan")
            rows = KnownRows(out, lse, first)
        out, lse = causal_attention(*inputs, lengths=lengths, scale=0.2, window=window, known=rows)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
        runs.append([out.detach(), lse, *(x.grad for x in inputs)])
    assert all(torch.equal(*pair) for pair in zip(*runs))


@pytest.mark.parametrize(("kv_heads", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
def test_equals_torch_bit_for_bit(kv_heads: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 900, n, 32).to(dtype).transpose(1, 2) for n in (4, kv_heads, kv_heads))
    runs = []
    for ours in (True, False):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if ours:
            out, _ = causal_attention(*inputs, lengths=[900], scale=0.2)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.2, enable_gqa=True)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
        runs.append([out.detach(), *(x.grad for x in inputs)])
    assert all(torch.equal(*pair) for pair in zip(*runs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, "attention dropout"),
        ({"softcap": 50.0}, "soft cap"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"packed_sequence": None}, "does not hand its keyword arguments"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "builds its own attention mask"),
    ],
)
def test_what_would_change_the_result_is_refused(change: dict, message: str) -> None:
    x = torch.randn(1, 2, 4, 8)
    arguments = {"attention_mask": None, "packed_sequence": PackedSequence((4,))} | change
    with pytest.raises(JobError, match=message):
        attend(torch.nn.Identity(), x, x, x, **arguments)
