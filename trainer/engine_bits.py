"""An engine around another one that also learns the bits of the exchange (`trainer.parallel.learned_bits`).

Bits are chosen before a step and their gates moved after it. The gates are fragments beside the optimizer's state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import distributed as dist

from farspan.trainer.engine import Engine, Fragment

if TYPE_CHECKING:
    from torch import Tensor

    from farspan.trainer.parallel.learned_bits import LearnedBits

NAME, KIND = "exchange_bits", "gates"
"""Of the fragments."""


class BitsEngine(Engine):
    """See the module."""

    def __init__(self, inner: Engine, bits: LearnedBits) -> None:
        self.inner, self.bits = inner, bits
        self.module, self.trainable = inner.module, inner.trainable
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._done = 0

    def begin(self, *, lr: float) -> None:
        self.bits.begin(self._done + 1)
        self.inner.begin(lr=lr)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.inner.backward(loss, last=last)

    def step(self, *, lr: float, clip_norm: float | None) -> float:
        norm = self.inner.step(lr=lr, clip_norm=clip_norm)
        if math.isfinite(norm):
            self.bits.update()
            self._done += 1
        return norm

    def fragments(self) -> list[Fragment]:
        state, (start, end) = self.bits.state, self._owned(self._rank)
        own = [Fragment(NAME, KIND, tuple(state.shape), start, state[start:end])] if start < end else []
        return [*self.inner.fragments(), *own]

    def restored(self, *, step: int) -> None:
        self.inner.restored(step=step)
        self._done = step
        if self._world_size == 1:
            return
        whole = self.bits.state.to(self.bits.device)
        for owner in range(self._world_size):
            start, end = self._owned(owner)
            if start < end:
                dist.broadcast(whole[start:end], src=owner)
        self.bits.state.copy_(whole)

    def full_gradients(self) -> dict[str, Tensor]:
        return self.inner.full_gradients()

    def close(self) -> None:
        self.inner.close()

    def _owned(self, rank: int) -> tuple[int, int]:
        """First and last (exclusive) element of the state that a rank answers for."""
        numel = self.bits.state.numel()
        return numel * rank // self._world_size, numel * (rank + 1) // self._world_size
