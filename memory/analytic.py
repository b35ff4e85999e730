"""A profile from shapes and rates alone, so that a plan needs neither the model nor the machine.

Bytes: `today` counts an unmodified transformers layer operator by operator, exact for the releases it was written for;
`tiled` is what fused kernels and head groups would leave (`layer_bytes`). Seconds: FLOP through the rates of the
hardware, elementwise work through its memory bandwidth, nothing overlapped. A measured profile replaces either.
"""

from __future__ import annotations

from typing import Literal

from farspan.errors import NoProfile
from farspan.memory.hardware import Hardware
from farspan.memory.layer_backward import LayerRun
from farspan.memory.layer_bytes import TILE_ROWS, tiled, today
from farspan.memory.layer_forward import FINAL_NORM, FP32, MLP, head_split
from farspan.memory.liveness import Size, peak
from farspan.memory.profile import (
    Amount,
    AttentionProfile,
    HeadProfile,
    KindProfile,
    LinearProfile,
    PairTime,
    Peak,
    Profile,
    Source,
)
from farspan.memory.shape import LayerForm, ModelShape, Training
from farspan.memory.side_network import beside
from farspan.memory.states import gradient_width, optimizer_s, step_peak_bytes, weights_of

WorkingSet = Literal["today", "tiled"]
COUNTED: dict[WorkingSet, str] = {
    "today": "unmodified transformers layers, counted operator by operator",
    "tiled": "fused norms and SwiGLU, MLP in row tiles, attention by groups of heads; these kernels do not exist yet",
}


def analytic_profile(
    shape: ModelShape, training: Training, hardware: Hardware, *, working_set: WorkingSet = "today"
) -> Profile:
    """Bytes and seconds of one rank.

    Args:
        working_set: `today` for unmodified layers, `tiled` for the fused kernels described in `layer_bytes`.

    Raises:
        NoProfile: the model has layers that are not counted (mixture of experts, linear attention).
        JobError: more ranks share a sequence than there are heads.
    """
    forms = {shape.form(layer).name: shape.form(layer) for layer in range(shape.layers)}
    for form in forms.values():
        _require_counted(form)
    if training.adapter is not None and (training.adapter.prompt or training.adapter.side):
        raise NoProfile(
            "layers with a prompt or side modules have no analytic profile",
            at="adapter.prompt" if training.adapter.prompt else "adapter.side",
            why="what their own operators take beside the layer's is not counted",
            try_="plan with a measured profile of this model",
        )
    if training.adapter is not None and training.adapter.dora:
        raise NoProfile(
            "layers with DoRA have no analytic profile",
            at="adapter.dora",
            why="it runs by peft's operators, which make each adapted matrix and its row lengths anew",
            try_="plan with a measured profile of this model",
        )
    head_split(shape, training.sp)
    return Profile(
        device=hardware.name,
        sp=training.sp,
        mlp_tile=training.mlp_tile if working_set == "today" else None,
        layers=tuple(shape.form(layer).name for layer in range(shape.layers)),
        kinds=tuple(_kind(shape, form, training, hardware, working_set) for form in forms.values()),
        head=_head(shape, training, hardware, working_set),
        sources={
            "bytes": Source(how="assumed", what=COUNTED[working_set]),
            "matmul": hardware.source("matmul_flop_per_s"),
            "attention": hardware.source("attention"),
            "elementwise": hardware.source("memory_bytes_per_s"),
            "exchange": hardware.source("all_to_all_bytes_per_s"),
            "optimizer": hardware.source(
                "host_memory_bytes_per_s" if training.cpu_offload else "memory_bytes_per_s", "all_to_all_bytes_per_s"
            ),
        },
    )


def _require_counted(form: LayerForm) -> None:
    if form.mixer == "attention" and form.experts == 1:
        return
    what = "linear attention" if form.mixer == "linear" else f"{form.experts} experts"
    raise NoProfile(
        f"a layer with {what} has no analytic profile",
        at="model",
        why="what such a layer keeps depends on its kernels and, with experts, on the routing; it has to be measured",
        try_="plan with a measured profile of this model",
    )


