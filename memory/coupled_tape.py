"""The tape of a model whose layers are coupled reversibly: `memory.coupling` says what a step is, here it is taken with
and against autograd.

A layer stores its side bits where the plan has its x, and by the plan O and outputs of linear layers as any other. Its
backward undoes its steps in reverse: the function runs again on the stream that it read, its output is taken from the
stream that it went into, and the gradients of both streams go on to the layer below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from farspan.memory.coupling import Coupling, Streams
from farspan.memory.executor import Layer, Tape, random_state, require_tensor
from farspan.memory.frame import Frame

if TYPE_CHECKING:
    from farspan.memory.executor import Executor


class CoupledTape(Tape):
    """See `Tape`. Between forward and backward it also holds the two streams."""

    def __init__(self, executor: Executor, coupling: Coupling) -> None:
        super().__init__(executor)
        self.coupling = coupling
        self.first = 0
        """The layer that the streams start with."""
        self.streams: Streams | None = None
        self.d_other: Tensor | None = None
        """Gradient of the other stream where backward has come to; None: zero."""

    def record(self, index: int, x: Tensor, call: partial[Any]) -> Tensor:
        coupling, plan = self.coupling, self.placement.layers[index]
        if self.executor.store is not None:
            self.executor.store.admit()
        layer = self.layers[index] = Layer(call)
        if self.streams is None:
            self.first, self.streams = index, coupling.start(x)
        streams = self.streams
        if coupling.observer is not None:
            coupling.observer(index, streams)
        frame = self.storing_frame(index, layer)
        kept: list[Tensor] = []
        inputs = coupling.store == "inputs"
        if inputs and coupling.wiring == 2 and coupling.adapters[index] is not None:
            kept.append(streams.floating(streams.other))
        coupling.before(index, streams)
        for function in coupling.functions(index, call):
            layer.random.append(random_state(self.executor.layers[index], x.device))
            read = streams.floating(streams.main)
            with frame.active(), coupling.running():
                y = function(read)
            require_tensor(index, y)
            side = streams.leap(y)
            kept.append(read if inputs else side)
            del read, y
        y = streams.floating(streams.main)
        if inputs and coupling.wiring == 1 and coupling.adapters[index] is not None:
            kept.append(y)
        coupling.after(index, streams)
        assert plan.x is not None, "a reversible layer stores its side bits"
        whole = kept[0] if len(kept) == 1 else torch.cat(kept, -1)
        layer.x = self.put(whole, plan.x, f"{'inputs' if inputs else 'side bits'} of layer {index}")
        self.last = index
        if index == len(self.placement.layers) - 1:
            if not coupling.tested:
                streams.check()
            if inputs:
                self.streams = None  # backward has no use for them
            self.prefetch(0)
        return y

    def rebuild(self, index: int, dy: Tensor, *, wants_dx: bool) -> Tensor | None:
        executor, coupling, layer = self.executor, self.coupling, self.layers[index]
        if executor.store is not None:
            executor.store.let_go()
        if index in executor.place_of_top:
            self.prefetch(executor.place_of_top[index])
        if coupling.store == "inputs":
            self.streams = None
        kept = self._kept(index, layer)
        adapter = coupling.adapters[index]
        d_main = dy
        if adapter is not None and coupling.wiring == 1:
            d_main = self._adapter_backward(adapter, dy, self.d_other, kept, into="other")
        frame = self.giving_frame(layer, frozenset(), again=False)
        for function, random in reversed(list(zip(coupling.functions(index, layer.call), layer.random))):
            d_main, self.d_other = self._leap_backward(index, function, random, frame, kept.pop(), d_main)
        del frame
        if adapter is not None and coupling.wiring == 2:
            self.d_other = self._adapter_backward(adapter, self.d_other, d_main, kept, into="main")
        layer.x_now = layer.o_now = None
        self.free(index)
        if coupling.observer is not None and self.streams is not None:
            coupling.observer(index, self.streams)
        if index > self.first:
            return d_main
        if self.streams is not None and not coupling.tested:
            self.streams.check_start()
        self.streams = None
        return d_main + self.d_other if wants_dx and self.d_other is not None else d_main

    def _kept(self, index: int, layer: Layer) -> list[Tensor]:
        """What a layer stored, in the order of its steps."""
        coupling = self.coupling
        assert layer.x is not None
        whole, layer.x = layer.x.take(), None
        count = coupling.leaps
        if coupling.store == "inputs" and coupling.wiring < 3:
            count += coupling.adapters[index] is not None
        return list(whole.chunk(count, -1))

    def _leap_backward(
        self, index: int, function: Any, random: Any, frame: Frame, kept: Tensor, d_main: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step undone, and run backward; returns the gradients of main and other before it."""
        streams = self.streams
        read = streams.floating(streams.other) if streams is not None else kept
        read = read.detach().requires_grad_()
        with self.running_again(index, random, frame, read), self.coupling.running():
            y = function(read)
        edge = get_gradient_edge(y)
        if streams is not None:
            streams.leap_back(y, kept)
        del y, kept
        torch.autograd.backward(edge, d_main)
        d_read = read.grad
        assert d_read is not None
        if self.d_other is not None:
            d_read.add_(self.d_other)
        share = 2.0**-self.coupling.bits
        return d_read.sub_(d_main, alpha=share), d_main * share

    def _adapter_backward(
        self, adapter: Any, d_read: Tensor | None, d_added: Tensor | None, kept: list[Tensor], *, into: str
    ) -> Tensor:
        """An adapter's sum undone, and run backward; returns the gradient of the stream that it read."""
        streams = self.streams
        if streams is None:
            read = kept.pop()
        else:
            read = streams.floating(streams.main if into == "other" else streams.other)
        read = read.detach().requires_grad_()
        with torch.enable_grad(), self.autocasting():
            y = adapter(read)
        if streams is not None:
            streams.add(streams.other if into == "other" else streams.main, y, subtract=True)
        if d_added is not None:  # nothing reads the other stream above the last layer
            torch.autograd.backward(y, d_added)
        if read.grad is None:
            assert d_read is not None
            return d_read
        return read.grad if d_read is None else read.grad.add_(d_read)

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (enabled, dtype, cached) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cached))
            yield
