"""What is measured, what was seen, and the profile it makes: functions of the rows out of a few lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from farspan.memory.frame import HOLLOW, TILED_MLP
from farspan.memory.liveness import Size
from farspan.memory.moments import Run, fit_end, fit_peak, fit_values
from farspan.memory.plan import TierCodec
from farspan.memory.problem import GradientError, SavedTensor
from farspan.memory.profile import (
    Amount,
    AttentionProfile,
    HeadProfile,
    KindProfile,
    LinearProfile,
    OnHostProfile,
    PairTime,
    attended_pairs,
)
from farspan.memory.shape import TrainedTensor, Weights

TIMED_ROWS = {"cpu": (1024, 2048), "cuda": (8192, 32768)}
"""Lengths at which seconds are taken: on a GPU such as fill it."""
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
        exactly: inside, everything crosses ranks as it is; None: it does so anyway.
        tier_codec: what rows on other tiers will be in.
    """

    model: nn.Module
    layers: list[nn.Module]
    embedding: nn.Embedding
    step: Callable[[int], Tensor]
    set_tile: Callable[[int | None], None]
    hollow: bool
    gradients: Gradients
    exactly: Callable[[], AbstractContextManager[None]] | None = None
    tier_codec: TierCodec = "exact"


@dataclass
class LayerSample:
    """One layer: events by way of running it, and seconds."""

    x_bytes_per_row: float = 0.0
    o_bytes_per_row: float = 0.0
    window: int | None = None
    gradient_bytes: int = 0
    weights: Weights | None = None
    linear_bytes_per_row: dict[str, float] = field(default_factory=dict)
    saved: list[SavedTensor] = field(default_factory=list)
    gradient_error: GradientError | None = None
    exchange_error: GradientError | None = None
    tier_error: GradientError | None = None
    runs: dict[str, list[Run]] = field(default_factory=dict)
    moved: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Bytes of saved tensors copied to the host and back, by way of running it, in the order of `runs`."""
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


MARK_BYTES = 7
"""No tensor of a model has this size: where it is allocated, a moment is marked in the events."""


def mark(device: torch.device, size_bytes: int = MARK_BYTES) -> None:
    torch.empty(size_bytes, dtype=torch.uint8, device=device)


def hand_on(parameter: Tensor) -> None:
    parameter.grad = None


def weights_in(parameters: Iterable[nn.Parameter], *, inside: bool) -> Weights:
    """Count parameters, each once. `inside`: they are those of a decoder layer."""
    distinct = list({id(p): p for p in parameters}.values())
    trained = [p.numel() for p in distinct if p.requires_grad]
    tensors = [TrainedTensor(shape=tuple(p.shape), inside=inside) for p in distinct if p.requires_grad]
    return Weights(
        bytes=sum(p.nbytes for p in distinct),
        parameters=sum(p.numel() for p in distinct),
        trained=sum(trained),
        largest=max(trained, default=0),
        tensors=tuple(tensors),
    )


def _seconds(timed: dict[int, dict[str, float]], value: Callable[[dict[str, float]], float]) -> Amount:
    """The line through what two lengths took; where noise makes it fall, the longer one's seconds per row."""
    (low, low_s), (high, high_s) = ((rows, max(0.0, value(timed[rows]))) for rows in (min(timed), max(timed)))
    slope = (high_s - low_s) / (high - low)
    constant = low_s - slope * low
    if slope <= 0 or constant < 0:
        return Amount(per_row=high_s / high)
    return Amount(constant=constant, per_row=slope)


def _booked(gradients: Gradients, size_bytes: int) -> Size:
    """Gradients that stay are booked apart, as if all had been there from the start of the layer's backward."""
    return Size(constant=float(size_bytes if gradients == "first" else 0))


def layer_profile(name: str, sample: LayerSample, gradients: Gradients, mlp_tile: int | None) -> KindProfile:
    """What a layer costs at any number of rows."""
    tile, runs, timed = mlp_tile or 0, sample.runs, sample.timed
    keep = fit_end(runs["keep forward"], tile_rows=tile)
    kept = Size(keep.constant, keep.per_row, keep.per_tile_row)
    booked = _booked(gradients, sample.gradient_bytes)
    dy = Size(per_row=-sample.x_bytes_per_row)
    linears = [key.removeprefix("linear ") for key in timed[min(timed)] if key.startswith("linear ")]

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
        on_host=_on_host(sample, booked.plus(dy), booked, tile) if sample.moved else None,
        saved=tuple(sample.saved),
        gradient_error=sample.gradient_error,
        exchange_error=sample.exchange_error,
        tier_error=sample.tier_error,
        weights=sample.weights,
    )


def _on_host(sample: LayerSample, in_rebuild: Size, in_backward: Size, tile: int) -> OnHostProfile:
    """The same layer with its saved tensors on the host."""
    runs = sample.runs
    keep = fit_end(runs["keep forward on host"], tile_rows=tile)

    def copied(what: str, way: int) -> Amount:
        return fit_values(runs[what], [moved[way] for moved in sample.moved[what]], tile_rows=tile)

    return OnHostProfile(
        keep_bytes=keep,
        keep_forward_peak=fit_peak(
            "forward",
            runs["keep forward on host"],
            Size(keep.constant, keep.per_row, keep.per_tile_row),
            tile_rows=tile,
        ),
        keep_backward_peak=fit_peak("backward", runs["keep backward on host"], in_backward, tile_rows=tile),
        rebuild_peak=fit_peak("rebuild and backward", runs["rebuild on host"], in_rebuild, tile_rows=tile),
        keep_host_bytes=copied("keep backward on host", 0),
        keep_fetched_bytes=copied("keep backward on host", 1),
        rebuild_host_bytes=copied("rebuild on host", 0),
        rebuild_fetched_bytes=copied("rebuild on host", 1),
    )


def _attention(sample: LayerSample) -> AttentionProfile:
    times = []
    for seconds in sample.timed.values():
        if "attention forward" in seconds:
            seen = int(seconds["rows of attention"])
            pairs = attended_pairs(seen, sample.window)
            forward_s, backward_s = seconds["attention forward"] / pairs, seconds["attention backward"] / pairs
            times.append(PairTime(rows=seen, forward_s=forward_s, backward_s=backward_s))
    return AttentionProfile(window=sample.window, pair_times=tuple(times), o_bytes_per_row=sample.o_bytes_per_row)


def head_profile(sample: HeadSample, gradients: Gradients, loss_tile: int) -> HeadProfile:
    """What embedding, final norm and loss cost at any number of rows; the optimizer is not in it."""
    x = Size(per_row=sample.x_bytes_per_row)
    held = fit_end(sample.held, tile_rows=0)
    beside = Size(held.constant, held.per_row).plus(x, -1)
    low, high = min(sample.timed), max(sample.timed)
    slope = max(0.0, (sample.timed[high] - sample.timed[low]) / (high - low))
    return HeadProfile(
        held_bytes=Amount(constant=beside.constant, per_row=beside.per_row),
        forward_s=Amount(constant=max(0.0, sample.timed[low] - slope * low), per_row=slope),
        peak=fit_peak("loss", sample.work, beside.plus(_booked(gradients, sample.gradient_bytes)), tile_rows=loss_tile),
        gradient_bytes=sample.gradient_bytes if gradients != "handed on" else 0,
        embedding_gradient_bytes=sample.embedding_gradient_bytes,
        weights=sample.weights,
    )
