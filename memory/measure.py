"""A profile read off the device: what the layers of this very model save, need and take at a thousand rows or two.

The model runs as in training, with a probe in the place of checkpointing. At one layer of each kind the probe runs the
layer alone in all the ways a plan may run it, and writes down what the allocator does; all other layers are passed
over, so that what remains of the step is embedding, norm, head and loss. Adapters, tiles, tied weights, a fused norm
are in the numbers because they were there, not because a formula knows of them; `memory.moments` makes functions of
the rows of them.

Costs some thirty forwards and backwards of single layers and of the head. Not measured here: seconds of exchanges
between ranks (their buffers are, see `LoneRank`), model states and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from farspan.kernels.attention import KnownRows, causal_attention
from farspan.memory.allocations import fastest_s, footprint
from farspan.memory.frame import HOLLOW, TILED_MLP, Frame, linear_classes, route_linear
from farspan.memory.liveness import Size
from farspan.memory.moments import SETTINGS, Run, fit_end, fit_peak
from farspan.memory.profile import (
    Amount,
    AttentionProfile,
    HeadProfile,
    KindProfile,
    LinearProfile,
    PairTime,
    Profile,
    Source,
    attended_pairs,
)
from farspan.memory.shape import Weights
from farspan.memory.single_layers import hooked

TIMED_ROWS = (1024, 2048)
"""Lengths at which seconds are taken."""
Gradients = Literal["handed on", "first", "added"]
"""What becomes of a weight's gradient: moved away as soon as it is complete; it stays; it is added to one that is there
already (a later micro-batch)."""


class Subject(NamedTuple):
    """What is measured.

    Attributes:
        model: holds every parameter.
        layers: decoder layers, bottom first, with adapters and tiles, without an executor.
        embedding: the input embedding.
        step: runs the model on one document of so many rows of this rank, returns the loss.
        set_tile: sets the rows of every tile (loss, MLP); None: those of the job again.
        hollow: as for the executor.
        gradients: what becomes of them in training.
    """

    model: nn.Module
    layers: list[nn.Module]
    embedding: nn.Embedding
    step: Callable[[int], Tensor]
    set_tile: Callable[[int | None], None]
    hollow: bool
    gradients: Gradients


@dataclass
class LayerSample:
    """One layer: events by way of running it, and seconds."""

    x_bytes_per_row: float = 0.0
    o_bytes_per_row: float = 0.0
    window: int | None = None
    gradient_bytes: int = 0
    weights: Weights | None = None
    linear_bytes_per_row: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    timed: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds by rows and by what ran."""


@dataclass
class HeadSample:
    """Everything but the layers."""

    held: list[Run] = field(default_factory=list)
    work: list[Run] = field(default_factory=list)
    x_bytes_per_row: float = 0.0
    gradient_bytes: int = 0
    embedding_gradient_bytes: int = 0
    weights: Weights | None = None
    timed: dict[int, float] = field(default_factory=dict)


def measure_profile(subject: Subject, names: list[str], *, loss_tile: int, mlp_tile: int | None, sp: int) -> Profile:
    """Profile a model. Its gradients are cleared; times of exchanges and of the optimizer are left at 0.

    Args:
        names: kind of each layer; layers of one kind cost the same.
        loss_tile, mlp_tile: rows of a tile in training.
        sp: ranks that will share a sequence; `step` must run one of them.
    """
    device = subject.embedding.weight.device
    first = {name: names.index(name) for name in dict.fromkeys(names)}
    layers = {name: LayerSample() for name in first}
    head = HeadSample()
    footprint(lambda: None, device)  # starts the profiler
    try:
        for rows, tile in SETTINGS:
            for name, index in first.items():
                times = _windows_shown(subject.layers[index])
                subject.set_tile(times * tile)
                run = partial(_Allocations, subject, index, layers[name], times * rows, times * tile)
                probe(subject, index, times * rows, run)
            subject.set_tile(tile)
            _head_allocations(subject, head, rows, tile)
        subject.set_tile(None)
        for rows in TIMED_ROWS:
            for name, index in first.items():
                probe(subject, index, rows, partial(_Seconds, subject, index, layers[name], rows))
            head.timed[rows] = _head_seconds(subject, rows)
    finally:
        subject.set_tile(None)
    return Profile(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch_version=torch.__version__,
        sp=sp,
        mlp_tile=mlp_tile,
        layers=tuple(names),
        kinds=tuple(_kind(name, sample, subject.gradients, mlp_tile) for name, sample in layers.items()),
        head=_head(head, subject.gradients, loss_tile),
        sources={
            part: Source(how="measured", what=what)
            for part, what in {
                "bytes": f"one layer of each kind at {' and '.join(str(rows) for rows, _ in SETTINGS)} rows",
                **dict.fromkeys(("matmul", "attention", "elementwise"), f"at {TIMED_ROWS[0]} and {TIMED_ROWS[1]} rows"),
            }.items()
        },
    )


