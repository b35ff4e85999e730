"""What is said of a placement before it runs: the numbers of `memory.evaluate`, and its pictures' material."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from farspan.schema import Schema

Lane: TypeAlias = Literal["compute", "copy_out", "copy_in", "disk_write", "disk_read"]
TransferLane: TypeAlias = Literal["copy_out", "copy_in", "disk_write", "disk_read"]
LANES: tuple[TransferLane, ...] = ("copy_out", "copy_in", "disk_write", "disk_read")


class Parts(Schema):
    """Seconds of an optimizer step by what they are spent on; they sum to `step_s`."""

    forward_s: float = 0.0
    attention_forward_s: float = 0.0
    backward_s: float = 0.0
    attention_backward_s: float = 0.0
    rebuild_linear_s: float = 0.0
    """Forward without attention run again just before a layer's backward."""
    rebuild_attention_s: float = 0.0
    """Attention of rows whose O was not stored, in inner forwards and rebuilds alike."""
    inner_forward_s: float = 0.0
    """Forward without attention run again to obtain the inputs of a segment's layers."""
    forward_copies_s: float = 0.0
    """Compute copying saved tensors of kept layers to host memory."""
    backward_copies_s: float = 0.0
    """Compute copying saved tensors back, and in rebuilds to host memory."""
    forward_codes_s: float = 0.0
    """Making codes of rows for other tiers."""
    backward_codes_s: float = 0.0
    """Reading them."""
    head_s: float = 0.0
    optimizer_s: float = 0.0
    stall_s: dict[TransferLane, float] = Field(default_factory=dict)
    """Compute waiting, by the lane waited for."""

    @property
    def stalled_s(self) -> float:
        return sum(self.stall_s.values())

    @property
    def recompute_s(self) -> float:
        return self.rebuild_linear_s + self.rebuild_attention_s + self.inner_forward_s


class Interval(Schema):
    """A lane at work."""

    lane: Lane
    start_s: float
    end_s: float
    label: str
    bytes: int = 0


class Timeline(Schema):
    """One micro-batch and the optimizer step, for pictures."""

    intervals: tuple[Interval, ...]
    device: tuple[tuple[float, int], ...]
    """Seconds and device bytes from then on."""
    host: tuple[tuple[float, int], ...]
    """Seconds and host bytes from then on."""


class Prediction(Schema):
    """What running a placement takes."""

    device_peak_bytes: int
    device_peak_at: str
    """The moment of the device's peak, in words."""
    host_bytes: int
    """Peak on the host, model states and staging included."""
    disk_bytes: int
    written_bytes: int
    """Written to disk per micro-batch."""
    step_s: float
    """One optimizer step: all its micro-batches and the optimizer."""
    parts: Parts
    moved_bytes: dict[TransferLane, int]
    """Bytes through each lane per micro-batch."""
    over_bytes: dict[str, int]
    """By how much each broken budget (`device`, `host`, `disk`, `disk_write`) is exceeded; empty: it fits."""
    timeline: Timeline | None = None

    @property
    def fits(self) -> bool:
        return not self.over_bytes
