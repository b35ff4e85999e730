"""Saved tensors in host memory: what is copied, what stays, and that nothing is left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from executor_models import LAYERS, Model, differing
from torch import Tensor, nn

from farspan.errors import DoesNotFit
from farspan.memory.allocations import footprint
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement
from farspan.memory.saved import saved_on_host
from farspan.memory.tiers import Store

ROWS, WIDTH = 600, 64
NO_WEIGHTS = nn.Module()


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(host_bytes=32 << 20, test_seed=0) as made:
        yield made


def copied(store: Store) -> int:
    return store.statistics(restart=True).moved_bytes["copy_out"]


def held(store: Store) -> int:
    return store.statistics().held_bytes["host"]


class _Saves(torch.autograd.Function):
    """Keeps its inputs and shows what it gets back."""

    seen: ClassVar[list[Tensor]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _Saves.seen = list(ctx.saved_tensors)
        return dy * 2, *[None] * len(_Saves.seen)


def test_views_of_one_storage_are_one_copy_and_come_back_as_they_were(store: Store) -> None:
    whole = torch.randn(ROWS, WIDTH)
    views = (whole, whole.t(), whole[3:, 5::2], whole.view(-1)[7:])
    x = torch.ones(1, requires_grad=True)
    with saved_on_host(store, NO_WEIGHTS, (), "a test"):
        y = _Saves.apply(x, *views)
    assert copied(store) == whole.nbytes
    want = [view.clone() for view in views]
    whole.zero_()  # what is used is the copy
    y.backward()
    for got, view, values in zip(_Saves.seen, views, want):
        assert (got.shape, got.stride(), got.storage_offset()) == (view.shape, view.stride(), view.storage_offset())
        assert torch.equal(got, values)
    assert len({got.untyped_storage().data_ptr() for got in _Saves.seen}) == 1, "fetched once"
    assert store.statistics().moved_bytes["copy_in"] == whole.nbytes
    assert held(store) == 0


def test_written_to_between_two_saves_it_is_two_copies(store: Store) -> None:
    kept, x = torch.zeros(ROWS, WIDTH), torch.ones(1, requires_grad=True)
    with saved_on_host(store, NO_WEIGHTS, (), "a test"):
        first = _Saves.apply(x, kept)
        kept.add_(1)
        second = _Saves.apply(x, kept)
    assert copied(store) == 2 * kept.nbytes
    for y, value in ((second, 1.0), (first, 0.0)):
        y.backward()
        assert torch.equal(_Saves.seen[0], torch.full_like(kept, value))


def test_a_freed_storage_is_not_taken_for_one_at_its_address(store: Store) -> None:
    x = torch.ones(1, requires_grad=True)
    results = []
    with saved_on_host(store, NO_WEIGHTS, (), "a test"):
        for value in range(6):  # malloc gives the same address again and again
            results.append(_Saves.apply(x, torch.full((ROWS, WIDTH), float(value))))
    for value, y in enumerate(results):
        y.backward()
        assert torch.equal(_Saves.seen[0], torch.full((ROWS, WIDTH), float(value)))


def test_weights_and_what_others_hold_stay(store: Store) -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.register_buffer("table", torch.randn(ROWS, WIDTH))
    beside = {"positions": (torch.randn(ROWS, WIDTH),)}
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with saved_on_host(store, layer, (x, beside), "a test"):
        y = (layer(x) * beside["positions"][0] * layer.table).exp()
    assert copied(store) == y.nbytes, "what exp keeps, and none of x, the weight, the positions, the table"
    y.sum().backward()
    assert held(store) == 0


def test_nothing_is_saved_without_autograd(store: Store) -> None:
    x = torch.randn(ROWS, WIDTH)
    with saved_on_host(store, NO_WEIGHTS, (), "a test"), torch.no_grad():
        (x * x).exp()
    assert copied(store) == 0


def on_host(*, keep: bool = True, rows: int = ROWS) -> Placement:
    """All layers kept, or all rebuilt from x on the device."""
    plan = LayerPlan(keep=True) if keep else LayerPlan(x={"device": rows})  # type: ignore[arg-type]
    return Placement(rows=rows, attention_rows=rows, layers=(plan,) * LAYERS, saved="host")


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_is_left_on_the_host(store: Store, keep: bool) -> None:
    """After a backward, and after one that never comes."""
    made = Model()
    Executor(made.layers, on_host(keep=keep), store)
    want = made.gradients([ROWS])
    assert held(store) == 0

    loss = made.forward([ROWS], 0)
    assert (held(store) > 0) == keep
    del loss
    gc.collect()
    assert held(store) == 0
    assert differing(made.gradients([ROWS]), want) == []


def test_backward_can_run_twice(store: Store) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH)
    plain = torch.autograd.grad(layer(x).exp().square().sum(), layer.weight)[0]
    with saved_on_host(store, layer, (), "a test"):
        y = layer(x).exp().square().sum()
    for again in (True, False):
        assert torch.equal(torch.autograd.grad(y, layer.weight, retain_graph=again)[0], plain)
    del y
    assert held(store) == 0


def test_the_device_holds_one_operators_tensors(store: Store) -> None:
    def peak(placement: Placement | None) -> int:
        made = Model()
        if placement is not None:
            Executor(made.layers, placement, store)
        made.forward([ROWS], 0).backward()
        return footprint(lambda: made.forward([ROWS], 0).backward(), torch.device("cpu")).peak_bytes

    assert peak(on_host()) < 0.45 * peak(None)


def test_a_full_host_is_said_and_leaves_nothing() -> None:
    with Store(host_bytes=1 << 20, test_seed=0) as small:
        made = Model()
        Executor(made.layers, on_host(), small)
        with pytest.raises(DoesNotFit, match="host tier is full"):
            made.forward([ROWS], 0)
        gc.collect()
        assert held(small) == 0
