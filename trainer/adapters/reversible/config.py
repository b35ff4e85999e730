"""What a job may say about reversible layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from farspan.schema import Schema
from farspan.trainer.adapters.full import FullFineTune
from farspan.trainer.adapters.l4q.config import L4Q
from farspan.trainer.adapters.lora.config import LoRA
from farspan.trainer.adapters.paca.config import PaCA
from farspan.trainer.adapters.peqa.config import PEQA

Inside = Annotated[LoRA | FullFineTune | PaCA | PEQA | L4Q, Field(discriminator="type")]


class Reversible(Schema):
    """Reversible layers: of a layer's input a few bits per element are stored, the rest is computed back, exactly.

    The model becomes another one: of each layer's output a share 2^-bits of the last layer's change is taken away.
    Training inside starts near the pretrained model, the nearer the more bits. Source: Liao et al., MEFT, 2023; integer
    streams and the exact inverse are Farspan's own (`farspan.memory.coupling`).
    """

    type: Literal["reversible"] = "reversible"
    wiring: Literal[1, 2, 3] = 1
    """Which of MEFT's couplings: a layer with an adapter on its output (1) or before its input (2); or attention and
    MLP apart (3), which needs twice the side bits; of a layer only one half is in memory in backward, which plans do
    not reckon with yet."""
    bits: int = Field(default=3, ge=1, le=8)
    """Side bits of an element and layer (for wiring 3, of each half); lambda is 2^-bits."""
    fraction_bits: int | Literal["auto"] = "auto"
    """Bits behind the point of the residual streams, which have 30 in all. `auto`: as many as leave room for 16 times
    the largest hidden state of the pretrained model, measured when a run starts; 20 at most."""
    width: int = Field(default=0, ge=0)
    """Width of the bottleneck adapters between the streams (MEFT's own); 0: none. Wiring 3 has none."""
    inside: Inside = LoRA()
    """What trains inside the layers."""
    store: Literal["bits", "inputs"] = "bits"
    """`inputs`: layers store what they read, as plain checkpointing does. The same model and steps; for machines where
    a layer does not give the same bits twice."""
