"""Tiled log-probabilities and entropies against autograd on whole logits."""

from __future__ import annotations

import pytest
import torch

from farspan.trainer.log_probs import tiled_log_probs


@pytest.mark.parametrize("tile", [1, 7, 64])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_whole_logits(tile: int, scale: float, bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(30, generator=draw, dtype=torch.float64, requires_grad=True) if bias else None
    tokens = torch.randint(0, 30, (20,), generator=draw)
    up = torch.randn(2, 20, generator=draw, dtype=torch.float64)
    inputs = [hidden, weight] + ([shift] if shift is not None else [])

    def gradients(log_probs: torch.Tensor, entropies: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((log_probs * up[0] + entropies * up[1]).sum(), inputs)

    found = tiled_log_probs(hidden, weight, tokens, bias_V=shift, tile=tile, scale=scale)
    logs = torch.log_softmax(scale * torch.nn.functional.linear(hidden, weight, shift), 1)
    expected = logs.gather(1, tokens[:, None])[:, 0], -(logs.exp() * logs).sum(1)
    for ours, theirs in zip((*found, *gradients(*found)), (*expected, *gradients(*expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_impossible_tokens() -> None:
    weight = torch.eye(3)
    hidden = torch.tensor([[0.0, -1e6, -1e6]], requires_grad=True)
    log_probs, entropies = tiled_log_probs(hidden, weight, torch.tensor([0]))
    (log_probs + entropies).sum().backward()
    assert log_probs.item() == 0.0 and entropies.item() == 0.0 and torch.isfinite(hidden.grad).all()


def test_no_more_than_a_tile_of_logits_exists() -> None:
    from farspan.memory.allocations import footprint

    rows, vocab, tile = 4096, 4096, 128
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(vocab, 16, requires_grad=True)
    tokens = torch.randint(0, vocab, (rows,))
    footprint(lambda: None, torch.device("cpu"))
    took = footprint(
        lambda: tiled_log_probs(hidden, weight, tokens, tile=tile)[0].sum().backward(), torch.device("cpu")
    )
    assert took.peak_bytes < 8 * tile * vocab * 4 < rows * vocab * 4 / 3
