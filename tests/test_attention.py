"""The attention function against the explicit formula, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.errors import JobError
from farspan.kernels.attention import causal_attention
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
            causal_attention(*inputs, lengths=lengths, scale=0.2, window=window)
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
    got = causal_attention(q, k, v, lengths=[1500], scale=0.3, window=window)
    torch.testing.assert_close(got, explicit(q, k, v, [1500], 0.3, window), rtol=1e-9, atol=1e-11)


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
