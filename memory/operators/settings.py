"""Which form activations are kept in, shared by the operators of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from farspan.kernels.activation_codecs import GROUP_4, GROUP_8, group_of
from farspan.kernels.activation_codecs.codes import Codec, Groups4, Groups8, Plain, Range4

Activations = Literal["autograd", "fused", "fp8", "int4"]
OF_SILU = (-0.09984, 1.09984)
"""Between which its derivative lies."""
OF_GELU = (-0.12905, 1.12905)
"""The same of GELU, exact or by tanh."""


@dataclass
class Settings:
    """`kind` may change between a forward and the next: a measurement compares two."""

    kind: Activations

    @property
    def draws(self) -> bool:
        return self.kind == "int4"

    def key(self) -> int | None:
        """Of the noise that an operator rounds with; drawn in every forward, so that a second one draws the same."""
        return int(torch.randint(2**62, ()).item()) if self.draws else None

    def of_values(self, width: int, dtype: torch.dtype) -> Codec:
        """For numbers of any size."""
        if self.kind == "fused":
            return Plain(dtype)
        return Groups8(group_of(width, GROUP_8)) if self.kind == "fp8" else Groups4(group_of(width, GROUP_4))

    def of_derivative(self, activation: str) -> Codec:
        return Range4(*(OF_SILU if activation == "silu" else OF_GELU))
