"""Carries out a placement on an unmodified transformers model, with gradients bit-equal to keeping everything.

Every decoder layer of transformers offers one hook: in training it calls `_gradient_checkpointing_func(call, x)`, with
all other arguments bound in `call`. There each layer that is to be rebuilt becomes one autograd node. Its forward runs
the layer without autograd and puts on a tape what the plan stores; its backward asks the tape for the layer's input,
runs the layer again with autograd, stored rows given, and back-propagates through it. Segments exist only on the tape,
so any mixture of kept, rebuilt and frozen layers is the same code and only one layer's inner tensors live at a time.

Nested backward lets parameter gradients arrive through their own accumulation nodes, which is what DeepSpeed's and our
engine's hooks wait for. Cost: one forward per rebuilt layer less what is given, and, in segments, an inner forward.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from farspan.errors import JobError
from farspan.kernels.attention import KnownRows
from farspan.memory.coded_rows import noise_key, row_codec
from farspan.memory.frame import HOLLOW, TILED_MLP, Frame, draws, linear_classes, reads_last, route_linear
from farspan.memory.plan import Placement, Rows
from farspan.memory.saved import saved_on_host
from farspan.memory.tiered import DeviceLedger, TieredRows

if TYPE_CHECKING:
    from farspan.memory.coupling import Coupling
    from farspan.memory.tiers import Store


class Executor:
    """The placement of one model on one rank.

    Args:
        layers: decoder layers, bottom first.
        placement: what to store of each.
        store: host and disk; None where the placement uses the device alone.
        hollow: whether nothing between a layer's last linear layer and its output reads values in backward (a norm
            after the MLP does), so that its matmul can be left out of rebuilds.
        coupling: reversible streams around the layers; a layer's x is then its side bits.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        placement: Placement,
        store: Store | None = None,
        *,
        hollow: bool = False,
        coupling: Coupling | None = None,
    ) -> None:
        assert len(layers) == len(placement.layers), (len(layers), len(placement.layers))
        assert placement.saved == "device" or store is not None, "saved tensors on the host need a store"
        assert coupling is None or all(plan.x is not None for plan in placement.layers), "each layer stores its bits"
        assert coupling is None or placement.tier_codec == "exact", "reversible layers need their rows bit for bit"
        self.layers, self.placement, self.store, self.coupling = layers, placement, store, coupling
        hollow = hollow and coupling is None and not any(map(reads_last, layers))
        self.hollow = frozenset([HOLLOW]) if hollow else frozenset()
        self.ledger = DeviceLedger()
        self.units = placement.units()
        self.place_of_top = {unit[-1]: place for place, unit in enumerate(self.units)}
        self._tape: weakref.ref[Tape] | None = None
        self._anchor = torch.empty(0, requires_grad=True)
        for index, (layer, plan) in enumerate(zip(layers, placement.layers)):
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = self.placed(index)  # type: ignore[assignment]
            if plan.keep:
                continue
            classes = linear_classes(layer)
            missing = plan.linear.keys() - classes.keys() - {TILED_MLP}
            assert not missing, f"layer {index} has no {missing}"
            partly = [name for name, rows in plan.linear.items() if rows.stored != placement.rows]
            assert not partly, f"layer {index}: linear layers run on whole tensors, so {partly} are stored whole"
            for name in classes.keys() & {*plan.linear, *self.hollow}:
                route_linear(classes[name], name)

    @contextlib.contextmanager
    def with_rows_of(self, placement: Placement) -> Iterator[None]:
        """Inside, forwards store what `placement` says; it may differ from this executor's in numbers of rows and in
        the codes of rows that leave the device."""
        own = self.placement
        assert placement.units() == self.units, "other segments would need other nodes"
        assert placement.saved == self.placement.saved
        assert [plan.linear.keys() for plan in placement.layers] == [plan.linear.keys() for plan in own.layers]
        self.placement = placement
        try:
            yield
        finally:
            self.placement = own

    def placed(self, index: int) -> Callable[[partial[Any], Tensor], Tensor]:
        """A layer as the placement has it: takes its call and its hidden states."""
        return partial(self._keep if self.placement.layers[index].keep else self._run, index)

    def saving(self, index: int, call: partial[Any], *held: Tensor) -> AbstractContextManager[None]:
        """Around a run of a layer with autograd; `held` by whoever runs it."""
        if self.placement.saved == "device" or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        assert self.store is not None
        staying = (call.args, call.keywords, held)
        return saved_on_host(self.store, self.layers[index], staying, f"what layer {index} saves")

    def _keep(self, index: int, call: partial[Any], x: Tensor) -> Tensor:
        with self.saving(index, call):
            y = call(x)
        if self.store is not None:
            self.store.let_go()  # of layers below: after the last layer comes the loss
        tape = self._tape() if self._tape is not None else None
        if y.requires_grad and tape is not None and tape.last < index:
            tape.last = index
            place, waiting = self.place_of_top[index], weakref.ref(tape)
            y.register_hook(lambda _: fetch_ahead(waiting, place))
        return y

    def _run(self, index: int, call: partial[Any], x: Tensor) -> Tensor:
        coupling = self.coupling if self.coupling is not None and self.coupling.on else None
        if not torch.is_grad_enabled():
            return call(x) if coupling is None else coupling.pass_through(index, call, x)
        trained = coupling is not None or any(p.requires_grad for p in self.layers[index].parameters())
        if not x.requires_grad and not trained:
            return call(x)  # nothing below or in here is trained: no gradient will ever be asked for
        tape = self._tape() if self._tape is not None else None
        if tape is None or index <= tape.last:
            tape = Tape(self) if coupling is None else self._coupled_tape(coupling)
            self._tape = weakref.ref(tape)  # held by the nodes alone: it goes when they go
        _refuse_gradients_by_keyword(index, call)
        return _LayerNode.apply(x, self._anchor, tape, index, call)

    def _coupled_tape(self, coupling: Coupling) -> Tape:
        from farspan.memory.coupled_tape import CoupledTape

        return CoupledTape(self, coupling)


