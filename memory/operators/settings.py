"""Which form activations are kept in, shared by the operators of one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    """`kind` is what a job asked for, `kept_as` what is done at the moment."""

    kind: Activations
    _as_they_are: bool = False

    @property
    def kept_as(self) -> Activations:
        return "fused" if self._as_they_are else self.kind

    @contextmanager
    def measured_against(self) -> Iterator[None]:
        """Inside, activations are kept as they are; random numbers are drawn as ever."""
        self._as_they_are = True
        try:
            yield
        finally:
            self._as_they_are = False

    @property
    def draws(self) -> bool:
        return self.kind == "int4"

    def key(self) -> int | None:
        """Of the noise that an operator rounds with; drawn in every forward, so that a second one draws the same."""
        return int(torch.randint(2**62, ()).item()) if self.draws else None

    def of_values(self, width: int, dtype: torch.dtype) -> Codec:
        """For numbers of any size."""
        if self.kept_as == "fused":
            return Plain(dtype)
        return Groups8(group_of(width, GROUP_8)) if self.kept_as == "fp8" else Groups4(group_of(width, GROUP_4))

    def of_derivative(self, activation: str) -> Codec:
        return Range4(*(OF_SILU if activation == "silu" else OF_GELU))
