"""A planning problem in numbers: layers, states, budgets, links. JSON in, JSON out; needs neither model nor machine.

Everything is for one rank and one micro-batch at fixed rows: bytes and seconds are absolute, not per token, so that a
saved problem replays anywhere and the solver knows nothing of models. `memory.build` makes it from a profile.
`memory.plan` says how a step runs; here stand the quantities that story needs.
"""

from __future__ import annotations

from pydantic import Field

from farspan.memory.plan import Tier
from farspan.schema import Schema


class LinearClass(Schema):
    """Output of one or several linear layers of a decoder layer, storable row by row."""

    name: str
    bytes: int = Field(ge=0)
    """All rows."""
    matmul_s: float = Field(ge=0)
    """Seconds of its forward for all rows; recomputing a share of the rows costs that share."""
    tile_rows: int | None = Field(default=None, ge=1)
    """Rows are stored in tiles of so many, the last one cut short: linear layers run on a fixed row grid in every plan,
    else bits differ. None: all or none."""
    inner_only: bool = False
    """Not needed to run the layer's backward, only to obtain the next layer's input (`down_proj`)."""


class LayerKind(Schema):
    """Decoder layers that cost the same. Peaks are working memory beyond what is said to be held already."""

    name: str
    x_bytes: int
    """Layer input; its output and their gradients have this size too."""
    o_bytes: int
    """Attention output and log-sum-exp, all rows; 0: no attention whose output can be given."""
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

    def kind(self, layer: int) -> LayerKind:
        return next(kind for kind in self.kinds if kind.name == self.layers[layer])