def _kind(
    shape: ModelShape, form: LayerForm, training: Training, hardware: Hardware, working_set: WorkingSet
) -> KindProfile:
    stays = gradient_width(training)
    if working_set == "today":
        lone = not stays or training.micro_batches > 1
        sizes = today(shape, training, hardware.device_type, lone_gradients=lone)
    else:
        sizes = tiled(shape, training)
    matmul_flop_per_s = hardware.matmul_flop_per_s[training.precision]
    mults = {name: i * o for name, (i, o) in shape.linears().items()}
    matmul_s = 2 * sum(mults.values()) / matmul_flop_per_s
    adapters_s, adapters_backward_s = _adapters_s(shape, training, hardware)
    elementwise_s = sizes.forward_traffic / hardware.memory_bytes_per_s + adapters_s
    exchange_s = exchange_amount(shape, training, hardware)
    # towards the input always, towards the weights where they are trained
    backward_s = matmul_s * (2 if training.trains("layers") else 1) + adapters_backward_s
    if working_set == "today" and training.mlp_tile is not None:
        backward_s += 2 * sum(m for name, m in mults.items() if name in MLP) / matmul_flop_per_s
    backward_s += sizes.backward_traffic / hardware.memory_bytes_per_s
    whole_s = _whole_s(shape, training, hardware)
    attention = _attention(shape, form, training, hardware)
    o_bytes = attention.o_bytes_per_row * training.sp
    on_host = sizes.on_host
    if on_host is not None:
        on_host = on_host.model_copy(update={"rebuild_peak": _without(on_host.rebuild_peak, o_bytes)})
    kind = KindProfile(
        name=form.name,
        x_bytes_per_row=training.width_bytes * shape.hidden,
        attention=attention,
        linear=_linear(shape, training, matmul_flop_per_s, working_set),
        keep_bytes=sizes.keep,
        forward_s=_more(exchange_s, matmul_s + elementwise_s, whole_s),
        backward_s=_more(exchange_s, backward_s, whole_s),
        elementwise_s=Amount(per_row=elementwise_s, constant=whole_s),
        exchange_s=exchange_s,
        forward_peak=sizes.forward_peak,
        keep_forward_peak=sizes.keep_forward_peak,
        rebuild_peak=_without(sizes.rebuild_peak, o_bytes),
        keep_backward_peak=sizes.keep_backward_peak,
        gradient_bytes=stays * training.trained_in_layer(shape) + training.proposed_in_layer(shape),
        on_host=on_host,
        saved=sizes.saved,
    )
    if training.adapter is None or training.adapter.kind != "network":
        return kind
    return beside(kind, shape, training, hardware, gradient_bytes=kind.gradient_bytes)


def _more(amount: Amount, per_row: float, constant: float) -> Amount:
    return amount.model_copy(update={"per_row": amount.per_row + per_row, "constant": amount.constant + constant})


def _whole_s(shape: ModelShape, training: Training, hardware: Hardware) -> float:
    """Making a layer's quantized matrices whole, once: read, looked up in fp32, scaled, rounded; those of learned steps
    are merged first."""
    if training.adapter is not None and training.adapter.kind == "learned":
        adapted = [(i, o) for name, (i, o) in shape.linears().items() if training.adapts(name)]
        passes = training.width_bytes * 2 + 10 * FP32  # W0 read, merged, placed, clipped, rounded, made whole
        low_rank_s = 2 * training.adapter.rank / hardware.matmul_flop_per_s["fp32"]
        return sum(i * o for i, o in adapted) * (passes / hardware.memory_bytes_per_s + low_rank_s)
    if training.base is None:
        return 0.0
    count = sum(i * o for i, o in shape.linears().values())
    stored = sum(training.base.bytes(i, o) for i, o in shape.linears().values())
    return (stored + count * (4 * FP32 + training.width_bytes)) / hardware.memory_bytes_per_s


def _without(peak: Peak, bytes_per_row: float) -> Peak:
    """A peak less what is held anyway."""
    moments = (
        moment.model_copy(
            update={"bytes": moment.bytes.model_copy(update={"per_row": moment.bytes.per_row - bytes_per_row})}
        )
        for moment in peak.moments
    )
    return Peak(moments=tuple(moments))


