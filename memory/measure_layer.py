"""One decoder layer in the probe's hands: what the allocator does, and how long it takes, in every way of running it.

A release is seen only if the tensor was made under the same profiler: so whatever a run releases is made inside, before
a mark in the events, and only what follows the mark counts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from farspan.kernels.attention import KnownRows, causal_attention
from farspan.memory.allocations import fastest_s, footprint
from farspan.memory.frame import HOLLOW, TILED_MLP, Frame, linear_classes, route_linear
from farspan.memory.moments import CUT_BYTES, Run
from farspan.memory.needed import kept_tensors
from farspan.memory.operators import gradient_error
from farspan.memory.samples import MARK_BYTES, LayerSample, Subject, hand_on, mark, weights_in
from farspan.memory.saved import saved_on_host
from farspan.memory.single_layers import hooked
from farspan.memory.tier_error import layer_error
from farspan.memory.tiers import Store


def probe(subject: Subject, index: int, rows: int, measure: Callable[[partial[Any], Tensor], Any]) -> None:
    """Call `measure(call, x)` in the place of layer `index`."""

    def hook(call: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            measure(call, x.detach())
        return x

    with torch.no_grad(), hooked(subject.layers, {index: hook}):
        subject.step(rows)


class _Seed(torch.autograd.Function):
    """Starts a backward at a layer's output with a gradient nobody else holds, as the layer above would."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype, ctx.device = y.shape, y.dtype, y.device
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full(ctx.shape, 1e-3, dtype=ctx.dtype, device=ctx.device)


