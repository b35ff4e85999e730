"""Operators of a decoder layer that keep less for their backward than autograd's do, or keep it in fewer bits.

transformers writes a norm as six operators and a gated unit as three, each of which keeps its own arguments, and a
linear layer keeps its input whatever that was made of. `keep_less` runs norms, gated units and trained linear layers of
unmodified models as one node each:

- `fused` keeps what the gradient needs and makes the rest again: gradients of the gated unit have the same bits, those
  of norms differ by rounding;
- `fp8` and `int4` keep it in codes (`kernels.activation_codecs`); gradients are then off by what `gradient_error`
  measures. Attention keeps q, k, v and its output as they are.

The forward has the bits of the model's own.
"""

from __future__ import annotations

from farspan.memory.operators.apply import keep_less
from farspan.memory.operators.error import gradient_error
from farspan.memory.operators.settings import Activations, Settings
from farspan.memory.operators.stored import Stored, say_stored, stored

__all__ = ["Activations", "Settings", "Stored", "gradient_error", "keep_less", "say_stored", "stored"]
