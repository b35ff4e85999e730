"""The tape of a model whose layers are coupled reversibly: `memory.coupling` says what a step is, here it is taken with
and against autograd.

A layer stores its side bits where the plan has its x, and by the plan O and outputs of linear layers as any other. Its
backward undoes its steps in reverse: the function runs again on the stream that it read, its output is taken from the
stream that it went into, and the gradients of both streams go on to the layer below. Of streams in floating point there
are no side bits; a layer that is an anchor stores them whole, the first layer what it read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from farspan.memory.coupling import Coupling, Streams
from farspan.memory.executor import Layer, Tape, random_state, require_tensor
from farspan.memory.float_streams import FloatStreams
from farspan.memory.frame import Frame
from farspan.memory.plan import Rows

if TYPE_CHECKING:
    from farspan.memory.executor import Executor


class CoupledTape(Tape):
    """See `Tape`. Between forward and backward it also holds the two streams."""

    def __init__(self, executor: Executor, coupling: Coupling) -> None:
        super().__init__(executor)
        self.coupling = coupling
        self.first = 0
        """The layer that the streams start with."""
        self.streams: Streams | FloatStreams | None = None
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
        if isinstance(streams, FloatStreams) and not inputs and coupling.is_anchor(index, self.first):
            kept += [x.detach()] if index == self.first else [streams.main, streams.other]
            kept = [torch.cat(kept, -1)]  # now: the streams change in place
        if inputs and coupling.wiring == 2 and coupling.adapters[index] is not None:
            kept.append(streams.floating(streams.other))
        coupling.before(index, streams)
        for place, function in enumerate(coupling.functions(index, call)):
            layer.random.append(random_state(self.executor.layers[index], x.device))
            read = streams.floating(streams.main)
            with frame.active(), coupling.running():
                y = function(read)
            require_tensor(index, y)
            side = streams.leap(y, place)
            if inputs or side is not None:
                kept.append(read if inputs else side)  # type: ignore[arg-type]
            del read, y
        y = streams.floating(streams.main)
        if inputs and coupling.wiring == 1 and coupling.adapters[index] is not None:
            kept.append(y)
        coupling.after(index, streams)
        assert plan.x is not None, "a reversible layer stores its side bits"
        if kept:
            whole = kept[0] if len(kept) == 1 else torch.cat(kept, -1)
            what = "inputs" if inputs else "side bits" if coupling.form == "exact" else "streams"
            planned = coupling.form == "exact" or inputs or index % coupling.anchors_planned == 0
            layer.x = self.put(whole, plan.x if planned else Rows(device=x.shape[1]), f"{what} of layer {index}")
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
        anchor = (kept[0], kept[-1]) if kept and isinstance(self.streams, FloatStreams) else None
        d_main = dy
        if coupling.wiring == 1:
            d_main = self._sum_backward(index, dy, kept, into="other")
        frame = self.giving_frame(layer, frozenset(), again=False)
        functions = coupling.functions(index, layer.call)
        for place in reversed(range(len(functions))):
            if place == 0 and coupling.wiring != 2:
                self._settle("other", anchor, 0)  # before the leap it is what will be main
            bits = not isinstance(self.streams, FloatStreams)
            d_main, self.d_other = self._leap_backward(
                index, functions[place], layer.random[place], frame, kept.pop() if bits else None, d_main, place
            )
        del frame
        self._settle("other", anchor, 1)
        if coupling.wiring == 2:
            d_main = self._sum_backward(index, d_main, kept, into="main")
            self._settle("main", anchor, 0)
        layer.x_now = layer.o_now = None
        self.free(index)
        if coupling.observer is not None and self.streams is not None:
            coupling.observer(index, self.streams)
        if index > self.first:
            return d_main
        if self.streams is not None and not coupling.tested:
            if not isinstance(self.streams, FloatStreams):
                self.streams.check_start()
            elif coupling.anchor_every > 1:  # else all that was read again had been stored
                self.streams.check_anchors(coupling.tolerance, coupling.anchor_every)
        self.streams = None
        return d_main + self.d_other if wants_dx and self.d_other is not None else d_main

    def _settle(self, name: Literal["main", "other"], anchor: tuple[Tensor, Tensor] | None, which: int) -> None:
        if anchor is not None:
            assert isinstance(self.streams, FloatStreams)
            self.streams.settle(name, anchor[which])

    def _kept(self, index: int, layer: Layer) -> list[Tensor]:
        """What a layer stored, in the order of its steps."""
        coupling = self.coupling
        if layer.x is None:
            assert coupling.form == "float"
            return []
        whole, layer.x = layer.x.take(), None
        count = coupling.leaps
        if isinstance(self.streams, FloatStreams):
            count = 1 if index == self.first else 2
        elif coupling.store == "inputs" and coupling.wiring < 3:
            count += coupling.adapters[index] is not None
        return list(whole.chunk(count, -1))

    def _leap_backward(
        self, index: int, function: Any, random: Any, frame: Frame, kept: Tensor | None, d_main: Tensor, place: int
    ) -> tuple[Tensor, Tensor]:
        """One step undone, and run backward; returns the gradients of main and other before it."""
        streams = self.streams
        read = streams.floating(streams.other) if streams is not None else kept
        assert read is not None
        read = read.detach().requires_grad_()
        with self.running_again(index, random, frame, read), self.coupling.running():
            y = function(read)
        edge = get_gradient_edge(y)
        if streams is not None:
            streams.leap_back(y, kept, place)
        del y, kept
        torch.autograd.backward(edge, d_main)
        d_read = read.grad
        assert d_read is not None
        if self.d_other is not None:
            d_read.add_(self.d_other)
        share = self.coupling.leap_factors[place]
        if self.coupling.form == "exact":
            d_read.sub_(d_main, alpha=share)
        return d_read, d_main * share

    def _sum_backward(
        self, index: int, d_main: Tensor, kept: list[Tensor], *, into: Literal["main", "other"]
    ) -> Tensor:
        """An adapter's sum undone, and run backward; returns the gradient of main, and sets that of the other."""
        coupling, adapter, factor = self.coupling, self.coupling.adapters[index], self.coupling.add_factor
        d_read, d_added = (d_main, self.d_other) if into == "other" else (self.d_other, d_main)
        if adapter is not None:
            d_read = self._adapter_backward(adapter, d_read, d_added, kept, into=into)
        elif coupling.scales and self.streams is not None:
            self.streams.add(getattr(self.streams, into), None, subtract=True)
        if coupling.scales and d_added is not None:
            d_added = d_added * factor
        d_main, self.d_other = (d_read, d_added) if into == "other" else (d_added, d_read)  # type: ignore[assignment]
        return d_main

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
