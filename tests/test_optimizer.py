"""Schedules against transformers', weight decay groups, and the norm against float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from farspan.trainer.adapters.peqa.apply import PeqaLinear
from farspan.trainer.config import Optim
from farspan.trainer.optimizer import global_norm, lr_at, split_by_decay


def rates(scheduler_of, optim: Optim, **arguments: object) -> list[float]:
    """Rates of steps 1 to the last, as a transformers schedule gives them."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = scheduler_of(optimizer, **arguments)
    found = []
    for _ in range(optim.steps):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


@pytest.mark.parametrize(("steps", "warmup"), [(50, 5), (50, 0), (7, 6), (1, 0)])
def test_cosine_is_that_of_transformers(steps: int, warmup: int) -> None:
    optim = Optim(lr=3e-4, steps=steps, min_lr_ratio=0.1)
    expected = rates(
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        optim,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        min_lr_rate=0.1,
    )
    assert [lr_at(step, optim, warmup) for step in range(1, steps + 1)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_wsd_is_that_of_transformers(floor: float) -> None:
    optim = Optim(lr=2e-4, steps=40, schedule="wsd", decay_share=0.3, min_lr_ratio=floor)
    expected = rates(
        transformers.get_wsd_schedule,
        optim,
        num_warmup_steps=4,
        num_decay_steps=12,
        num_training_steps=40,
        decay_type="linear",
        min_lr_ratio=floor,
    )
    # Theirs warms up from the floor, ours from zero: equal throughout without floor, else once warm.
    first = 1 if floor == 0 else 4
    assert [lr_at(step, optim, 4) for step in range(first, 41)] == pytest.approx(expected[first - 1 :], rel=1e-12)


def test_constant_is_that_of_transformers() -> None:
    optim = Optim(lr=2e-4, steps=12, schedule="constant")
    expected = rates(transformers.get_constant_schedule_with_warmup, optim, num_warmup_steps=5)
    assert [lr_at(step, optim, 5) for step in range(1, 13)] == pytest.approx(expected, rel=1e-12)


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    floor=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_rate_rises_then_falls_between_its_bounds(
    steps: int, warmup: int, schedule: str, floor: float, share: float
) -> None:
    optim = Optim(lr=1.0, steps=steps, schedule=schedule, min_lr_ratio=floor, decay_share=share)
    found = [lr_at(step, optim, warmup) for step in range(1, steps + 1)]
    assert all(0 <= rate <= 1 for rate in found)
    edge = min(warmup, steps)
    assert found[:edge] == sorted(found[:edge])
    assert found[edge:] == sorted(found[edge:], reverse=True)
    if warmup < steps and (schedule == "cosine" or (schedule == "wsd" and round(share * steps) > 0)):
        assert found[-1] == pytest.approx(floor)


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    (matrices, decay), (rest, none) = split_by_decay(dict(module.named_parameters()), 0.1)
    assert (matrices, decay) == (["0.weight", "2.weight"], 0.1)
    assert (rest, none) == (["1.weight", "1.bias", "2.bias"], 0.0)
    assert split_by_decay({"0.weight": module[0].weight}, 0.1) == [(["0.weight"], 0.1)]
    scales = PeqaLinear(nn.Linear(8, 4), bits=4, group=None)
    assert scales.scale.ndim == 2
    assert split_by_decay(dict(scales.named_parameters()), 0.1) == [([*dict(scales.named_parameters())], 0.0)]


def test_norm_keeps_its_digits_where_torch_loses_them() -> None:
    tensors = [torch.randn(3, 1_000_001, generator=torch.Generator().manual_seed(1)), torch.ones(7), torch.ones(())]
    exact = float(torch.cat([t.double().reshape(-1) for t in tensors]).norm())
    assert float(global_norm(tensors)) == pytest.approx(exact, rel=1e-6)
    assert float(global_norm([])) == 0.0
    assert not torch.isfinite(global_norm([torch.tensor([1.0, float("nan")])]))
