"""What a plan says, and what it means: the contract between planner, executor and simulator. No torch.

A plan names, for every decoder layer of a rank, what of its forward is stored, where, and what is computed again.

A layer is either *kept* (autograd stores what it stores) or *rebuilt*: its forward runs without autograd, and when its
backward comes it runs again with autograd, taking as given whatever was stored of it. Stored may be

- `x`, its input. A layer whose x is stored heads a *segment*: the layers up to the next stored or kept one. The inputs
  of the others are recomputed from the head's, without autograd (the *inner forward*);
- `o`, the attention output with its log-sum-exp: attention is then not computed again for these rows;
- outputs of its linear layers, by the last part of their name (`q_proj`, `o_proj`, `gate_proj`, ...): these matmuls are
  not run again.

Of each the *last* rows may be stored and the first ones recomputed: in causal attention late rows cost most, row i
looks back on i rows. The stored rows lie, from the end of the sequence to its start, on the device, in host memory, on
disk.

How a step runs, which is what predicted time and memory stand on:

1. Forward goes through the layers from 0. At the end of a rebuilt layer its stored rows exist (while it runs they are
   part of its working memory, which the rebuild of the same layer exceeds in any case): device rows stay; host
   and disk rows are copied out in one job by one lane, first come first served, and count as host bytes from its start
   and as device bytes to its end. Disk rows are then written by a second lane, and count as host bytes (staging) until
   written. A layer may start when the copies and writes of all but the last `slots` layers that offload are done;
   waiting is a stall.
2. The loss head runs forward and backward in one go, and waits for no copy.
3. Backward goes from the last layer to 0, in units: a kept layer, or a segment. A unit's rows on host and disk are
   fetched in the order of backward by two lanes: host rows to the device; disk rows to host staging, then to the
   device; none before it was copied out and written. A unit starts when all has arrived; waiting is a stall. It is
   asked for when the turn of the unit `prefetch` places earlier comes, before that one waits (the first `prefetch` + 1
   units: when the loss head starts), and counts as device bytes from then on, beside rows that are still on their way
   out and the gradient that backward has come to. Host rows and staging, which counts from the start of its read, are
   released when they are on the device.
4. A segment first runs its inner forward from the head to the last layer but one, taking stored rows as given.
   It leaves the complete O of each layer (stored rows of that O are released then) and, with `between="xo"`, the input
   of the next; with `between="o"` inputs are recomputed from the head for every layer. Then each layer, last first, is
   rebuilt with autograd and run backward, its O complete meanwhile (the last layer's in place of its stored rows); its
   x, O and other rows are released after it. Stored outputs of linear layers are among what a rebuild makes: given,
   they are not made again, so they count once. The gradient that backward has come to is held during all of this. A
   layer that has no O to give runs its attention in every forward.
5. The optimizer runs once, after the last micro-batch. Gradients of a micro-batch are held through those after it.

With a `tier_codec` rows for host and disk become codes when their layer's forward ends, and it is the codes that are
copied out, held, written, fetched, and on the device until then and again from when they are asked for; compute pays
for making them in the layer's forward, and for reading them with the layer's rebuild. Codes of x become rows when their
unit starts, those of O when its complete O is made, those of linear layers when these are given; at the highest point
of a rebuild no codes of it are left. Log-sum-exps stay as they are.

With `saved="host"` the tensors that autograd saves, in the forward of a kept layer and in every rebuild, wait in host
memory: compute itself copies each one out when an operator saves it and back when that operator's backward comes, and
waits for both, so that these copies are paid in full and use none of the lanes above. Those of a kept layer count as
host bytes from the start of its forward to the end of its backward, those of a rebuild while rebuild and backward run.
This takes the least device memory there is, one operator's tensors, and is what torch's `save_on_cpu` does to all
layers. Outputs of linear layers that a rebuild needs cannot be stored then.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from farspan.schema import Schema

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")
Policy = Literal["keep", "recompute", "offload-inputs", "memo", "ssdtrain", "solve"]
Saved = Literal["device", "host"]
TierCodec = Literal["exact", "fp8", "int4"]
POLICIES: tuple[Policy, ...] = ("keep", "recompute", "offload-inputs", "memo", "ssdtrain", "solve")


class Rows(Schema):
    """How many rows of one tensor lie on each tier, counted from the end of the sequence; the others are recomputed."""

    device: int = Field(default=0, ge=0)
    host: int = Field(default=0, ge=0)
    disk: int = Field(default=0, ge=0)

    @property
    def stored(self) -> int:
        return self.device + self.host + self.disk

    def on(self, tier: Tier) -> int:
        return int(getattr(self, tier))

    def fit(self, rows: int) -> Rows:
        """The same for a tensor of fewer rows: the device's share first, so that no tier gets more than planned."""
        device = min(self.device, rows)
        host = min(self.host, rows - device)
        return Rows(device=device, host=host, disk=min(self.disk, rows - device - host))

    def spans(self, rows: int) -> dict[Tier, tuple[int, int]]:
        """First and last (exclusive) row of each tier that holds any, of a tensor of `rows` rows."""
        assert self.stored <= rows, (self, rows)
        spans: dict[Tier, tuple[int, int]] = {}
        end = rows
        for tier in TIERS:
            if self.on(tier):
                spans[tier] = (end - self.on(tier), end)
                end -= self.on(tier)
        return spans


