"""What a model's layers cost as functions of the rows: measured at a few thousand rows, good for any length.

Every tensor of a decoder layer has a fixed number of bytes per row, and every operator but attention a fixed time, so
each quantity is a constant plus so much per row; where work goes tile by tile, also so much per row of a tile. A peak
is the highest of several such lines, one per moment, since which moment is highest depends on the rows. Attention is
seconds per pair of a query row and a key row it looks back on. `memory.build` turns a profile into a `PlanProblem`.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from farspan.memory.problem import GradientError, SavedTensor, TierCodes
from farspan.memory.shape import Weights
from farspan.schema import Schema


class Source(Schema):
    """Where a number comes from."""

    how: Literal["measured", "assumed"]
    what: str
    """The measurement, the data sheet, the formula."""


class Amount(Schema):
    """Bytes or seconds: constant + per_row * rows + per_tile_row * min(tile_rows, rows)."""

    constant: float = 0.0
    per_row: float = 0.0
    per_tile_row: float = 0.0
    tile_rows: int = Field(default=0, ge=0)

    def at(self, rows: int) -> float:
        return self.constant + self.per_row * rows + self.per_tile_row * min(self.tile_rows, rows)


class Moment(Schema):
    """Bytes at one point of a piece of work."""

    what: str
    bytes: Amount


class Peak(Schema):
    """The highest of several moments."""

    moments: tuple[Moment, ...]

    def bytes_at(self, rows: int) -> int:
        return max(0, math.ceil(max((m.bytes.at(rows) for m in self.moments), default=0.0)))

    def highest(self, rows: int) -> str:
        """The moment of the peak, in words."""
        return max(self.moments, key=lambda m: m.bytes.at(rows)).what


def attended_pairs(rows: int, window: int | None) -> float:
    """Pairs of a query row and a key row it sees, diagonal counted half: rows^2 / 2, or w * rows - w^2 / 2."""
    seen = rows if window is None else min(window, rows)
    return seen * rows - seen * seen / 2


class PairTime(Schema):
    """Seconds per attended pair, all heads of a rank together, seen at some number of rows."""

    rows: int = Field(ge=1)
    forward_s: float = Field(ge=0)
    backward_s: float = Field(ge=0)


class AttentionProfile(Schema):
    """Attention of one rank: its heads over all rows of the sp group."""

    window: int | None = None
    pair_times: tuple[PairTime, ...] = Field(min_length=1)
    """By rows, ascending. Between two, seconds per pair are linear in the logarithm of the rows; outside, constant."""
    o_bytes_per_row: float = Field(ge=0)
    """Output and log-sum-exp of the rank's heads, per row of the whole sequence."""
    coded_o_bytes_per_row: float | None = None
    """On other tiers than the device; None: the same."""

    def seconds(self, rows: int) -> tuple[float, float]:
        """Forward and backward over `rows` rows."""
        pairs = attended_pairs(rows, self.window)
        right = next((i for i, known in enumerate(self.pair_times) if known.rows >= rows), len(self.pair_times) - 1)
        high, low = self.pair_times[right], self.pair_times[max(right - 1, 0)]
        share = 1.0
        if low.rows < rows < high.rows:
            share = math.log(rows / low.rows) / math.log(high.rows / low.rows)
        elif rows <= low.rows:
            share = 0.0
        forward_s = low.forward_s + share * (high.forward_s - low.forward_s)
        backward_s = low.backward_s + share * (high.backward_s - low.backward_s)
        return pairs * forward_s, pairs * backward_s


class LinearProfile(Schema):
    """Output of a linear layer that can be stored, by the name of its module."""

    name: str
    bytes_per_row: float = Field(ge=0)
    coded_bytes_per_row: float | None = None
    matmul_s: Amount
    tile_rows: int | None = None
    """Rows are stored in tiles of so many; None: all or none, since linear layers run on whole tensors."""
    inner_only: bool = False


class OnHostProfile(Schema):
    """A layer whose saved tensors wait in host memory: the fields of `problem.OnHost`, as functions of the rows."""

    keep_bytes: Amount
    keep_forward_peak: Peak
    keep_backward_peak: Peak
    rebuild_peak: Peak
    keep_host_bytes: Amount
    keep_fetched_bytes: Amount
    rebuild_host_bytes: Amount
    rebuild_fetched_bytes: Amount


class KindProfile(Schema):
    """Decoder layers that cost the same. The fields are those of `problem.LayerKind`, as functions of the rows."""

    name: str
    x_bytes_per_row: float
    coded_x_bytes_per_row: float | None = None
    side_bytes_per_row: float | None = None
    attention: AttentionProfile | None = None
    """None: nothing whose output could be given."""
    linear: tuple[LinearProfile, ...] = ()
    keep_bytes: Amount
    forward_s: Amount
    """Without attention; exchanges included."""
    backward_s: Amount
    """Without attention; exchanges included."""
    elementwise_s: Amount
    exchange_s: Amount = Amount()
    forward_peak: Peak
    keep_forward_peak: Peak
    rebuild_peak: Peak
    keep_backward_peak: Peak
    gradient_bytes: int = 0
    on_host: OnHostProfile | None = None
    saved: tuple[SavedTensor, ...] = ()
    """What `keep_bytes` is made of, largest first."""
    gradient_error: GradientError | None = None
    exchange_error: GradientError | None = None
    tier_error: GradientError | None = None
    weights: Weights | None = None
    """Of one layer, where it was measured."""


class HeadProfile(Schema):
    """Embedding, final norm, output projection and loss; the fields of `problem.Head`."""

    held_bytes: Amount
    forward_s: Amount
    peak: Peak
    gradient_bytes: int = 0
    embedding_gradient_bytes: int = 0
    step_peak_bytes: int = 0
    step_s: float = 0.0
    weights: Weights | None = None
    """Outside the layers, where it was measured."""


class Profile(Schema):
    """A model on a device, one rank, one micro-batch."""

    device: str
    """Name of the device it was measured on or computed for."""
    torch_version: str | None = None
    """None: nothing was run."""
    sp: int = Field(default=1, ge=1)
    """Ranks that shared the sequence: heads per rank and the exchanges depend on it."""
    mlp_tile: int | None = None
    """The profile holds for more rows than this; None: for any, the MLP runs whole."""
    layers: tuple[str, ...]
    """Kind of each decoder layer, bottom first."""
    kinds: tuple[KindProfile, ...]
    head: HeadProfile
    codes: TierCodes | None = None
    """Of rows that leave the device; None: they do so as they are."""
    sources: dict[str, Source]
    """Of each group of numbers: `bytes`, `matmul`, `attention`, `elementwise`, `exchange`, `optimizer`, and `codes`
    where there are any."""

    def assumed(self) -> tuple[str, ...]:
        """What was not measured."""
        return tuple(name for name, source in self.sources.items() if source.how == "assumed")
