"""What a job may say about reversible layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from farspan.memory.amplification import PUBLISHED, amplification, error_after, likely_layers
from farspan.memory.shape import Precision
from farspan.schema import Schema
from farspan.trainer.adapters.full import FullFineTune
from farspan.trainer.adapters.l4q.config import L4Q
from farspan.trainer.adapters.lora.config import LoRA
from farspan.trainer.adapters.paca.config import PaCA
from farspan.trainer.adapters.peqa.config import PEQA

Inside = Annotated[LoRA | FullFineTune | PaCA | PEQA | L4Q, Field(discriminator="type")]


Factor = Annotated[float, Field(gt=0, le=1)]
Anchors = Annotated[int, Field(ge=1)]


class Reversible(Schema):
    """Reversible layers: of a layer's input a few bits per element are stored, the rest is computed back, exactly.

    The model becomes another one: of each layer's output a share 2^-bits of the last layer's change is taken away.
    Training inside starts near the pretrained model, the nearer the more bits. Source: Liao et al., MEFT, 2023; integer
    streams and the exact inverse are Farspan's own (`farspan.memory.coupling`). `form="float"` is the paper's coupling,
    y1 = lambda x1 + F(x2), y2 = beta x2 + G(y1), computed back within a tolerance (`farspan.memory.float_streams`).
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
    form: Literal["exact", "float"] = "exact"
    """`float`: the published coupling. Undoing a layer multiplies the error of its streams, about 12 times with the
    paper's factors, so that streams are stored whole every few layers, 8 bytes of an element each time; `bits` and
    `fraction_bits` are for `exact`, what follows is for `float`."""
    factors: tuple[Factor, Factor] | Literal["published"] = "published"
    """Lambda and beta. The paper's: 0.1, 1 for wiring 1; 1, 0.1 for wiring 2; 0.1, 0.1 for wiring 3. The smaller, the
    nearer to the pretrained model; the larger, the more exactly layers are undone."""
    anchor_every: Anchors | Literal["auto"] = "auto"
    """Layers from one whose streams are stored whole to the next. `auto`: the most whose streams come back within
    `tolerance`, measured with the model's own rows when a run starts."""
    tolerance: float = Field(default=1e-3, gt=0, le=0.1)
    """Error of streams computed back, relative to their length, root mean square over the rows."""

    @property
    def lambda_beta(self) -> tuple[float, float]:
        return PUBLISHED[self.wiring] if self.factors == "published" else self.factors

    @property
    def kappa(self) -> float:
        """What the error of the float form is multiplied by in a layer."""
        return amplification(self.wiring, self.lambda_beta)

    def anchors_planned(self, precision: Precision) -> int:
        """Layers between anchors that plans reckon with: what is said, or what the formula lets expect."""
        if self.anchor_every != "auto":
            return self.anchor_every
        return likely_layers(self.kappa, self.tolerance, precision)

    @property
    def least_error(self) -> float:
        """What the streams are off by at `anchor_every`, by rounding alone; with every layer an anchor none is used."""
        if self.anchor_every == "auto" or self.anchor_every == 1:
            return 0.0
        return error_after(self.anchor_every, self.kappa)