Random: TypeAlias = tuple[Tensor, Tensor | None] | None
"""States of the generators of CPU and GPU; None: nothing drops out."""


@dataclass
class Layer:
    """What the tape knows of one layer between its forward and its backward."""

    call: partial[Any]
    random: list[Random] = field(default_factory=list)
    """Generators before each function that the layer consists of."""
    x: TieredRows | None = None
    x_now: Tensor | None = None
    o: TieredRows | None = None
    lse: TieredRows | None = None
    o_now: tuple[Tensor, Tensor] | None = None
    linear: dict[str, TieredRows] = field(default_factory=dict)
    linear_now: dict[str, Tensor] = field(default_factory=dict)

    def known(self) -> KnownRows | None:
        """O with its stored rows in place; afterwards the layer holds the complete buffer instead of the rows."""
        if self.o_now is not None:
            return KnownRows(*self.o_now, first=0)
        if self.o is None:
            return None
        assert self.lse is not None
        first = self.o.first
        self.o_now = self.o.take().transpose(1, 2), self.lse.take().transpose(1, 2)
        self.o = self.lse = None
        return KnownRows(*self.o_now, first)

    def given(self, name: str, *, again: bool) -> Tensor:
        """Output of a linear layer; held on only if the layer will run `again`."""
        if name not in self.linear_now:
            self.linear_now[name] = self.linear.pop(name).take()
        return self.linear_now[name] if again else self.linear_now.pop(name)

    def parts(self) -> list[TieredRows]:
        return [part for part in (self.x, self.o, self.lse, *self.linear.values()) if part is not None]


