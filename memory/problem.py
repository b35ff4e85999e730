"""A planning problem in numbers: layers, states, budgets, links. JSON in, JSON out; needs neither model nor machine.

Everything is for one rank and one micro-batch at fixed rows: bytes and seconds are absolute, not per token, so that a
saved problem replays anywhere and the solver knows nothing of models. `memory.build` makes it from a profile.
`memory.plan` says how a step runs; here stand the quantities that story needs.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.memory.plan import Saved, Tier, TierCodec
from farspan.schema import Schema


class LinearClass(Schema):
    """Output of one or several linear layers of a decoder layer, storable row by row."""

    name: str
    bytes: int = Field(ge=0)
    """All rows."""
    coded_bytes: int | None = None
    """All rows as host and disk have them; None: as they are."""
    matmul_s: float = Field(ge=0)
    """Seconds of its forward for all rows; recomputing a share of the rows costs that share."""
    tile_rows: int | None = Field(default=None, ge=1)
    """Rows are stored in tiles of so many, the last one cut short: linear layers run on a fixed row grid in every plan,
    else bits differ. None: all or none."""
    inner_only: bool = False
    """Not needed to run the layer's backward, only to obtain the next layer's input (`down_proj`)."""

    def bytes_on(self, tier: Tier) -> int:
        """All rows, as a tier has them."""
        return _on(tier, self.bytes, self.coded_bytes)


class OnHost(Schema):
    """A layer whose saved tensors wait in host memory: what the fields of `LayerKind` with the same names are then.

    Saved tensors that are parameters, or that the caller holds apart (the input of a rebuild, position embeddings),
    stay where they are. What is fetched may be more than what is held: two operators may need one tensor, one after the
    other.
    """

    keep_bytes: int
    """What is left on the device of a kept layer between its forward and its backward."""
    keep_forward_peak_bytes: int
    keep_backward_peak_bytes: int
    rebuild_peak_bytes: int
    keep_host_bytes: int
    keep_fetched_bytes: int
    rebuild_host_bytes: int
    rebuild_fetched_bytes: int


class SavedTensor(Schema):
    """A tensor that autograd keeps for a layer's backward."""

    name: str
    kept_by: tuple[str, ...]
    """Operators whose backward needs it; it is stored once."""
    bytes_per_row: float


class GradientError(Schema):
    """How far codes (of saved activations, of rows on other tiers, of what crosses ranks) turn a layer's gradients,
    relative to those without."""

    weights: float | None
    """Of all trained parameters together; None: none is trained."""
    input: float


class LayerKind(Schema):
    """Decoder layers that cost the same. Peaks are working memory beyond what is said to be held already."""

    name: str
    x_bytes: int
    """Layer input; its output and their gradients have this size too."""
    side_bytes: int | None = None
    """Of a reversible layer: what it stores in the place of x. None: x itself."""
    o_bytes: int
    """Attention output and log-sum-exp, all rows; 0: no attention whose output can be given."""
    coded_x_bytes: int | None = None
    coded_o_bytes: int | None = None
    """The same as host and disk have them, log-sum-exp as it is; None: as they are."""
    o_block_rows: int = Field(default=1, ge=1)
    """Rows of O are stored in blocks of so many, the last one cut short."""
    linear: tuple[LinearClass, ...] = ()
    keep_bytes: int
    """What autograd stores when the layer is kept, its input x included where autograd saves it."""

    forward_s: float
    """Forward without attention, its exchanges included."""
    attention_forward_s: float
    attention_growth: float = 2.0
    """Attention over the first share f of the rows costs f ** growth of the whole: 2 for causal, 1 for a window."""
    backward_s: float
    """Backward without attention, its exchanges included."""
    attention_backward_s: float
    elementwise_s: float
    """Forward of what is neither matmul nor attention; paid by every rebuild."""
    exchange_s: float = 0.0
    """All-to-alls of one forward; what every inner forward and rebuild pays again."""

    forward_peak_bytes: int
    """Running forward without autograd: beyond x, with the output and O included."""
    keep_forward_peak_bytes: int
    """Running forward when kept: beyond x and keep_bytes, with the output included."""
    rebuild_peak_bytes: int
    """Rebuild and backward: beyond x and the layer's complete O; outputs of linear layers and the gradients of output
    and input included. Stored rows of the outputs that the rebuild needs take the place of as many bytes of it."""
    keep_backward_peak_bytes: int
    """Backward when kept: beyond keep_bytes; with the gradients of output and input included."""
    gradient_bytes: int = 0
    """Parameter gradients that come to exist in this layer's backward and stay until the optimizer step."""

    saved: tuple[SavedTensor, ...] = ()
    """What `keep_bytes` is made of, for people to read; empty where nobody counted it."""
    gradient_error: GradientError | None = None
    """None: activations are not kept in codes, or nobody measured."""
    exchange_error: GradientError | None = None
    """The same of what crosses ranks in codes."""
    tier_error: GradientError | None = None
    """With x, O and all linear outputs in the codes of other tiers; None: there are none, or nobody measured."""
    on_host: OnHost | None = None
    """None: saved tensors can only wait on the device."""
    keep_host_bytes: int = 0
    """Saved tensors on the host from a kept layer's forward to its backward."""
    keep_fetched_bytes: int = 0
    """Copied back in a kept layer's backward."""
    rebuild_host_bytes: int = 0
    """Saved tensors on the host while a rebuild and its backward run."""
    rebuild_fetched_bytes: int = 0
    """Copied back in a rebuilt layer's backward."""

    @property
    def stored_x_bytes(self) -> int:
        """What is stored where a placement has x."""
        return self.x_bytes if self.side_bytes is None else self.side_bytes

    def x_bytes_on(self, tier: Tier) -> int:
        """What is stored where a placement has x, all rows, as a tier has them."""
        return _on(tier, self.stored_x_bytes, self.coded_x_bytes)

    def o_bytes_on(self, tier: Tier) -> int:
        return _on(tier, self.o_bytes, self.coded_o_bytes)

    def saving_on_host(self) -> LayerKind:
        """The same layer with its saved tensors on the host.

        The rebuild then makes each of its linear outputs anew: one that were stored would be on the device from the
        start instead of when it is used.
        """
        assert self.on_host is not None, self.name
        again_s = sum(linear.matmul_s for linear in self.linear if not linear.inner_only)
        return self.model_copy(
            update={
                **self.on_host.model_dump(),
                "on_host": None,
                "linear": tuple(linear for linear in self.linear if linear.inner_only),
                "elementwise_s": self.elementwise_s + again_s,
            }
        )