def _attention(shape: ModelShape, form: LayerForm, training: Training, hardware: Hardware) -> AttentionProfile:
    """Two matmuls forward and five backward for each attended pair and head; the busiest rank's heads."""
    heads = head_split(shape, training.sp).query
    flop = 2 * shape.head_dim * heads
    return AttentionProfile(
        window=form.window,
        pair_times=tuple(
            PairTime(
                rows=rate.rows,
                forward_s=2 * flop / rate.forward_flop_per_s,
                backward_s=5 * flop / rate.backward_flop_per_s,
            )
            for rate in hardware.attention[training.precision]
        ),
        o_bytes_per_row=heads * (training.width_bytes * shape.head_dim + FP32),
    )


def _linear(
    shape: ModelShape, training: Training, flop_per_s: float, working_set: WorkingSet
) -> tuple[LinearProfile, ...]:
    """Linear layers whose output can be stored. A tiled MLP of today is one: what is inside exists tile by tile."""
    adapter = training.adapter
    reads_output = adapter is not None and adapter.kind == "scales" and adapter.group is None
    last_is_inner = not shape.norm_after and not (reads_output and training.adapts("down_proj"))
    tile_rows = (training.mlp_tile or TILE_ROWS) if working_set == "tiled" else None
    whole = working_set == "tiled" or training.mlp_tile is None
    found = [
        LinearProfile(
            name=name,
            bytes_per_row=training.width_bytes * outputs,
            matmul_s=Amount(per_row=2 * inputs * outputs / flop_per_s),
            tile_rows=tile_rows,
            inner_only=name == "down_proj" and last_is_inner,
        )
        for name, (inputs, outputs) in shape.linears().items()
        if whole or name not in MLP
    ]
    if not whole:
        mults = sum(i * o for name, (i, o) in shape.linears().items() if name in MLP)
        found.append(
            LinearProfile(
                name="mlp",
                bytes_per_row=training.width_bytes * shape.hidden,
                matmul_s=Amount(per_row=2 * mults / flop_per_s),
                inner_only=last_is_inner,
            )
        )
    return tuple(found)


def _adapters_s(shape: ModelShape, training: Training, hardware: Hardware) -> tuple[float, float]:
    """Forward and backward matmuls of one layer's adapters, per row."""
    if training.adapter is None:
        return 0.0, 0.0
    inside = training.model_copy(update={"coupling": None})
    once_s = 2 * inside.trained_in_layer(shape) / hardware.matmul_flop_per_s[training.adapter_precision]
    if training.adapter.kind in ("learned", "codes"):
        weights = sum(i * o for name, (i, o) in shape.linears().items() if training.adapts(name))
        return 0.0, 2 * weights / hardware.matmul_flop_per_s[training.precision]
    if training.adapter.kind == "scales":
        weights = sum(i * o for name, (i, o) in shape.linears().items() if training.adapts(name))
        of_groups = 2 * weights / hardware.matmul_flop_per_s[training.precision]
        return 0.0, of_groups if training.adapter.group is not None else 0.0
    if training.adapter.kind in ("biases", "network"):
        return 0.0, 0.0
    return (0.0, once_s) if training.adapter.kind == "columns" else (once_s, 2 * once_s)


CODING_BYTES = 160
"""Memory traffic of an element that crosses ranks in codes, as torch encodes and decodes it, counted at 4 bits."""


def exchange_amount(
    shape: ModelShape,
    training: Training,
    hardware: Hardware,
    layer_bytes: int | None = None,
    *,
    with_coding: bool = True,
) -> Amount:
    """One forward's all-to-alls, and under ZeRO-3 the gathering of the layer's weights; compute hides nothing.

    Args:
        layer_bytes: of the layer's weights; None: as many as the shape has.
        with_coding: add the time that codes take, which a measured forward contains.
    """
    per_row = constant = 0.0
    if training.sp > 1:
        split = head_split(shape, training.sp)
        width = 2 * shape.q_width + 2 * split.kv_sent * shape.head_dim
        per_row = training.width_bytes * width * (training.sp - 1) / training.sp
    if training.zero == 3 and training.world_size > 1:
        others = (training.world_size - 1) / training.world_size
        constant = (training.width_bytes * shape.layer_parameters if layer_bytes is None else layer_bytes) * others
    rate, coding_s = hardware.all_to_all_bytes_per_s, 0.0
    if training.exchange_bits is not None:
        if with_coding:
            coding_s = per_row / training.width_bytes * CODING_BYTES / hardware.memory_bytes_per_s
        per_row *= training.exchange_bits / (8 * training.width_bytes)
    return Amount(constant=constant / rate, per_row=per_row / rate + coding_s)


