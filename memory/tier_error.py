"""What codes of rows on other tiers do to gradients, and how long it takes to make and read them.

The error is that of a rebuild from rows that come back from codes, relative to one from the rows themselves, so that
nothing but the codes is in it. `layer_error` has x, O and every linear output of one layer in codes, the most that a
plan can do to it: what a profile says before there is a plan. `unit_errors` has the rows of a plan, unit by unit: in a
segment an error of x passes through all its layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from farspan.memory.allocations import fastest_s
from farspan.memory.coded_rows import row_codec
from farspan.memory.executor import Executor
from farspan.memory.frame import HOLLOW, linear_classes
from farspan.memory.operators.error import error_between
from farspan.memory.plan import LayerPlan, Placement, Rows, TierCodec
from farspan.memory.problem import GradientError, TierCodes
from farspan.memory.single_layers import Hook
from farspan.memory.tiered import DeviceLedger
from farspan.memory.tiers import Store

TIMED_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Of the tensor that is encoded and decoded to see how long it takes."""
PAGES_BYTES = 1 << 20
"""More than the pages that a layer's tensors round up to."""


def layer_error(
    layer: nn.Module,
    call: partial[Any],
    x: Tensor,
    codec: TierCodec,
    *,
    attention_rows: int,
    hollow: bool,
    seed: int = 0,
) -> GradientError | None:
    """Of a layer all of whose rows are in codes; None where there are none. Costs two forwards and two rebuilds.

    Args:
        layer: in training mode, in nobody's hands; it is afterwards as it was.
        call: the layer as the model calls it, hidden states apart.
        x: [1, s, d], hidden states the layer is given.
        attention_rows: rows that its attention sees.
        hollow: as for the executor.
    """
    if codec == "exact":
        return None
    rows, classes = x.shape[1], linear_classes(layer)
    stored = [name for name in classes if not (hollow and name == HOLLOW)]
    plan = LayerPlan(x=Rows(host=rows), o=Rows(host=attention_rows), linear={name: Rows(host=rows) for name in stored})
    placement = Placement(rows=rows, attention_rows=attention_rows, layers=(plan,), tier_codec=codec)
    widest = 2 * x.shape[-1] + sum(classes[name].out_features for name in stored)
    host_bytes = widest * x.element_size() * max(rows, attention_rows) + PAGES_BYTES
    with _as_it_was(layer, classes.values()), Store(host_bytes=host_bytes, device=x.device) as store:
        executor = Executor([layer], placement, store, hollow=hollow)
        return _error(executor, range(1), {0: call}, x, seed)


def unit_errors(
    executor: Executor,
    placement: Placement,
    found: Callable[[range, GradientError], object],
    *,
    seed: int,
    gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]],
) -> dict[int, Hook]:
    """Hooks for `single_layers.hooked` that measure each unit with codes when its last layer comes.

    Args:
        executor: with a codec; the forward that is hooked runs inside its `with_rows_of(placement)`.
        found: is told of each unit, bottom first.
        gathered: makes partitioned parameters whole inside (ZeRO-3).
    """
    given: dict[int, tuple[partial[Any], Tensor]] = {}

    def look(unit: range, measured: bool, index: int, call: Any, x: Tensor) -> Tensor:
        if not measured:
            return call(x)
        given[index] = call, x.detach()
        with gathered([p for layer in unit for p in executor.layers[layer].parameters()]):
            if index == unit[-1]:
                calls = {layer: given[layer][0] for layer in unit}
                found(unit, _error(executor, unit, calls, given[unit[0]][1], seed))
                given.clear()
            return call(x)

    hooks: dict[int, Hook] = {index: partial(look, range(0), False) for index in range(len(executor.layers))}
    for unit in placement.units():
        measured = any(placement.layers[index].leaves for index in unit)
        hooks |= {index: partial(look, unit, measured, index) for index in unit}
    return hooks


def measure_codes(kind: Literal["fp8", "int4"], width: int, dtype: torch.dtype, device: torch.device) -> TierCodes:
    """How fast rows of so many elements become codes here, and codes rows."""
    rows = max(1, TIMED_ELEMENTS[device.type] // width)
    x = torch.randn(1, rows, width, dtype=dtype, device=device)
    codec = row_codec(kind, width, 0, "rows of a layer")
    assert codec is not None
    block = codec.encode(x)
    return TierCodes(
        kind=kind,
        encode_bytes_per_s=x.nbytes / fastest_s(lambda: codec.encode(x), device),
        decode_bytes_per_s=x.nbytes / fastest_s(lambda: codec.decode(block, x), device),
    )


def _error(executor: Executor, unit: range, calls: dict[int, partial[Any]], x: Tensor, seed: int) -> GradientError:
    """One unit rebuilt from codes, against the same rows on the device."""
    layers = tuple(map(_on_the_device, executor.placement.layers))
    # with the codec, which nothing there is in: it draws a key, and layers then draw the same
    exact = executor.placement.model_copy(update={"layers": layers})

    def run(x: Tensor) -> Tensor:
        for index in unit:
            x = executor.placed(index)(calls[index], x)
        return x

    parameters = [p for index in unit for p in executor.layers[index].parameters()]
    error = error_between(run, lambda: executor.with_rows_of(exact), x, parameters, seed=seed)
    executor.ledger = DeviceLedger()
    return error


def _on_the_device(plan: LayerPlan) -> LayerPlan:
    return LayerPlan(
        keep=plan.keep,
        x=None if plan.x is None else Rows(device=plan.x.stored),
        o=Rows(device=plan.o.stored),
        linear={name: Rows(device=rows.stored) for name, rows in plan.linear.items()},
    )


@contextlib.contextmanager
def _as_it_was(layer: nn.Module, linears: Iterable[nn.Module]) -> Iterator[None]:
    """What an executor sets on a layer is afterwards as before."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "forward")
    before = [(module, {name: vars(module).get(name) for name in names}) for module in (layer, *linears)]
    try:
        yield
    finally:
        for module, values in before:
            for name, value in values.items():
                if value is not None:
                    setattr(module, name, value)
                elif name in vars(module):
                    delattr(module, name)