class Tape:
    """What one forward stored, until its backward has used it up. Held by the autograd nodes of that forward."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.placement = executor, executor.placement
        self.layers: dict[int, Layer] = {}
        self.last = -1
        self.autocast = _autocast_state()
        self.key = noise_key(self.placement.tier_codec)  # before any layer runs: what layers draw is as it would be

    def record(self, index: int, x: Tensor, call: partial[Any]) -> Tensor:
        """First forward of a layer, without autograd."""
        executor, plan = self.executor, self.placement.layers[index]
        if executor.store is not None:
            executor.store.admit()
        layer = self.layers[index] = Layer(call, [random_state(executor.layers[index], x.device)])
        frame = self.storing_frame(index, layer)
        x, version = x.detach(), x._version  # with its history it would hold the node below, and that the tape
        with frame.active():
            y = call(x)
        require_tensor(index, y)
        if x._version != version:
            raise _unsupported(index, "writes into its input", "the input could not be used again")
        # whoever comes first on the tape has nothing below to be recomputed from
        if plan.x is not None or index - 1 not in self.layers:
            layer.x = self.put(x, plan.x or Rows(device=x.shape[1]), f"x of layer {index}")
        self.last = index
        if index == len(self.placement.layers) - 1:
            self.prefetch(0)
        return y

    def rebuild(self, index: int, dy: Tensor, *, wants_dx: bool) -> Tensor | None:
        """Backward of a layer: run it again with autograd, back-propagate. Returns the gradient of its input."""
        executor, layer = self.executor, self.layers[index]
        if executor.store is not None:
            executor.store.let_go()
        if index in executor.place_of_top:
            self.prefetch(executor.place_of_top[index])
        x = self._input_of(index).detach().requires_grad_(wants_dx)
        frame = self.giving_frame(layer, executor.hollow, again=False)
        with self.running_again(index, layer.random[0], frame, x):
            edge = get_gradient_edge(layer.call(x))  # nobody reads the output itself: its memory is free again
        del frame
        layer.x_now = layer.o_now = None
        torch.autograd.backward(edge, dy)
        self.free(index)
        return x.grad

    def _input_of(self, index: int) -> Tensor:
        """Input of a layer, stored or recomputed from the head of its segment by the inner forward."""
        start = index
        while self.layers[start].x is None and self.layers[start].x_now is None:
            start -= 1
        layer = self.layers[start]
        if layer.x_now is None:
            assert layer.x is not None
            layer.x_now, layer.x = layer.x.take(), None
        x = layer.x_now
        for inner in range(start, index):
            layer = self.layers[inner]
            frame = self.giving_frame(layer, frozenset(), again=True)
            frame.attended = partial(_complete, layer)
            with torch.no_grad(), self.restored(layer.random[0], x.device), frame.active():
                x = layer.call(x)
            if self.placement.between == "xo" and inner + 1 < index:
                self.layers[inner + 1].x_now = x
        if index > start and self.placement.between == "xo":
            self.layers[index].x_now = x
        return x

    @contextlib.contextmanager
    def running_again(self, index: int, random: Random, frame: Frame, x: Tensor) -> Iterator[None]:
        """Around a function of a layer that is run for its backward."""
        with (
            torch.enable_grad(),
            self.restored(random, x.device),
            frame.active(),
            self.executor.saving(index, self.layers[index].call, x),
        ):
            yield

    def storing_frame(self, index: int, layer: Layer) -> Frame:
        """For a first forward: what is to be stored of it goes where the plan says."""
        plan = self.placement.layers[index]

        def attended(out: Tensor, lse: Tensor) -> None:
            if plan.o.stored:
                layer.o = self.put(out.transpose(1, 2), plan.o, f"O of layer {index}")
                layer.lse = self.put(lse.transpose(1, 2), plan.o, f"log-sum-exp of layer {index}", exact=True)

        def produced(name: str, y: Tensor) -> None:
            layer.linear[name] = self.put(y, plan.linear[name], f"{name} of layer {index}")

        return Frame(attended=attended, produced={name: partial(produced, name) for name in plan.linear})

    def giving_frame(self, layer: Layer, hollow: frozenset[str], *, again: bool) -> Frame:
        has_o = layer.o is not None or layer.o_now is not None
        names = {*layer.linear, *layer.linear_now}
        given = {name: partial(layer.given, name, again=again) for name in names}
        return Frame(layer.known if has_o else None, given=given, hollow=hollow, again=again)

    def prefetch(self, place: int) -> None:
        """Fetch the unit at this place of backward and those planned ahead of it."""
        if self.executor.store is not None:
            self.executor.store.let_go()
        for unit in self.executor.units[place : place + self.placement.prefetch + 1]:
            for index in unit:
                for part in self.layers[index].parts() if index in self.layers else ():
                    part.fetch()

    def put(self, tensor: Tensor, rows: Rows, label: str, *, exact: bool = False) -> TieredRows:
        """`exact`: whatever the codec of the tiers is."""
        codec = None
        if not exact and rows.host + rows.disk:
            codec = row_codec(self.placement.tier_codec, math.prod(tensor.shape[2:]), self.key, label)
        return TieredRows(tensor, rows, self.executor.store, self.executor.ledger, label, codec)

    def free(self, index: int) -> None:
        for part in self.layers.pop(index).parts():
            part.free()

    def __del__(self) -> None:
        for layer in self.layers.values():  # a backward that never came, or broke off
            for part in layer.parts():
                part.free()

    @contextlib.contextmanager
    def restored(self, random: Random, device: torch.device) -> Iterator[None]:
        """The autocast mode and, if anything drops out, the generators of a first forward."""
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype, cached) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cached))
            if random is not None:
                cpu, cuda = random
                stack.enter_context(torch.random.fork_rng([device] if cuda is not None else [], device_type="cuda"))
                torch.set_rng_state(cpu)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, device)
            yield


def fetch_ahead(waiting: weakref.ref[Tape], place: int) -> None:
    """The kept layer at this place of backward is about to run: fetch what comes after it."""
    tape = waiting()
    if tape is not None:
        tape.prefetch(place)


def _complete(layer: Layer, out: Tensor, lse: Tensor) -> None:
    layer.o_now = out, lse


class _LayerNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, tape: Tape, index: int, call: partial[Any]) -> Tensor:
        del anchor  # requires grad, so that the node has a backward even where x needs no gradient
        ctx.tape, ctx.index = tape, index
        return tape.record(index, x, call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise _unsupported(ctx.index, "was asked for by torch.autograd.grad", "only .backward() fills parameters")
        assert ctx.tape is not None, "backward through a rebuilt layer runs once"
        tape, ctx.tape = ctx.tape, None
        return tape.rebuild(ctx.index, dy, wants_dx=ctx.needs_input_grad[0]), None, None, None, None


def _autocast_state() -> dict[str, tuple[bool, torch.dtype, bool]]:
    cached = torch.is_autocast_cache_enabled()
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cached)
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    }


def random_state(layer: nn.Module, device: torch.device) -> Random:
    """Generator states before a layer in which something is drawn."""
    if not draws(layer):
        return None
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _refuse_gradients_by_keyword(index: int, call: partial[Any]) -> None:
    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for part in value:
                yield from tensors(part)

    for name, value in call.keywords.items():
        if any(tensor.requires_grad for tensor in tensors(value)):
            raise _unsupported(index, f"is given `{name}`, which needs a gradient", "that gradient would be lost")


def require_tensor(index: int, y: Any) -> None:
    """Raises JobError where a layer returns more than hidden states."""
    if not isinstance(y, Tensor):
        raise _unsupported(index, f"returns a {type(y).__name__}", "what it returns beside hidden states is lost")


def _unsupported(index: int, what: str, why: str) -> JobError:
    return JobError(
        f"decoder layer {index} cannot be rebuilt: it {what}",
        at="memory.plan",
        why=why,
        try_="--set memory.plan=keep, which reversible layers do not have: use another adapter there",
    )
