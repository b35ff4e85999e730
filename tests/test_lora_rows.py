"""A share of the rows stands for all in A's gradient: unbiased from the first step, of less variance than its likes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executor_models import Model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farspan.trainer.adapters.lora.rows import winners
from farspan.trainer.config import LoRA

R, K, DRAWS = 200, 60, 1000


def heavy(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of which a few rows are large, and output gradients."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.exp(1.5 * torch.randn(R, 1, generator=draw))
    return size * torch.randn(R, 12, generator=draw), torch.randn(R, 5, generator=draw)


def estimate(x: Tensor, dy: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return (dy[index] * weight[:, None]).t() @ x[index]


def test_the_mean_over_many_draws_is_the_gradient() -> None:
    """Within four standard errors everywhere, the first epoch's p (sizes of the input alone) included."""
    x, dy = heavy()
    p = x.norm(dim=1)
    found = torch.stack([estimate(x, dy, *winners(p, K, torch.Generator().manual_seed(seed))) for seed in range(DRAWS)])
    off = (found.mean(0) - dy.t() @ x).abs() / (found.std(0) / DRAWS**0.5).clamp_min(1e-9)
    assert float(off.max()) < 4
    assert float((off < 1).float().mean()) > 0.5


def test_less_variance_than_drawing_every_row() -> None:
    """Beside plain column-row sampling with the same p, and beside uniform sampling; with everything it is exact."""
    x, dy = heavy()
    p, exact = x.norm(dim=1), dy.t() @ x

    def plain(weights: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        share = weights / weights.sum()
        index = torch.multinomial(share, K, replacement=True, generator=draw)
        return index, 1 / (K * share[index])

    def error(pick: Any) -> float:
        runs = [estimate(x, dy, *pick(torch.Generator().manual_seed(seed))) for seed in range(200)]
        return float(sum((run - exact).square().sum() for run in runs)) / 200

    ours = error(lambda draw: winners(p, K, draw))
    assert ours < 0.6 * error(lambda draw: plain(p, draw)) < error(lambda draw: plain(torch.ones(R), draw))
    index, weight = winners(p, R, torch.Generator())
    torch.testing.assert_close(estimate(x, dy, index, weight), exact)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0.0, 1e-20, 0.1, 1.0, 50.0]), min_size=1, max_size=12),
    k=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_weights_stand_for_the_whole(sizes: list[float], k: int, seed: int) -> None:
    """Summed over all draws by their probability, each row counts once: exactly, by enumeration of the first draw."""
    p = torch.tensor(sizes)
    index, weight = winners(p, k, torch.Generator().manual_seed(seed))
    assert index.numel() == weight.numel() == min(k, len(sizes))
    assert bool((weight >= 0).all()) and bool(torch.isfinite(weight).all())
    assert int(index.min()) >= 0 and int(index.max()) < len(sizes)
    whole = float((weight * p[index]).sum())
    if float(p.sum()) > 1e-3 and k < len(sizes):
        # with weights inverse to p every draw adds up to the total of p
        assert whole == pytest.approx(float(p.sum()), rel=1e-4)


def test_only_the_gradient_of_a_is_estimated() -> None:
    adapter = LoRA(rank=4, alpha=8.0)
    exact = Model(adapter=adapter).gradients([300], micro_batches=1)
    sampled = Model(adapter=adapter.model_copy(update={"keep_rows": 0.4})).gradients([300], micro_batches=1)
    for name, gradient in exact.items():
        same = torch.equal(gradient, sampled[name])
        assert same == ("lora_A" not in name), name
        if not same:
            off = float((gradient - sampled[name]).norm() / gradient.norm())
            assert 0.01 < off < 5, (name, off)


def test_readers_of_one_input_keep_the_same_rows() -> None:
    model = Model(adapter=LoRA(rank=4, keep_rows=0.5))
    layer: Any = model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.row_sampler is attention.k_proj.row_sampler is attention.v_proj.row_sampler
    assert mlp.gate_proj.row_sampler is mlp.up_proj.row_sampler is not mlp.down_proj.row_sampler
    assert attention.q_proj.row_sampler is not model.layers[1].self_attn.q_proj.row_sampler
