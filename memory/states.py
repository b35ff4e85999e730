"""What is in memory through the whole step, whatever the activations do: weights, gradients, optimizer, buffers.

Counted per rank and tier from how the engines are written (`trainer.engine_plain`, `trainer.engine_deepspeed`) and,
behind the latter, DeepSpeed 0.19's optimizer classes. Gradients that exist only between a layer's backward and the
optimizer step are not states: `gradient_width` says how wide they are, and they are booked with the layer. Buffers of
the all-to-alls are made and freed within a layer and therefore belong to its peaks; only what the communication library
itself holds is a state.
"""

from __future__ import annotations

import math

from farspan.memory.hardware import Hardware
from farspan.memory.optimizers import (
    FP32,
    MOMENTS,
    SENT_ELEMENTS,
    largest_elements,
    rank_bytes,
    step_flop,
    workspace_bytes,
)
from farspan.memory.plan import Tier
from farspan.memory.problem import State
from farspan.memory.shape import ModelShape, Training, Weights

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed reduces so many gradients at once, or twice the trained weights if that is less."""
LIVE_ELEMENTS = 1_000_000_000
"""ZeRO-3 gathers weights ahead and keeps those soon used again, up to so many (DeepSpeed's default)."""


def gradient_width(training: Training) -> int:
    """Bytes per trained weight of gradients that stay on the device from backward to the optimizer step, in no buffer.

    Plain engine: only one rank's fp32 parameters keep the gradient autograd makes; all others are moved to the flat
    buffer at once, or used at once by an optimizer in backward. ZeRO 1 reduces after backward: whole gradients stay,
    in bf16 as they come, in fp32 when their accumulator is (offload) or the model is fp32. ZeRO 2 and 3 reduce
    through buckets while backward runs.
    """
    if training.zero == 0:
        width = training.adapter_width_bytes
        stays = width == FP32 and training.world_size == 1 and not training.optimizer.in_backward
        return FP32 if stays else 0
    if training.zero > 1:
        return 0
    return FP32 if training.cpu_offload else training.width_bytes


def model_states(training: Training, hardware: Hardware, weights: Weights) -> tuple[State, ...]:
    """All states of one rank with any bytes, largest first on each tier."""
    found: list[tuple[str, Tier, int]] = [
        ("context", "device", hardware.context_bytes),
        ("collectives", "device", hardware.collective_bytes if training.world_size > 1 else 0),
        *(_plain(training, hardware, weights) if training.zero == 0 else _zero(training, hardware, weights)),
    ]
    states = [State(name=name, tier=tier, bytes=size) for name, tier, size in found if size]
    return tuple(sorted(states, key=lambda state: -state.bytes))


def weights_of(shape: ModelShape, training: Training) -> Weights:
    """The model in its dtype, adapters in theirs; whole."""
    trained = training.trained(shape)
    largest = shape.vocab * shape.hidden if training.trains("embed_tokens") else shape.hidden * shape.ffn
    whole = shape.parameters * training.width_bytes
    if training.base is not None:
        for name, (inputs, outputs) in shape.linears().items():
            if training.base.type == "integers" and not training.adapts(name):
                continue
            whole += shape.layers * (training.base.bytes(inputs, outputs) - inputs * outputs * training.width_bytes)
    width = training.coupling.width if training.coupling is not None else 0
    beside = 2 * shape.hidden * width * shape.layers
    whole += beside * training.width_bytes
    parameters = shape.parameters + beside
    tensors = training.tensors(shape)
    assert sum(t.count * math.prod(t.shape) for t in tensors) == trained
    if training.adapter is None:
        return Weights(bytes=whole, parameters=parameters, trained=trained, largest=largest, tensors=tensors)
    adapters = shape.layers * training.trained_in_layer(shape) - beside
    if training.adapter.start:
        adapters *= 2
    copies = sum(training.trained_outside(shape))  # peft trains a copy of a module it saves and keeps the original
    size = whole + copies * training.width_bytes + adapters * training.adapter_width_bytes
    return Weights(bytes=size, parameters=parameters, trained=trained, largest=largest, tensors=tensors)


def _plain(training: Training, hardware: Hardware, weights: Weights) -> list[tuple[str, Tier, int]]:
    """`PlainEngine`. A flat fp32 buffer takes the gradients with several ranks or in bf16; masters are apart from the
    weights only in bf16. AdamW has all of it on every rank, other optimizers masters and state of what a rank owns.

    An optimizer in backward has no flat buffer, but takes its steps beside a layer's backward: what one of them needs
    is booked as if it were always there.
    """
    optimizer, trained, world = training.optimizer, weights.trained, training.world_size
    narrow = training.adapter_width_bytes < FP32
    own, state = trained, MOMENTS * FP32 * trained
    if optimizer.owned:
        own, state = rank_bytes(optimizer, weights.tensors, world)
    buffered = (narrow or world > 1) and not optimizer.in_backward
    return [
        ("weights", "device", weights.bytes),
        ("gradients", "device", FP32 * trained * buffered),
        ("masters", "device", FP32 * own * narrow),
        ("moments", "device", state),
        ("step in backward", "device", _in_backward_bytes(training, hardware, weights)),
    ]


def _in_backward_bytes(training: Training, hardware: Hardware, weights: Weights) -> int:
    """Of one step while backward runs: the fp32 copy of a gradient in bf16, and what the optimizer takes."""
    if not training.optimizer.in_backward:
        return 0
    width = training.adapter_width_bytes
    copied = FP32 * largest_elements(weights.tensors) * (width < FP32)
    return copied + workspace_bytes(training.optimizer, weights.tensors, width=width, device=hardware.device_type)


def bucket_elements(trained: int) -> int:
    """`reduce_bucket_size` as `trainer.engine_deepspeed` sets it."""
    return min(BUCKET_ELEMENTS, max(2 * trained, 1024) // 2 * 2)


def _zero(training: Training, hardware: Hardware, weights: Weights) -> list[tuple[str, Tier, int]]:
    """DeepSpeed: masters and moments of a rank's share; at stage 3 weights too.

    Stage 1, bf16, on the device (`BF16_Optimizer`): one flat fp32 buffer for the gradients of all. Otherwise stages 1
    and 2 (`DeepSpeedZeroOptimizer`): a bucket while backward runs; at stage 2, which reduces then, a flattened copy of
    what is in it, another for the wire if these are not fp32, and the reduced fp32 gradients of the share. Stage 3: an
    fp32 bucket with the padded input of its reduce-scatter, gradients of the share, and the weights gathered.
    """
    e, world, trained = training.width_bytes, training.world_size, weights.trained
    share, offload = -(-trained // world), training.cpu_offload
    home: Tier = "host" if offload else "device"
    # page-locked memory comes in powers of two from torch's allocator
    pinned = offload and hardware.device_type == "cuda"
    reduced: tuple[str, Tier, int] = ("gradients", home, _pinned(FP32 * share, pinned))
    bucket = bucket_elements(trained)
    sharded: list[tuple[str, Tier, int]] = [
        ("masters", home, _pinned(FP32 * share, pinned)),
        ("moments", home, MOMENTS * FP32 * share),
    ]
    if training.zero == 3:
        return [
            ("weights", "device", -(-weights.bytes // world)),
            ("gathered weights", "device", min(weights.parameters, LIVE_ELEMENTS) * e if world > 1 else 0),
            *sharded,
            reduced,
            ("gradient bucket", "device", FP32 * (bucket + min(bucket, trained))),
        ]
    sharded.insert(0, ("weights", "device", weights.bytes))
    if offload:
        largest = weights.largest
        sharded += [
            ("rounded weights", home, _pinned(e * share, pinned)),
            ("staging", home, _pinned(e * largest, pinned)),
            ("gradient staging", "device", e * largest),
        ]
    if training.zero == 2:
        copies = e + (FP32 if e < FP32 else 0)
        staged = e * bucket + copies * min(bucket, trained)
        return [*sharded, reduced, ("gradient bucket", "device", staged)]
    if e < FP32 and not offload:
        return [*sharded, ("gradients", "device", FP32 * trained)]
    return [*sharded, *[reduced] * offload, ("gradient bucket", "device", FP32 * bucket)]


def _pinned(size_bytes: int, pinned: bool) -> int:
    return 1 << (size_bytes - 1).bit_length() if pinned and size_bytes else size_bytes


def step_peak_bytes(training: Training, hardware: Hardware, weights: Weights) -> int:
    """Optimizer step beyond states and staying gradients: what the update of a tensor takes, or the weights that owners
    send, at ZeRO 0; nothing at stage 3; a copy of the share's fp32 gradients at stages 1 and 2; stage 1 in bf16 reduces
    in buckets, copied twice."""
    trained = weights.trained
    if training.zero == 0 and training.optimizer.owned:
        width = training.adapter_width_bytes
        works = workspace_bytes(training.optimizer, weights.tensors, width=width, device=hardware.device_type)
        return max(
            0 if training.optimizer.in_backward else works,
            width * min(SENT_ELEMENTS + largest_elements(weights.tensors), trained) if training.world_size > 1 else 0,
        )
    if training.zero == 1 and training.width_bytes < FP32 and not training.cpu_offload:
        return 2 * FP32 * min(bucket_elements(trained), trained)
    return -(-FP32 * trained // training.world_size) if training.zero in (1, 2) else 0


def optimizer_s(training: Training, hardware: Hardware, weights: Weights) -> float:
    """One step: gradients summed over ranks, norm and clipping, the update, weights written (and gathered again).

    By bytes: AdamW reads gradient, master and moments and writes the last three and the weight; norm and clipping read
    the gradient twice and write it once. Other optimizers read and write their own state, and products of matrices take
    their time. The sum over ranks moves 2 (world - 1) / world of fp32 gradients per rank; owners send their weights.
    """
    e, world, trained = training.width_bytes, training.world_size, weights.trained
    own = trained if training.zero == 0 else -(-trained // world)
    moved = own * (4 * FP32 + 3 * FP32 + e + 3 * FP32)
    seconds, sent = 0.0, 2 * (world - 1) / world * FP32 * trained
    if training.optimizer.owned:
        own, state = rank_bytes(training.optimizer, weights.tensors, world)
        moved = 3 * FP32 * trained + own * (3 * FP32 + e) + 2 * state
        seconds = (
            step_flop(training.optimizer, weights.tensors) / world / hardware.matmul_flop_per_s[training.precision]
        )
        sent += e * trained * (world > 1)
    seconds += moved / (hardware.host_memory_bytes_per_s if training.cpu_offload else hardware.memory_bytes_per_s)
    if training.cpu_offload:
        seconds += own * FP32 / hardware.copy_out_bytes_per_s + own * e / hardware.copy_in_bytes_per_s
    return seconds + sent / hardware.all_to_all_bytes_per_s