class _Layer:
    """A layer in the probe's hands."""

    def __init__(self, subject: Subject, index: int, call: partial[Any], x: Tensor) -> None:
        self.layer, self.call, self.x = subject.layers[index], call, x
        self.device, self.gradients = x.device, subject.gradients
        self.linears = linear_classes(self.layer)
        self.hollow = frozenset([HOLLOW]) if subject.hollow else frozenset()
        self.trained = [p for p in self.layer.parameters() if p.requires_grad]

    def leaf(self) -> Tensor:
        return self.x.detach().requires_grad_()

    def clear(self) -> None:
        """Gradients as they are before this layer's backward."""
        for p in self.trained:
            p.grad = torch.zeros_like(p) if self.gradients == "added" else None

    def drop(self) -> None:
        for p in self.trained:
            p.grad = None

    def backward(self, y: Tensor | GradientEdge, dy: Tensor, *, again: bool = False) -> None:
        hooks = []
        if self.gradients == "handed on":
            hooks = [p.register_post_accumulate_grad_hook(hand_on) for p in self.trained]
        try:
            torch.autograd.backward(y, dy, retain_graph=again)
        finally:
            for hook in hooks:
                hook.remove()

    def backward_as_kept(self, y: Tensor) -> None:
        """With a gradient of the output that nobody else holds."""
        seed = _Seed.apply(y)
        self.backward(seed, torch.ones_like(seed))

    def attention_inputs(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Inputs of the linear layers by class, and what attention is called with."""
        caught: dict[str, Tensor] = {}
        held: dict[str, Any] = {}
        frame = Frame(caught=lambda q, k, v, rest: held.update(q=q, k=k, v=v, rest=rest))
        hooks = [
            linear.register_forward_pre_hook(lambda _, inputs, name=name: caught.__setitem__(name, inputs[0]))
            for name, linear in self.linears.items()
        ]
        with torch.no_grad(), frame.active():
            self.call(self.x)
        for hook in hooks:
            hook.remove()
        return caught, held


class LayerAllocations(_Layer):
    """Events of every way to run the layer, once it has run once (what is made on first use is not counted)."""

    def __init__(
        self,
        subject: Subject,
        index: int,
        sample: LayerSample,
        rows: int,
        tile: int,
        call: partial[Any],
        x: Tensor,
    ) -> None:
        super().__init__(subject, index, call, x)
        self.sample, self.rows, self.tile = sample, rows, tile
        sample.x_bytes_per_row = x.nbytes / rows
        sample.gradient_bytes = sum(p.nbytes for p in self.trained)
        sample.weights = weights_in(self.layer.parameters(), inside=True)
        self.clear()
        self.backward_as_kept(call(self.leaf()))
        sample.saved = kept_tensors(self.layer, call, x)
        sample.gradient_error = gradient_error(self.layer, call, x)
        if subject.exactly is not None:
            sample.exchange_error = gradient_error(self.layer, call, x, without=subject.exactly)
        self.o = self._inputs()
        seen = rows if self.o is None else self.o[0].shape[2]
        sample.tier_error = layer_error(
            self.layer, call, x, subject.tier_codec, attention_rows=seen, hollow=subject.hollow
        )
        self._plain()
        self._keep()
        self._rebuild()
        saved_bytes = sample.runs["keep forward"][-1].totals[-1]
        with Store(host_bytes=2 * saved_bytes + 2**20, device=self.device) as store:
            self._keep(store)
            self._rebuild(store)
        self.drop()

    def _note(self, what: str, function: Callable[[], object], store: Store | None = None) -> None:
        if store is not None:
            store.statistics(restart=True)
        took = footprint(function, self.device)
        if store is not None:
            moved = store.statistics().moved_bytes
            self.sample.moved.setdefault(what, []).append((moved["copy_out"], moved["copy_in"]))
        sizes = [size for _, size in took.events]
        events = tuple(sizes[sizes.index(-MARK_BYTES) + 1 :])
        self.sample.runs.setdefault(what, []).append(Run(self.rows, self.tile, events))

    def _inputs(self) -> tuple[Tensor, Tensor] | None:
        inputs, held = self.attention_inputs()
        for name, linear in self.linears.items():
            if name in inputs:
                width = self.x.element_size() * linear.out_features
                self.sample.linear_bytes_per_row[name] = width * inputs[name].numel() / linear.in_features / self.rows
        if not held:
            return None
        out, lse = causal_attention(held["q"], held["k"], held["v"], **held["rest"])
        self.sample.window = held["rest"]["window"]
        self.sample.o_bytes_per_row = (out.nbytes + lse.nbytes) / out.shape[2]
        return out.detach(), lse.detach()

    def _frame(self, **fields: Any) -> Frame:
        """A layer with a window cuts its runs where attention begins and ends, forward and backward."""
        if self.sample.window is None:
            return Frame(**fields)
        return Frame(caught=self._attention_begins, attended=self._attention_ended, **fields)

    def _attention_begins(self, q: Tensor, k: Tensor, v: Tensor, _: dict[str, Any]) -> None:
        mark(self.device, CUT_BYTES)
        self.returned = False
        for tensor in (q, k, v):
            if tensor.requires_grad:
                tensor.register_hook(self._gradient_returned)

    def _attention_ended(self, out: Tensor, _: Tensor) -> None:
        mark(self.device, CUT_BYTES)
        if out.requires_grad:
            out.register_hook(lambda _: mark(self.device, CUT_BYTES))

    def _gradient_returned(self, _: Tensor) -> None:
        """Of q, k or v: whichever is first."""
        if not self.returned:
            mark(self.device, CUT_BYTES)
        self.returned = True

    def _plain(self) -> None:
        """Without autograd, O held to the end."""
        held: list[Tensor] = []
        frame = self._frame()
        ended = frame.attended

        def attended(out: Tensor, lse: Tensor) -> None:
            held.extend((out, lse))
            if ended is not None:
                ended(out, lse)

        frame.attended = attended

        def run() -> None:
            mark(self.device)
            with torch.no_grad(), frame.active():
                held.append(self.call(self.x))

        self._note("forward", run)

    def _keep(self, store: Store | None = None) -> None:
        """With autograd, after another layer whose output nobody else holds; then its backward."""
        above: list[Tensor] = []
        where = " on host" if store is not None else ""

        def forward() -> None:
            below = [self.call(self.leaf())]
            mark(self.device)
            with self._saving(store), self._frame().active():
                above.append(self.call(below.pop()))

        def backward() -> None:
            self.clear()
            with self._saving(store), self._frame().active():
                y = self.call(self.leaf())
            mark(self.device)
            self.backward_as_kept(y)

        self._note(f"keep forward{where}", forward)
        above.clear()
        self._note(f"keep backward{where}", backward, store)

    def _saving(self, store: Store | None, *held: Tensor) -> AbstractContextManager[None]:
        """Around the layer's forward: its saved tensors go to the host, as the executor has it."""
        if store is None:
            return nullcontext()
        return saved_on_host(store, self.layer, (self.call.args, self.call.keywords, held), "a layer that is measured")

    def _rebuild(self, store: Store | None = None) -> None:
        """With autograd, O given, the way the executor does it: the gradient of the output is held to the end."""
        dy = torch.ones_like(self.x)
        x = self.leaf()
        routed = [self.linears[name] for name in self.hollow & self.linears.keys()]
        for linear in routed:
            route_linear(linear, HOLLOW)

        def run() -> None:
            self.clear()
            given = [KnownRows(self.o[0].clone(), self.o[1].clone(), first=0)] if self.o is not None else []
            frame = self._frame(known=given.pop if given else None, hollow=self.hollow)
            mark(self.device)
            with frame.active(), self._saving(store, x):
                edge = get_gradient_edge(self.call(x))
            del frame
            self.backward(edge, dy)

        try:
            self._note("rebuild on host" if store is not None else "rebuild", run, store)
        finally:
            for linear in routed:
                del linear.forward


class LayerSeconds(_Layer):
    """Fastest of some runs of every way."""

    def __init__(
        self, subject: Subject, index: int, sample: LayerSample, rows: int, call: partial[Any], x: Tensor
    ) -> None:
        super().__init__(subject, index, call, x)
        seconds = sample.timed[rows] = {}
        inputs, held = self.attention_inputs()
        if held:
            seconds |= self._attention(held)
        with torch.no_grad():
            for name, source in inputs.items():
                seconds[f"linear {name}"] = self._fastest(partial(nn.Linear.forward, self.linears[name], source))
            mlp: Any = getattr(self.layer, "mlp", None)
            if getattr(mlp, "tiled_rows", None) is not None:
                seconds[f"linear {TILED_MLP}"] = self._fastest(partial(mlp, x))
            seconds["forward"] = self._fastest(lambda: call(x))
        self.clear()
        y = call(self.leaf())
        seconds["backward"] = self._fastest(lambda: self.backward(y, torch.ones_like(y), again=True))
        self.drop()

    def _fastest(self, function: Callable[[], object]) -> float:
        return fastest_s(function, self.device)

    def _attention(self, held: dict[str, Any]) -> dict[str, float]:
        inputs = [held[name].detach().requires_grad_() for name in "qkv"]
        out, _ = causal_attention(*inputs, **held["rest"])
        grad = torch.ones_like(out)

        def forward() -> None:
            with torch.no_grad():
                causal_attention(*inputs, **held["rest"])

        return {
            "rows of attention": out.shape[2],
            "attention forward": self._fastest(forward),
            "attention backward": self._fastest(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)),
        }