def _head(shape: ModelShape, training: Training, hardware: Hardware, working_set: WorkingSet) -> HeadProfile:
    """Final norm and the tiled loss (`trainer.loss`), which computes its gradients in forward, and the embedding.

    With fused kernels the norm of a tile is made with the tile, and its gradient becomes that of the layer's output.
    """
    e, d, matrix = training.width_bytes, shape.hidden, shape.vocab * shape.hidden
    trains, stays = training.trains("lm_head"), gradient_width(training)
    run = LayerRun(
        shape, training, hardware.device_type, grad=True, lone_gradients=not stays or training.micro_batches > 1
    )
    run.make("y", e * d)
    if working_set == "today":
        run.norm(FINAL_NORM, "y", d, 1)
        run.drop("y")
    _loss(run, trains)
    run.drop("final norm out" if working_set == "today" else "y")
    run.doing = "final norm backward"
    if trains and run.casts:
        run.drop(run.make("d head, rounded", 0.0, constant=e * matrix if run.lone_gradients else 0))
    run.drop(*["d head"] * trains)
    if working_set == "today":
        run.gradient_of, run.in_place = {}, {}
        run.norm_backward(FINAL_NORM, "d hidden", d, "y")
    flop = 2 * matrix * (3 if trains else 2)
    seconds = flop / hardware.matmul_flop_per_s[training.precision] + run.traffic / hardware.memory_bytes_per_s
    embedding, head = training.trained_outside(shape)
    weights = weights_of(shape, training)
    # where gradients are handed on, the embedding's exists for a moment, after everything else has gone
    embedding_width = stays or (e if training.micro_batches == 1 else 0)
    return HeadProfile(
        # token ids, labels and positions; cosines and sines
        held_bytes=Amount(per_row=3 * 8 + 2 * e * shape.head_dim),
        forward_s=Amount(per_row=seconds),
        peak=peak(run.moments, Size(), training.loss_tile),
        gradient_bytes=stays * head,
        embedding_gradient_bytes=embedding_width * embedding,
        step_peak_bytes=step_peak_bytes(training, hardware, weights),
        step_s=optimizer_s(training, hardware, weights),
    )


def _loss(run: LayerRun, trains: bool) -> None:
    """Tile by tile: logits, their log-sum-exp, softmax in place of the logits, both gradients. Leaves `d hidden` and,
    with a trained projection, `d head` in fp32."""
    e, d, vocab, tile_rows = run.e, run.d, run.shape.vocab, run.training.loss_tile
    matrix = vocab * d
    run.doing = "loss"
    run.make("trained rows", 8)
    run.make("d hidden", e * d, reads=0.0)
    if trains:
        run.make("d head", 0.0, constant=FP32 * matrix if run.casts or run.lone_gradients else 0)
    run.in_tile = True
    # the names of the loop still hold the tile before when the next one is computed
    run.make("d logits of the tile before", (FP32 + e * run.casts) * vocab)
    logits = run.make("logits", e * vocab)
    if run.casts:
        run.make("logits in fp32", FP32 * vocab, reads=e * vocab)
        run.drop(logits)
        logits = "logits in fp32"
    run.drop(run.make("exponentials", FP32 * vocab, reads=2 * FP32 * vocab))
    run.traffic += 5 * FP32 * vocab  # their sum; subtracting and taking the exponential in place
    run.drop("d logits of the tile before")
    if run.casts:
        run.make("d logits", e * vocab, reads=FP32 * vocab)
    run.make("d hidden of the tile", e * d)
    run.drop("d hidden of the tile")
    if trains and run.casts:
        run.drop(run.make("d head of the tile", 0.0, constant=e * matrix))
        run.traffic += (e + 2 * FP32) * matrix / tile_rows
    run.drop(logits, *["d logits"] * run.casts)
    run.in_tile = False
