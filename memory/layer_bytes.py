"""Bytes of one decoder layer: what autograd keeps, the peaks, and what elementwise work reads and writes.

`today` reads them off a run of an unmodified transformers layer, operator by operator. `tiled` counts what has to exist
when norms and SwiGLU are single kernels that keep their inputs alone, the MLP goes by row tiles and attention by
groups of heads that share a KV head: 92 KiB kept per token and 46 in use, x included, at the 8B width, against 196
and 276.
"""

from __future__ import annotations

from dataclasses import dataclass

from farspan.memory.layer_backward import LayerRun
from farspan.memory.layer_forward import FP32, Device
from farspan.memory.liveness import Size, peak
from farspan.memory.problem import SavedTensor
from farspan.memory.profile import Amount, OnHostProfile, Peak
from farspan.memory.shape import ModelShape, Training

TILE_ROWS = 2048
"""Rows of a tile of the MLP where the job names none."""


@dataclass(frozen=True)
class LayerBytes:
    """The byte fields of a `KindProfile`, and bytes per row through memory."""

    keep: Amount
    forward_peak: Peak
    keep_forward_peak: Peak
    rebuild_peak: Peak
    keep_backward_peak: Peak
    forward_traffic: float
    backward_traffic: float
    saved: tuple[SavedTensor, ...] = ()
    on_host: OnHostProfile | None = None
    """With O in the peak of its rebuild, as in `rebuild_peak`."""


def today(shape: ModelShape, training: Training, device: Device, *, lone_gradients: bool) -> LayerBytes:
    """An unmodified layer. `lone_gradients`: see `LayerForward`."""
    tile = training.mlp_tile or 0
    x = Size(per_row=float(training.width_bytes * shape.hidden))
    # gradients that stay are booked with the layer as if all had been there from the start
    booked = Size()
    if training.trains("layers") and not lone_gradients:
        booked = Size(constant=float(training.width_bytes * sum(i * o for i, o in shape.linears().values())))

    plain = LayerRun(shape, training, device, grad=False)
    plain.forward()

    kept = LayerRun(shape, training, device, grad=True, lone_gradients=lone_gradients)
    kept.forward()
    without_x = kept.saved()
    keep = without_x.plus(x if "x" in kept.saves else Size())
    saved = _saved(kept, x)
    kept_forward, forward_traffic = kept.moments, kept.traffic
    # the output lives on as the next layer's input, which is booked there
    kept.moments = []
    kept.drop("y")
    kept.make("dy", x.per_row)
    kept.backward()

    rebuilt = LayerRun(shape, training, device, grad=True, lone_gradients=lone_gradients, rebuild=True)
    rebuilt.make("dy", x.per_row)
    rebuilt.forward()
    rebuilt.drop("y")
    rebuilt.backward()

    return LayerBytes(
        keep=keep.amount(tile),
        forward_peak=peak(plain.moments, Size(), tile),
        keep_forward_peak=peak(kept_forward, keep, tile),
        rebuild_peak=peak(rebuilt.moments, booked, tile),
        keep_backward_peak=peak(kept.moments, without_x.plus(booked), tile),
        forward_traffic=plain.traffic,
        backward_traffic=kept.traffic - forward_traffic,
        saved=saved,
        on_host=_on_host(shape, training, device, lone_gradients=lone_gradients, booked=booked),
    )


def _saved(kept: LayerRun, x: Size) -> tuple[SavedTensor, ...]:
    """Tensors that a layer's autograd keeps, largest first."""
    sizes = {name: x if name == "x" else kept.sizes[name] for name in kept.saves}
    found = (
        SavedTensor(name=name, kept_by=tuple(kept.kept_by[name]), bytes_per_row=size.per_row + size.per_tile_row)
        for name, size in sizes.items()
    )
    return tuple(sorted(found, key=lambda tensor: -tensor.bytes_per_row))