class LayerPlan(Schema):
    """What one decoder layer stores."""

    keep: bool = False
    """Autograd stores all; nothing below applies."""
    x: Rows | None = None
    """Rows of the layer's input, all of them on some tier; None: not the head of a segment."""
    o: Rows = Rows()
    """Rows of attention output and log-sum-exp, of the sequence (after the all-to-all: all rows of some heads)."""
    linear: dict[str, Rows] = Field(default_factory=dict)
    """Rows of outputs of linear layers by name (`q_proj`, ..., `up_proj`)."""

    @property
    def head(self) -> bool:
        return self.keep or self.x is not None

    @property
    def leaves(self) -> bool:
        """Whether rows of it are on host or disk."""
        parts = [self.x or Rows(), self.o, *self.linear.values()]
        return not self.keep and any(rows.host + rows.disk for rows in parts)


class Placement(Schema):
    """What the executor carries out."""

    rows: int = Field(ge=1)
    """Rows of a sequence on one rank."""
    attention_rows: int = Field(ge=1)
    """Rows attention sees: those of all ranks of the sp group."""
    layers: tuple[LayerPlan, ...]
    between: Literal["xo", "o"] = "o"
    """What the inner forward of a segment keeps for the layers to come: inputs and O, or O alone."""
    prefetch: int = Field(default=1, ge=0)
    """Units of backward fetched ahead of the running one."""
    slots: int = Field(default=2, ge=1)
    """Layers whose copies may be under way during forward."""
    frozen_below: int = Field(default=0, ge=0)
    """Layers below this one need no gradient: they run forward only, and what is said of them does not apply."""
    saved: Saved = "device"
    """Where the tensors wait that autograd saves in forwards of kept layers and in rebuilds."""
    tier_codec: TierCodec = "exact"
    """What rows of x, O and linear outputs are on host and disk. Log-sum-exps, rows on the device and tensors that
    autograd saves are what they are."""

    @model_validator(mode="after")
    def _inputs_can_be_had(self) -> Placement:
        for index, layer in enumerate(self.layers[self.frozen_below :], start=self.frozen_below):
            if not layer.head and (index == self.frozen_below or self.layers[index - 1].keep):
                raise ValueError(f"layer {index} stores no x, and there is no rebuilt layer below it to get it from")
            if layer.x is not None and layer.x.stored != self.rows:
                raise ValueError(f"layer {index} stores {layer.x.stored} rows of x; a head stores all {self.rows}")
        return self

    def units(self) -> list[range]:
        """Layers of each unit of backward, first to run first (the top of the model)."""
        heads = [index for index in range(self.frozen_below, len(self.layers)) if self.layers[index].head]
        ends = [*heads[1:], len(self.layers)]
        return [range(start, end) for start, end in zip(heads, ends)][::-1]

    @property
    def keeps_everything(self) -> bool:
        """Whether training goes as if there were no plan."""
        return self.saved == "device" and all(layer.keep for layer in self.layers)


def keep_everything(layers: int, *, rows: int, attention_rows: int) -> Placement:
    """Autograd's own way: no layer is rebuilt."""
    return Placement(rows=rows, attention_rows=attention_rows, layers=(LayerPlan(keep=True),) * layers)


def checkpoint_every_layer(layers: int, *, rows: int, attention_rows: int) -> Placement:
    """Plain activation checkpointing: every layer's input on the device, all else computed again."""
    plan = LayerPlan(x=Rows(device=rows))
    return Placement(rows=rows, attention_rows=attention_rows, layers=(plan,) * layers)
