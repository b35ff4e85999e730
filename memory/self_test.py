"""Before the first step: proof on this very model that rebuilding its layers gives the gradients of keeping them.

That placements change no gradient rests on things that are nobody's interface: the row blocks of attention kernels,
what a model's layers do between their linear layers, the order in which autograd adds. Tests cover the models and
versions they were run with; this covers the ones at hand. Every distinct unit of the placement (a segment; a kept layer
only where its saved tensors wait on the host) runs alone on random rows, once plainly and once through the executor
with every share of the placement scaled to few rows, and the gradients of its input and of all trained parameters must
be the same bits.

With codes on other tiers no rebuild can be equal: the test runs without them, with fewer rows where the tiers are as
small as codes need, and says so. What codes do is another question, which `memory.tier_error` measures.

On CPU memory that was never written is NaN meanwhile, so that whatever is left out of a rebuild is seen to be read by
nobody. On CUDA outside deterministic mode, where keeping twice differs too, that difference bounds the one allowed.
Costs two forwards, two backwards and a rebuild of each distinct unit at about a thousand rows; in memory, the unit kept
at these rows and its gradients twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farspan.errors import JobError, RunFailed
from farspan.memory.executor import Executor
from farspan.memory.frame import TILED_MLP
from farspan.memory.plan import LayerPlan, Placement, Rows, TierCodec
from farspan.memory.single_layers import calls_of, layer_kind, nothing_zero
from farspan.memory.tiered import DeviceLedger

ROWS = 1024
"""Rows attention sees in the test: four blocks of O, one for each place its rows can be."""
O_BLOCK_ROWS = 256
MOST_CODED = 8
"""Rows in codes take more than an eighth of their bytes: a unit of so much fewer fits as it is."""
SPREAD_ALLOWED = 4.0
"""Where kernels are not deterministic: how many times further than keep from keep a rebuild may be."""
_INPUT = "the gradient of its input"


class RebuildDiffers(RunFailed):
    """A rebuilt layer gave other gradients than the same layer kept."""


@dataclass(frozen=True)
class SelfTest:
    """What was compared, and found equal."""

    units: int
    """Distinct segments."""
    gradients: int
    rows: int
    """Of each rank."""
    seconds: float
    exact: bool
    """Bit for bit; else within the spread of keeping twice."""
    codec: TierCodec = "exact"
    """What rows on other tiers are in after the test; in it they are what they are."""

    def __str__(self) -> str:
        found = "bit-equal to keep" if self.exact else "as near to keep as keep to itself"
        if self.codec != "exact":
            found += f" before rows on other tiers become {self.codec}"
        units = "1 unit" if self.units == 1 else f"{self.units} units"
        return f"self-test {units}, {self.gradients} gradients {found}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class _Difference:
    layer: int
    name: str
    off: float
    largest: float

    @property
    def relative(self) -> float:
        return self.off / self.largest if self.largest else float("inf")


def self_test(
    executor: Executor,
    run: Callable[[int], object],
    *,
    seed: int = 0,
    gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
) -> SelfTest | None:
    """Compare rebuilding with keeping; None when the placement rebuilds nothing and saves nothing elsewhere.

    Run it in training mode, before an engine listens to gradients. Collective where layers are: every rank must call it
    with the same placement. Model, generators and the ledgers of the tiers are afterwards as they were before.

    Args:
        executor: built on the model; its placement may be for any number of rows.
        run: calls the whole model, as a step does, on so many rows of this rank.
        seed: of the random rows.
        gathered: makes partitioned parameters whole inside (ZeRO-3).

    Raises:
        RebuildDiffers: a gradient is not the same.
    """
    started_s = time.perf_counter()
    layers, mlp_tile = executor.layers, _mlp_tile(executor)
    codec = executor.placement.tier_codec
    placement = scaled(executor.placement, _test_rows(executor.placement, mlp_tile), mlp_tile=mlp_tile)
    placement = placement.model_copy(update={"tier_codec": "exact"})
    units = _distinct(layers, placement)
    if not units:
        return None
    device = next(layers[0].parameters()).device
    exact = _repeatable(device)
    cuda = [device] if device.type == "cuda" else []
    count = 0
    with (
        torch.random.fork_rng(cuda, device_type="cuda"),
        _unwritten_is_nan(device),
        executor.with_rows_of(placement),
    ):
        calls, like = calls_of(layers, lambda: run(placement.rows))
        torch.manual_seed(seed)
        x, dy = torch.randn_like(like), torch.randn_like(like)
        for unit in units:
            with gathered([p for index in unit for p in layers[index].parameters()]):
                kind = _Comparison if executor.coupling is None else _CoupledComparison
                comparison = kind(executor, unit, calls, x, dy, seed)
                found = comparison.differences(exact=exact)
                count += comparison.gradients
            if found:
                raise _refused(executor, unit, found, comparison.gradients, placement.rows)
    executor.ledger = DeviceLedger()
    if executor.store is not None:
        executor.store.statistics(restart=True)
    return SelfTest(len(units), count, placement.rows, time.perf_counter() - started_s, exact, codec)


class _Comparison:
    """One unit, run both ways."""

    def __init__(
        self,
        executor: Executor,
        unit: range,
        calls: list[Callable[[Tensor], Tensor]],
        x: Tensor,
        dy: Tensor,
        seed: int,
    ) -> None:
        self.executor = executor
        self.layers, self.unit, self.calls = executor.layers, unit, calls
        self.x, self.dy, self.seed = x, dy, seed
        self.trained = {
            (index, name): p
            for index in reversed(unit)
            for name, p in self.layers[index].named_parameters()
            if p.requires_grad
        }
        self.gradients = len(self.trained) + 1

    def differences(self, *, exact: bool) -> list[_Difference]:
        """What a rebuild gets wrong, the first in the order of backward first."""
        with nothing_zero(self.trained.values()):
            want = self._wanted()
            spread = 0.0
            if not exact:
                again = [_difference(*key, got, want[key]) for key, got in self._wanted().items()]
                spread = max((difference.relative for difference in again if difference is not None), default=0.0)
            found = []
            for key, got in self._backward(self._rebuilt):
                difference = _difference(*key, got, want.pop(key))
                if difference is not None and not difference.relative <= SPREAD_ALLOWED * spread:
                    found.append(difference)
            return found

    def _wanted(self) -> dict[tuple[int, str], Tensor | None]:
        return dict(self._backward(self._kept))

    def _kept(self, x: Tensor) -> Tensor:
        for index in self.unit:
            x = self.calls[index](x)
        return x

    def _rebuilt(self, x: Tensor) -> Tensor:
        for index in self.unit:
            x = self.layers[index]._gradient_checkpointing_func(self.calls[index], x)  # type: ignore[operator]
        return x

    def _backward(self, forward: Callable[[Tensor], Tensor]) -> Iterator[tuple[tuple[int, str], Tensor | None]]:
        """Each gradient, taken from its parameter, so that the caller decides how long it lives."""
        torch.manual_seed(self.seed)
        x = self.x.detach().requires_grad_()
        try:
            # not the leaf itself: a layer that writes into its input is the executor's to refuse
            forward(x.clone()).backward(self.dy)
            for key, p in self.trained.items():
                gradient, p.grad = p.grad, None
                yield key, gradient
            yield (self.unit[0], _INPUT), x.grad
        finally:
            for p in self.trained.values():
                p.grad = None


class _CoupledComparison(_Comparison):
    """A reversible layer, against the same layer storing what it reads; its streams too must come back."""

    def _wanted(self) -> dict[tuple[int, str], Tensor | None]:
        executor, coupling = self.executor, self.executor.coupling
        assert coupling is not None
        placement, store = executor.placement, coupling.store
        bare = LayerPlan(x=Rows(device=placement.rows))
        executor.placement = placement.model_copy(update={"layers": (bare,) * len(self.layers), "saved": "device"})
        coupling.store = "inputs"
        try:
            return dict(self._backward(self._rebuilt))
        finally:
            executor.placement, coupling.store = placement, store

    def differences(self, *, exact: bool) -> list[_Difference]:
        coupling = self.executor.coupling
        assert coupling is not None
        coupling.tested = True
        try:
            if coupling.wiring == 3:
                self._halves_are_the_layer()
            return self._differences(exact=exact)
        finally:
            coupling.tested = False

    def _halves_are_the_layer(self) -> None:
        """What a layer adds up between its parts is nobody's interface: some models scale it.

        Raises:
            JobError: the halves are another function than the layer.
        """
        coupling, index = self.executor.coupling, self.unit[0]
        assert coupling is not None
        call: Any = self.calls[index]
        with torch.no_grad(), coupling.running():
            torch.manual_seed(self.seed)
            want, x = call(self.x), self.x
            torch.manual_seed(self.seed)
            for function in coupling.functions(index, call):
                x = function(x)
        if not torch.equal(x, want):
            raise JobError(
                f"the halves of decoder layer {index} are not the layer",
                at="adapter.wiring",
                why="attention and MLP, each with its residual addition, give "
                f"{float((x - want).abs().max()):.3g} off what the layer gives",
                try_="--set adapter.wiring=1, which takes layers whole",
            )

    def _differences(self, *, exact: bool) -> list[_Difference]:
        found = super().differences(exact=exact)
        coupling = self.executor.coupling
        assert coupling is not None
        if coupling.store == "inputs":
            return found
        seen: list[tuple[Tensor, Tensor]] = []
        coupling.observer = lambda _, streams: seen.append((streams.main.clone(), streams.other.clone()))
        try:
            with nothing_zero(self.trained.values()):
                for _ in self._backward(self._rebuilt):
                    pass
        finally:
            coupling.observer = None
        for name, before, after in zip(("main", "other"), seen[0], seen[1]):
            off = (before.double() - after.double()).abs_().max()
            if off > 0:
                found.append(_Difference(self.unit[0], f"the {name} stream", float(off), float(before.abs().max())))
        return found


def _difference(layer: int, name: str, got: Tensor | None, want: Tensor | None) -> _Difference | None:
    if got is None or want is None:
        return None if got is want else _Difference(layer, name, float("inf"), 0.0)
    if torch.equal(got, want):
        return None
    return _Difference(layer, name, float((got.float() - want).abs_().max()), float(want.abs().max()))


def _repeatable(device: torch.device) -> bool:
    """Whether the same backward twice gives the same bits."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def _mlp_tile(executor: Executor) -> int:
    """Rows of a tile where the MLP is tiled, else 0."""
    return max(getattr(module, "tiled_rows", 0) for layer in executor.layers for module in layer.modules())


