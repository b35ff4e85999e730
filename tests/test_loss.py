"""The tiled loss against torch's cross_entropy on whole logits, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode

from farspan.trainer.loss import tiled_cross_entropy


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    tile=st.integers(1, 48),
    ignored=st.floats(0, 1),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    with_bias=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 9),
)
def test_loss_and_gradients(
    rows: int, tile: int, ignored: float, scale: float, with_bias: bool, frozen: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 7, generator=draw, dtype=torch.float64)
    weight, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((11, 7), (11,)))
    labels = torch.randint(0, 11, (rows,), generator=draw)
    labels[torch.rand(rows, generator=draw) < ignored] = -100
    results = []
    for ours in (True, False):
        h, w, b = hidden.clone().requires_grad_(), weight.clone(), bias.clone() if with_bias else None
        leaves = [h] if frozen else [h, w.requires_grad_()] + ([b.requires_grad_()] if b is not None else [])
        if ours:
            loss = tiled_cross_entropy(h, w, labels, bias_V=b, tile=tile, scale=scale)
        else:
            loss = cross_entropy(linear(h, w, b) * scale, labels, reduction="sum")
        (loss * 0.37).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_bf16_weight_gradient_does_not_drift_with_the_number_of_tiles() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 32, generator=draw).bfloat16()
    weight = (torch.randn(64, 32, generator=draw) / 6).bfloat16()
    labels = torch.randint(0, 64, (2048,), generator=draw)
    errors = {}
    exact = weight.double().requires_grad_()
    cross_entropy(hidden.double() @ exact.T, labels, reduction="sum").backward()
    for tile in (2048, 16):
        w = weight.clone().requires_grad_()
        tiled_cross_entropy(hidden, w, labels, tile=tile).backward()
        errors[tile] = float((w.grad.double() - exact.grad).norm() / exact.grad.norm())
    assert errors[16] < 1.2 * errors[2048], errors  # added up in bf16 it would be several times as much


def test_no_gradient_work_without_grad() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, -100])
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        loss = tiled_cross_entropy(hidden, weight, labels, tile=3)
    assert flops.get_total_flops() == 2 * 7 * 4 * 5  # one product, trained rows only
    want = cross_entropy(hidden.detach() @ weight.detach().T, labels, reduction="sum")
    torch.testing.assert_close(loss, want)