def _windows_shown(layer: nn.Module) -> int:
    """How many times longer runs must be for a sliding window to be narrower than half of them."""
    window = getattr(getattr(layer, "self_attn", None), "sliding_window", None) or 0
    return max(1, -(-9 * window // (4 * SETTINGS[0][0])))


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

    def backward(self, y: Tensor, dy: Tensor | None = None, *, again: bool = False) -> None:
        hooks = []
        if self.gradients == "handed on":
            hooks = [p.register_post_accumulate_grad_hook(_hand_on) for p in self.trained]
        try:
            torch.autograd.backward(_Seed.apply(y) if dy is None else y, dy, retain_graph=again)
        finally:
            for hook in hooks:
                hook.remove()

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


def _hand_on(parameter: Tensor) -> None:
    parameter.grad = None


MARK_BYTES = 7
"""No tensor of a model has this size: where it is allocated, a moment is marked in the events."""


def _mark(device: torch.device) -> None:
    torch.empty(MARK_BYTES, dtype=torch.uint8, device=device)


class _Allocations(_Layer):
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
        sample.weights = weights_in(self.layer.parameters())
        self.clear()
        self.backward(call(self.leaf()))
        self.o = self._inputs()
        self._plain()
        self._keep()
        self._rebuild()
        self.drop()

    def _note(self, what: str, function: Callable[[], object]) -> None:
        took = footprint(function, self.device)
        if took.events:  # those after the mark; before it is made what `function` releases later
            sizes = [size for _, size in took.events]
            events = tuple(sizes[sizes.index(-MARK_BYTES) + 1 :])
        else:
            events = (took.peak_bytes, took.kept_bytes - took.peak_bytes)
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

    def _plain(self) -> None:
        """Without autograd, O held to the end."""
        held: list[Tensor] = []
        frame = Frame(attended=lambda out, lse: held.extend((out, lse)))

        def run() -> None:
            _mark(self.device)
            with torch.no_grad(), frame.active():
                held.append(self.call(self.x))

        self._note("forward", run)

    def _keep(self) -> None:
        """With autograd, after another layer whose output nobody else holds; then its backward."""
        above: list[Tensor] = []

        def forward() -> None:
            below = [self.call(self.leaf())]
            _mark(self.device)
            above.append(self.call(below.pop()))

        def backward() -> None:
            self.clear()
            y = self.call(self.leaf())
            _mark(self.device)
            self.backward(y)

        self._note("keep forward", forward)
        above.clear()
        self._note("keep backward", backward)

    def _rebuild(self) -> None:
        """With autograd, O given, the way the executor does it: output and its gradient are held to the end."""
        dy = torch.ones_like(self.x)
        x = self.leaf()
        routed = [self.linears[name] for name in self.hollow & self.linears.keys()]
        for linear in routed:
            route_linear(linear, HOLLOW)

        def run() -> None:
            self.clear()
            given = [KnownRows(self.o[0].clone(), self.o[1].clone(), first=0)] if self.o is not None else []
            frame = Frame(known=given.pop if given else None, hollow=self.hollow)
            _mark(self.device)
            with frame.active():
                y = self.call(x)
            del frame
            self.backward(y, dy)

        try:
            self._note("rebuild", run)
        finally:
            for linear in routed:
                del linear.forward


class _Seconds(_Layer):
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


class _Arrival(torch.autograd.Function):
    """Stands for all layers: its output needs a gradient, as theirs does even over a frozen embedding, and nobody holds
    it; marks the moment the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        del anchor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        _mark(dx.device)
        return dx, None


def _head_allocations(subject: Subject, sample: HeadSample, rows: int, tile: int) -> None:
    """The step without its layers, cut at two moments: rows arrive at the layers, their gradient comes back."""
    device = subject.embedding.weight.device
    held: list[Any] = []
    anchor = torch.empty(0, device=device, requires_grad=True)

    def arrive(call: Any, x: Tensor) -> Tensor:
        sample.x_bytes_per_row = x.nbytes / rows
        _mark(device)
        held.append(call)  # position embeddings live until the last layer's backward
        return _Arrival.apply(x, anchor)

    _head_run(subject, arrive, rows)
    clear_gradients(subject)
    held.clear()
    took = footprint(lambda: _head_run(subject, arrive, rows), device)
    events = [size for _, size in took.events]
    marks = [at for at, size in enumerate(events) if size == MARK_BYTES]
    if marks:
        assert len(marks) == 2, marks
        sample.held.append(Run(rows, tile, tuple(events[: marks[0]])))
        sample.work.append(Run(rows, tile, tuple(events[: marks[1]])))
    else:
        sample.held.append(Run(rows, tile, ()))
        sample.work.append(Run(rows, tile, (took.peak_bytes,)))
    sizes = {id(p): p.grad.nbytes for p in subject.model.parameters() if p.grad is not None}
    sizes |= {id(p): p.nbytes for p in _outside(subject)}
    inside = {id(p) for layer in subject.layers for p in layer.parameters()}
    sample.weights = weights_in(p for p in subject.model.parameters() if id(p) not in inside)
    sample.embedding_gradient_bytes = sizes.pop(id(subject.embedding.weight), 0)
    sample.gradient_bytes = sum(sizes.values())
    for p in subject.model.parameters():
        p.grad = None


def weights_in(parameters: Iterable[nn.Parameter]) -> Weights:
    """Count parameters, each once."""
    distinct = list({id(p): p for p in parameters}.values())
    trained = [p.numel() for p in distinct if p.requires_grad]
    return Weights(
        bytes=sum(p.nbytes for p in distinct),
        parameters=sum(p.numel() for p in distinct),
        trained=sum(trained),
        largest=max(trained, default=0),
    )


def clear_gradients(subject: Subject) -> None:
    """Gradients of what is outside the layers, as they are before its backward."""
    for p in _outside(subject):
        p.grad = torch.zeros_like(p) if subject.gradients == "added" else None


def _outside(subject: Subject) -> list[nn.Parameter]:
    inside = {id(p) for layer in subject.layers for p in layer.parameters()}
    return [p for p in subject.model.parameters() if p.requires_grad and id(p) not in inside]


def _head_run(subject: Subject, arrive: Callable[[Any, Tensor], Tensor], rows: int) -> None:
    hooks = []
    if subject.gradients == "handed on":
        hooks = [p.register_post_accumulate_grad_hook(_hand_on) for p in _outside(subject)]
    try:
        with hooked(subject.layers, {0: arrive}):
            subject.step(rows).backward()
    finally:
        for hook in hooks:
            hook.remove()


def _head_seconds(subject: Subject, rows: int) -> float:
    clear_gradients(subject)

    anchor = torch.empty(0, device=subject.embedding.weight.device, requires_grad=True)

    def arrive(_: Any, x: Tensor) -> Tensor:
        return _Arrival.apply(x, anchor)

    seconds = fastest_s(lambda: _head_run(subject, arrive, rows), subject.embedding.weight.device, repeats=2)
    for p in subject.model.parameters():
        p.grad = None
    return seconds


def _seconds(timed: dict[int, dict[str, float]], value: Callable[[dict[str, float]], float]) -> Amount:
    """The line through what two lengths took; where noise makes it fall, the longer one's seconds per row."""
    (low, low_s), (high, high_s) = ((rows, max(0.0, value(timed[rows]))) for rows in TIMED_ROWS)
    slope = (high_s - low_s) / (high - low)
    constant = low_s - slope * low
    if slope <= 0 or constant < 0:
        return Amount(per_row=high_s / high)
    return Amount(constant=constant, per_row=slope)


def _booked(gradients: Gradients, size_bytes: int) -> Size:
    """Gradients that stay are booked apart, as if all had been there from the start of the layer's backward."""
    return Size(constant=float(size_bytes if gradients == "first" else 0))


def _kind(name: str, sample: LayerSample, gradients: Gradients, mlp_tile: int | None) -> KindProfile:
    tile, runs, timed = mlp_tile or 0, sample.runs, sample.timed
    keep = fit_end(runs["keep forward"], tile_rows=tile)
    kept = Size(keep.constant, keep.per_row, keep.per_tile_row)
    booked = _booked(gradients, sample.gradient_bytes)
    dy = Size(per_row=-sample.x_bytes_per_row)
    linears = [key.removeprefix("linear ") for key in timed[TIMED_ROWS[0]] if key.startswith("linear ")]

    def forward_s(s: dict[str, float]) -> float:
        return s["forward"] - s.get("attention forward", 0.0)

    def matmul_s(s: dict[str, float]) -> float:
        return sum(s[f"linear {linear}"] for linear in linears)

    return KindProfile(
        name=name,
        x_bytes_per_row=sample.x_bytes_per_row,
        attention=_attention(sample) if sample.o_bytes_per_row else None,
        linear=tuple(
            LinearProfile(
                name=linear,
                bytes_per_row=sample.linear_bytes_per_row.get(linear, sample.x_bytes_per_row),
                matmul_s=_seconds(timed, lambda s, linear=linear: s[f"linear {linear}"]),  # type: ignore[misc]
                inner_only=linear in (HOLLOW, TILED_MLP),
            )
            for linear in linears
        ),
        keep_bytes=keep,
        forward_s=_seconds(timed, forward_s),
        backward_s=_seconds(timed, lambda s: s["backward"] - s.get("attention backward", 0.0)),
        elementwise_s=_seconds(timed, lambda s: forward_s(s) - matmul_s(s)),
        forward_peak=fit_peak("forward", runs["forward"], tile_rows=tile),
        keep_forward_peak=fit_peak("forward", runs["keep forward"], kept, tile_rows=tile),
        rebuild_peak=fit_peak("rebuild and backward", runs["rebuild"], booked.plus(dy), tile_rows=tile),
        keep_backward_peak=fit_peak("backward", runs["keep backward"], booked, tile_rows=tile),
        gradient_bytes=sample.gradient_bytes if gradients != "handed on" else 0,
        weights=sample.weights,
    )


def _attention(sample: LayerSample) -> AttentionProfile:
    times = []
    for rows, seconds in sample.timed.items():
        if "attention forward" in seconds:
            seen = int(seconds["rows of attention"])
            pairs = attended_pairs(seen, sample.window)
            forward_s, backward_s = seconds["attention forward"] / pairs, seconds["attention backward"] / pairs
            times.append(PairTime(rows=seen, forward_s=forward_s, backward_s=backward_s))
        assert rows in TIMED_ROWS
    return AttentionProfile(window=sample.window, pair_times=tuple(times), o_bytes_per_row=sample.o_bytes_per_row)


def _head(sample: HeadSample, gradients: Gradients, loss_tile: int) -> HeadProfile:
    x = Size(per_row=sample.x_bytes_per_row)
    held = fit_end(sample.held, tile_rows=0)
    beside = Size(held.constant, held.per_row).plus(x, -1)
    low, high = TIMED_ROWS
    slope = max(0.0, (sample.timed[high] - sample.timed[low]) / (high - low))
    return HeadProfile(
        held_bytes=Amount(constant=beside.constant, per_row=beside.per_row),
        forward_s=Amount(constant=max(0.0, sample.timed[low] - slope * low), per_row=slope),
        peak=fit_peak("loss", sample.work, beside.plus(_booked(gradients, sample.gradient_bytes)), tile_rows=loss_tile),
        gradient_bytes=sample.gradient_bytes if gradients != "handed on" else 0,
        embedding_gradient_bytes=sample.embedding_gradient_bytes,
        weights=sample.weights,
    )