def _on(tier: Tier, whole_bytes: int, coded_bytes: int | None) -> int:
    return whole_bytes if tier == "device" or coded_bytes is None else coded_bytes


class State(Schema):
    """Memory that is there through the whole step."""

    name: str
    tier: Tier
    bytes: int = Field(ge=0)


class Head(Schema):
    """Embedding, final norm, output projection and loss."""

    held_bytes: int = 0
    """Held from before layer 0 until after its backward (token ids, position embeddings, masks)."""
    forward_s: float = 0.0
    """Embedding, final norm and loss, forward and backward together."""
    peak_bytes: int = 0
    """Loss forward and backward: beyond what layers store, the last layer's output included."""
    gradient_bytes: int = 0
    """Gradients of head and final norm, which stay until the optimizer step."""
    embedding_gradient_bytes: int = 0
    """Gradient of the embedding, made after layer 0's backward."""
    step_peak_bytes: int = 0
    """Optimizer step: beyond states and gradients."""
    step_s: float = 0.0
    """Optimizer step and gradient reduction."""


class Budgets(Schema):
    """Bytes a rank may use on each tier, model states included."""

    device_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0
    disk_write_bytes: int | None = None
    """Bytes written to disk per micro-batch at most (drive wear); None: no limit."""


class Links(Schema):
    """Sustained bandwidth of a rank's lanes."""

    copy_out_bytes_per_s: float = Field(gt=0)
    copy_in_bytes_per_s: float = Field(gt=0)
    disk_write_bytes_per_s: float = Field(gt=0)
    disk_read_bytes_per_s: float = Field(gt=0)


class TierCodes(Schema):
    """Codes that rows on host and disk are in: what compute takes to write and read them, per byte of the rows."""

    kind: Literal["fp8", "int4"]
    encode_bytes_per_s: float = Field(gt=0)
    decode_bytes_per_s: float = Field(gt=0)


class PlanProblem(Schema):
    """All the solver is told."""

    rows: int
    attention_rows: int
    kinds: tuple[LayerKind, ...]
    layers: tuple[str, ...]
    """Kind of each decoder layer, bottom first."""
    head: Head = Head()
    states: tuple[State, ...] = ()
    budgets: Budgets
    links: Links
    micro_batches: int = 1
    """Micro-batches of one optimizer step; each runs the plan."""
    frozen_below: int = 0
    """Layers below this one need no gradient at all: they run forward only and store nothing."""
    reversible: bool = False
    """Layers give back their inputs from side bits: each of them stores these, and none is kept."""
    saved: Saved = "device"
    """Where the numbers of `kinds` have autograd's saved tensors wait; `saving` makes one from the other."""

    codes: TierCodes | None = None
    """None: rows on host and disk are as they are; then no kind has coded bytes."""

    @property
    def tier_codec(self) -> TierCodec:
        return "exact" if self.codes is None else self.codes.kind

    def coding_s(self, whole_bytes: float) -> tuple[float, float]:
        """Seconds to write and to read the codes of rows that have so many bytes."""
        if self.codes is None:
            return 0.0, 0.0
        return whole_bytes / self.codes.encode_bytes_per_s, whole_bytes / self.codes.decode_bytes_per_s

    @property
    def input_stored_as(self) -> str:
        """What stands for a layer's input, in words."""
        if not self.reversible:
            return "input"
        # of streams in floating point few layers store something, and it is no bits
        return "streams" if min(kind.stored_x_bytes for kind in self.kinds) == 0 else "side bits"

    def kind(self, layer: int) -> LayerKind:
        return next(kind for kind in self.kinds if kind.name == self.layers[layer])

    @property
    def can_save_on_host(self) -> bool:
        """Whether `saving("host")` is known."""
        return self.saved == "host" or all(kind.on_host is not None for kind in self.kinds)

    def saving(self, where: Saved) -> PlanProblem:
        """The same problem in the numbers of placements that save there."""
        if where == self.saved:
            return self
        assert where == "host" and self.can_save_on_host, (self.saved, where)
        return self.model_copy(update={"kinds": tuple(kind.saving_on_host() for kind in self.kinds), "saved": where})
