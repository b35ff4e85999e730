"""A frozen model with a network beside it (UniPT), counted: its layers run without autograd and store nothing.

What grows with the layers is what the network keeps of each: rows of its own width D and, where it says so, the layer's
output. In backward the model runs a second time, or not at all; no gradient passes through it. Where ranks share a
sequence each merges a share of the layers over all rows, which is as much as all layers over its own rows.

d hidden, D width of the network.
"""

from __future__ import annotations

from farspan.memory.hardware import Hardware
from farspan.memory.problem import SavedTensor
from farspan.memory.profile import Amount, AttentionProfile, KindProfile, Moment, PairTime, Peak
from farspan.memory.shape import WIDTH_BYTES, AdapterShape, ModelShape, Training

FP32 = 4


def beside(
    kind: KindProfile, shape: ModelShape, training: Training, hardware: Hardware, *, gradient_bytes: int
) -> KindProfile:
    """The profile of a frozen layer, with the network's share of work and bytes.

    Args:
        kind: the layer without anything that is trained.
        gradient_bytes: of what the network trains for the layer, where gradients stay.
    """
    adapter = training.adapter
    assert adapter is not None and kind.attention is not None
    flop_per_s = hardware.matmul_flop_per_s[training.precision]
    twice = not adapter.stores_inputs
    down_s = 2 * shape.hidden * adapter.rank / flop_per_s
    moved = 2 * 2 * adapter.rank * training.width_bytes * (training.sp - 1) / training.sp
    exchange_s = moved / hardware.all_to_all_bytes_per_s
    forward_s = _plus(kind.forward_s, down_s + exchange_s)
    tensors = kept_tensors(shape, training, adapter)
    keep = Amount(per_row=sum(tensor.bytes_per_row for tensor in tensors))
    first = Moment(what="gradient of the first matrix", bytes=Amount(constant=_gradient_bytes(shape, training)))
    backward_peak = Peak(moments=(*kind.forward_peak.moments, first)) if twice else Peak(moments=(first,))
    return kind.model_copy(
        update={
            "attention": _attention(kind.attention, training, hardware, twice=twice),
            "linear": (),
            "keep_bytes": keep,
            "forward_s": forward_s,
            "backward_s": _plus(kind.forward_s if twice else Amount(), down_s + exchange_s),
            "keep_forward_peak": kind.forward_peak,
            "rebuild_peak": backward_peak,
            "keep_backward_peak": backward_peak,
            "gradient_bytes": gradient_bytes,
            "on_host": None,
            "saved": tensors,
        }
    )


def kept_tensors(shape: ModelShape, training: Training, adapter: AdapterShape) -> tuple[SavedTensor, ...]:
    """What `trainer.adapters.unipt` keeps of each layer but the last, largest first: input, output, merge and running
    mean of a norm's rows; its mean and root, the merge's divisor, and the layer's share, in fp32 and rounded."""
    e = training.width_bytes
    rows = {
        "output of the layer": float(e * shape.hidden) if adapter.stores_inputs else 0.0,
        "rows of the side network": 4.0 * e * adapter.rank,
        "sums of the side network": 2.0 * e + 2 * FP32 + (e if e < FP32 else 0),
    }
    found = (SavedTensor(name=n, kept_by=("side network",), bytes_per_row=size) for n, size in rows.items() if size)
    return tuple(sorted(found, key=lambda tensor: -tensor.bytes_per_row))


def _gradient_bytes(shape: ModelShape, training: Training) -> float:
    assert training.adapter is not None
    return float(WIDTH_BYTES[training.precision] * shape.hidden * training.adapter.rank)


def _attention(attention: AttentionProfile, training: Training, hardware: Hardware, *, twice: bool) -> AttentionProfile:
    """Two matmuls of width D for each pair in the merge's forward and five in its backward, beside attention's own."""
    assert training.adapter is not None
    flop = 2 * training.adapter.rank / training.sp
    rates = {rate.rows: rate for rate in hardware.attention[training.precision]}
    times = (
        PairTime(
            rows=known.rows,
            forward_s=known.forward_s + 2 * flop / rates[known.rows].forward_flop_per_s,
            backward_s=known.forward_s * twice + 5 * flop / rates[known.rows].backward_flop_per_s,
        )
        for known in attention.pair_times
    )
    return attention.model_copy(update={"pair_times": tuple(times)})


def _plus(amount: Amount, per_row: float) -> Amount:
    return amount.model_copy(update={"per_row": amount.per_row + per_row})