def _on_host(
    shape: ModelShape, training: Training, device: Device, *, lone_gradients: bool, booked: Size
) -> OnHostProfile:
    """The same with saved tensors on the host."""
    tile = training.mlp_tile or 0
    x = Size(per_row=float(training.width_bytes * shape.hidden))

    kept = LayerRun(shape, training, device, grad=True, lone_gradients=lone_gradients, saves_on_host=True)
    kept.forward()
    forward = kept.moments
    kept.moments = []
    kept.drop("y")
    keep = kept.total
    kept.hand_over("x", x)
    kept.make("dy", x.per_row)
    kept.backward()

    rebuilt = LayerRun(
        shape, training, device, grad=True, lone_gradients=lone_gradients, rebuild=True, saves_on_host=True
    )
    rebuilt.make("dy", x.per_row)
    rebuilt.forward()
    rebuilt.drop("y", "o", "lse")
    rebuilt.backward()

    return OnHostProfile(
        keep_bytes=keep.amount(tile),
        keep_forward_peak=peak(forward, keep, tile),
        keep_backward_peak=peak(kept.moments, keep.plus(booked), tile),
        rebuild_peak=peak(rebuilt.moments, booked, tile),
        keep_host_bytes=kept.host.amount(tile),
        keep_fetched_bytes=kept.fetched.amount(tile),
        rebuild_host_bytes=rebuilt.host.amount(tile),
        rebuild_fetched_bytes=rebuilt.fetched.amount(tile),
    )


def tiled(shape: ModelShape, training: Training) -> LayerBytes:
    """A layer of fused kernels, MLP in tiles, attention one group of heads at a time."""
    e, d, f, q, kv = training.width_bytes, shape.hidden, shape.ffn, shape.q_width, shape.kv_width
    groups, tile = shape.kv_heads, training.mlp_tile or TILE_ROWS
    x, lse = e * d, FP32 * shape.heads
    o = e * q + lse
    low = 0.0
    if training.adapter is not None:
        adapted = sum(training.adapts(name) for name in shape.linears())
        low = float(training.adapter_width_bytes * training.adapter.rank * adapted)
    # x, q, k, v, O, h, gate, up: norms and the product are made again from these, and so are the inputs of adapters
    keep = Size(per_row=x + e * (q + 2 * kv) + o + x + 2 * e * f + low)
    group = e * (q + 2 * kv) / groups
    # of one group: q, k, v with their gradients, the gradient of O, and dq added up in fp32
    group_backward = (e * (3 * q + 4 * kv) + FP32 * q) / groups + lse
    mlp_tile, mlp_tile_backward = float(e * (3 * f + d)), float(e * (5 * f + 2 * d))

    def of(*moments: tuple[str, Size]) -> Peak:
        return peak(list(moments), Size(), tile)

    return LayerBytes(
        keep=keep.amount(tile),
        forward_peak=of(
            ("attention forward", Size(per_row=o + group, per_tile_row=float(x))),
            ("MLP forward", Size(per_row=o + 2 * x, per_tile_row=mlp_tile)),
        ),
        keep_forward_peak=of(("MLP forward", Size(per_row=0.0, per_tile_row=float(e * (f + d))))),
        rebuild_peak=of(
            ("MLP backward", Size(per_row=2 * x + o, per_tile_row=mlp_tile_backward)),
            # gradients of output, of h, and of the normed input, which the groups add to
            ("attention backward", Size(per_row=3 * x + o + group_backward)),
        ),
        keep_backward_peak=of(
            ("MLP backward", Size(per_row=2.0 * x, per_tile_row=float(e * (3 * f + 2 * d)))),
            ("attention backward", Size(per_row=3 * x + group_backward - group)),
        ),
        # in and out of two norms, of the rotary embedding, of SwiGLU and of two additions
        forward_traffic=float(4 * x + 2 * e * (q + kv) + 3 * e * f + 6 * x),
        backward_traffic=float(8 * x + 2 * e * (q + kv) + 6 * e * f + 6 * x),
    )