def _test_rows(placement: Placement, mlp_tile: int) -> int:
    """Rows of a rank: few, but a tile and a cut one where the MLP is tiled, and no more than the placement is for."""
    ranks = placement.attention_rows // placement.rows
    if placement.tier_codec != "exact":
        return min(max(placement.rows // MOST_CODED, 1), max(-(-ROWS // ranks), mlp_tile + O_BLOCK_ROWS))
    return min(placement.rows, max(-(-ROWS // ranks), mlp_tile + O_BLOCK_ROWS))


def _distinct(layers: list[nn.Module], placement: Placement) -> list[range]:
    """Units that are not plainly kept, of which no other is alike, top first."""
    alike: dict[object, range] = {}
    for unit in placement.units():
        if placement.saved == "host" or not placement.layers[unit[0]].keep:
            plans = tuple(placement.layers[index].model_dump_json() for index in unit)
            alike.setdefault((plans, tuple(layer_kind(layers[index]) for index in unit)), unit)
    return list(alike.values())


def scaled(placement: Placement, rows: int, *, mlp_tile: int = 0) -> Placement:
    """The same placement for fewer rows: every share in proportion, none that is there gone.

    O is cut into blocks of 256 rows and the output of a tiled MLP into its tiles, as plans do it.
    """
    if rows == placement.rows:
        return placement
    attention_rows = rows * (placement.attention_rows // placement.rows)
    part = -(-rows // 16)

    def linear(name: str, planned: Rows) -> Rows:
        return _scaled_rows(planned, placement.rows, rows, block=mlp_tile if mlp_tile and name == TILED_MLP else part)

    def layer(plan: LayerPlan) -> LayerPlan:
        return LayerPlan(
            keep=plan.keep,
            x=None if plan.x is None else _scaled_rows(plan.x, placement.rows, rows, block=part),
            o=_scaled_rows(plan.o, placement.attention_rows, attention_rows, block=O_BLOCK_ROWS),
            linear={name: linear(name, planned) for name, planned in plan.linear.items()},
        )

    layers = tuple(layer(plan) for plan in placement.layers)
    return placement.model_copy(update={"rows": rows, "attention_rows": attention_rows, "layers": layers})


def _scaled_rows(planned: Rows, whole: int, rows: int, *, block: int) -> Rows:
    """Shares of `whole` rows for a tensor of `rows`, in blocks from its start; smaller ones if shares ask so."""
    shares = [planned.device, planned.host, planned.disk, whole - planned.stored]
    counts = [int(share > 0) for share in shares]
    if rows < sum(counts):
        return planned.fit(rows)
    block = min(block, rows // sum(counts))
    parts = -(-rows // block)
    while sum(counts) < parts:
        short = [parts * share / whole - count if share else float("-inf") for share, count in zip(shares, counts)]
        counts[short.index(max(short))] += 1
    ends = [rows - min(rows, block * (parts - sum(counts[:tiers]))) for tiers in (1, 2, 3)]
    return Rows(device=ends[0], host=ends[1] - ends[0], disk=ends[2] - ends[1])


@contextlib.contextmanager
def _unwritten_is_nan(device: torch.device) -> Iterator[None]:
    """torch fills what `empty` returns in deterministic mode. On CUDA that takes other kernels, so it is left alone."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _refused(executor: Executor, unit: range, found: list[_Difference], gradients: int, rows: int) -> RebuildDiffers:
    top = max(difference.layer for difference in found)
    worst = max((d for d in found if d.layer == top), key=lambda d: (d.off != d.off, d.relative))
    plan = executor.placement.layers[top]
    stored = [name for name, rows in (("x", plan.x or Rows()), ("O", plan.o), *plan.linear.items()) if rows.stored]
    off = f"by {worst.off:.3g} at most" if worst.off < float("inf") else "is missing or not a number"
    segment = f"layer {unit[0]}" if len(unit) == 1 else f"layers {unit[0]} to {unit[-1]}"
    done = "saving on the host what is kept of" if plan.keep else "rebuilding"
    kept = "keeping it" if executor.coupling is None else "storing its inputs, or its streams do not come back"
    return RebuildDiffers(
        f"{done} decoder layer {top} does not give the gradients of {kept}",
        at=f"{worst.name} of layer {top}, rebuilt with {segment}; stored of it: {', '.join(stored) or 'nothing'}",
        why=f"{len(found)} of {gradients} gradients differ at {rows} rows; this one {off}, "
        f"its largest value is {worst.largest:.3g} (torch {torch.__version__})",
        try_="--set adapter.store=inputs, or another adapter"
        if executor.coupling is not None
        else "--set memory.plan=keep (needs more memory), or another version of torch or transformers",
    )
