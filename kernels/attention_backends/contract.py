"""What every attention back end offers, and what a call to one is about.

B batch, H query heads, K KV heads, S rows of the whole pack, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
Grads = tuple[Tensor, Tensor, Tensor]
"""By q, k and v."""


class Pack(NamedTuple):
    """What a call is about, beside its tensors."""

    lengths: tuple[int, ...]
    """Rows of each document; they add up to S."""
    scale: float
    window: int | None = None
    """Rows a query may look back on, itself included; None: all."""

    def documents(self) -> Iterator[slice]:
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length

    def first(self, rows: int) -> Pack:
        """The same of the first rows alone."""
        starts = accumulate(self.lengths, initial=0)
        cut = (min(length, rows - start) for start, length in zip(starts, self.lengths) if start < rows)
        return self._replace(lengths=tuple(cut))

    @property
    def windowed(self) -> bool:
        return self.window is not None and self.window < max(self.lengths)


class Backend(ABC):
    """One kernel. Tensors are [B, H or K, S, D], in any strides; log-sum-exp is [B, H, S], fp32 (fp64 for fp64)."""

    name: ClassVar[str]
    block_rows: ClassVar[int]
    """A prefix of so many rows, or a multiple, has the bits of the whole run."""

    @abstractmethod
    def refusal(self, q: Tensor, k: Tensor, pack: Pack) -> str | None:
        """Why it cannot be used for such tensors; None: it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of all rows."""

    @abstractmethod
    def prefix(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, rows: int, out: Tensor, lse: Tensor) -> None:
        """Fill in the first `rows` rows of output and log-sum-exp, with the bits of `forward`."""

    @abstractmethod
    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack) -> Grads:
        """Gradients by q, k, v, with output and log-sum-exp as given."""
