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

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from farspan.kernels.attention_backends.packing import in_small_parts
from farspan.memory.allocations import fastest_s, footprint
from farspan.memory.measure_layer import LayerAllocations, LayerSeconds, probe
from farspan.memory.moments import SETTINGS, Run
from farspan.memory.profile import Profile, Source
from farspan.memory.samples import (
    MARK_BYTES,
    TIMED_ROWS,
    HeadSample,
    LayerSample,
    Subject,
    hand_on,
    head_profile,
    layer_profile,
    mark,
    weights_in,
)
from farspan.memory.single_layers import hooked


def measure_profile(subject: Subject, names: list[str], *, loss_tile: int, mlp_tile: int | None, sp: int) -> Profile:
    """Profile a model. Its gradients are cleared; times of exchanges and of the optimizer are left at 0.

    Args:
        names: kind of each layer; layers of one kind cost the same.
        loss_tile, mlp_tile: rows of a tile in training.
        sp: ranks that will share a sequence; `step` must run one of them.
    """
    device = subject.embedding.weight.device
    timed_rows = TIMED_ROWS[device.type]
    first = {name: names.index(name) for name in dict.fromkeys(names)}
    layers = {name: LayerSample() for name in first}
    head = HeadSample()
    footprint(lambda: None, device)  # starts the profiler
    try:
        for rows, tile in SETTINGS:
            for name, index in first.items():
                times = _windows_shown(subject.layers[index])
                subject.set_tile(times * tile)
                run = partial(LayerAllocations, subject, index, layers[name], times * rows, times * tile)
                with in_small_parts():
                    probe(subject, index, times * rows, run)
            subject.set_tile(tile)
            _head_allocations(subject, head, rows, tile)
        subject.set_tile(None)
        for rows in timed_rows:
            for name, index in first.items():
                probe(subject, index, rows, partial(LayerSeconds, subject, index, layers[name], rows))
            head.timed[rows] = _head_seconds(subject, rows)
    finally:
        subject.set_tile(None)
    return Profile(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch_version=torch.__version__,
        sp=sp,
        mlp_tile=mlp_tile,
        layers=tuple(names),
        kinds=tuple(layer_profile(name, sample, subject.gradients, mlp_tile) for name, sample in layers.items()),
        head=head_profile(head, subject.gradients, loss_tile),
        sources={
            part: Source(how="measured", what=what)
            for part, what in {
                "bytes": f"one layer of each kind at {' and '.join(str(rows) for rows, _ in SETTINGS)} rows",
                **dict.fromkeys(("matmul", "attention", "elementwise"), f"at {timed_rows[0]} and {timed_rows[1]} rows"),
            }.items()
        },
    )


def _windows_shown(layer: nn.Module) -> int:
    """How many times longer runs must be for a sliding window to be narrower than half of them."""
    window = getattr(getattr(layer, "self_attn", None), "sliding_window", None) or 0
    return max(1, -(-9 * window // (4 * SETTINGS[0][0])))


class _Arrival(torch.autograd.Function):
    """Stands for all layers: its output needs a gradient, as theirs does even over a frozen embedding, and nobody holds
    it; marks the moment the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        del anchor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        mark(dx.device)
        return dx, None


def _head_allocations(subject: Subject, sample: HeadSample, rows: int, tile: int) -> None:
    """The step without its layers, cut at two moments: rows arrive at the layers, their gradient comes back."""
    device = subject.embedding.weight.device
    held: list[Any] = []
    anchor = torch.empty(0, device=device, requires_grad=True)

    def arrive(call: Any, x: Tensor) -> Tensor:
        sample.x_bytes_per_row = x.nbytes / rows
        mark(device)
        held.append(call)  # position embeddings live until the last layer's backward
        return _Arrival.apply(x, anchor)

    _head_run(subject, arrive, rows)
    _clear_gradients(subject)
    held.clear()
    took = footprint(lambda: _head_run(subject, arrive, rows), device)
    events = [size for _, size in took.events]
    arrived, returned = [at for at, size in enumerate(events) if size == MARK_BYTES]
    sample.held.append(Run(rows, tile, tuple(events[:arrived])))
    sample.work.append(Run(rows, tile, tuple(events[:returned])))
    sizes = {id(p): p.grad.nbytes for p in subject.model.parameters() if p.grad is not None}
    sizes |= {id(p): p.nbytes for p in _outside(subject)}
    inside = {id(p) for layer in subject.layers for p in layer.parameters()}
    sample.weights = weights_in((p for p in subject.model.parameters() if id(p) not in inside), inside=False)
    sample.embedding_gradient_bytes = sizes.pop(id(subject.embedding.weight), 0)
    sample.gradient_bytes = sum(sizes.values())
    for p in subject.model.parameters():
        p.grad = None


def _clear_gradients(subject: Subject) -> None:
    """Gradients of what is outside the layers, as they are before its backward."""
    for p in _outside(subject):
        p.grad = torch.zeros_like(p) if subject.gradients == "added" else None


def _outside(subject: Subject) -> list[nn.Parameter]:
    inside = {id(p) for layer in subject.layers for p in layer.parameters()}
    return [p for p in subject.model.parameters() if p.requires_grad and id(p) not in inside]


def _head_run(subject: Subject, arrive: Callable[[Any, Tensor], Tensor], rows: int) -> None:
    hooks = []
    if subject.gradients == "handed on":
        hooks = [p.register_post_accumulate_grad_hook(hand_on) for p in _outside(subject)]
    try:
        with hooked(subject.layers, {0: arrive}):
            subject.step(rows).backward()
    finally:
        for hook in hooks:
            hook.remove()


def _head_seconds(subject: Subject, rows: int) -> float:
    _clear_gradients(subject)
    anchor = torch.empty(0, device=subject.embedding.weight.device, requires_grad=True)

    def arrive(_: Any, x: Tensor) -> Tensor:
        return _Arrival.apply(x, anchor)

    seconds = fastest_s(lambda: _head_run(subject, arrive, rows), subject.embedding.weight.device, repeats=2)
    for p in subject.model.parameters():
        p.grad = None
    return seconds
