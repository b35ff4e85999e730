"""An engine that also trains integers: PV-Tuning's alternation around a plain engine.

Every `every`-th optimizer step is a V step. In its last micro-batch the layers propose new integers
(`trainer.adapters.pv`), which replace the old ones where the optimizer would have updated; the scales rest, while
their moments go on. All other steps are the plain engine's. Integers are fragments beside the optimizer's state, as
fp32 words that nobody computes with.

The plain engine alone: sharded ones reduce gradients in buckets of their own and know nothing of integers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from farspan.trainer.adapters.pv.apply import coded_layers
from farspan.trainer.engine import Engine, Fragment
from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.optimizer import lr_at

if TYPE_CHECKING:
    from torch import Tensor, nn

    from farspan.trainer.adapters.pv.apply import PVLinear
    from farspan.trainer.adapters.pv.config import PV
    from farspan.trainer.config import Optimizer

KIND = "codes"
"""Of fragments."""


def with_codes(plain: PlainEngine, module: nn.Module, optim: Optimizer) -> Engine:
    """The plain engine, or one around it where the module has integers to train."""
    layers = coded_layers(module).values()
    if not layers:
        return plain
    # as their scales are called, which are named without what the loss wraps around a model
    names = {id(parameter): name.rpartition(".")[0] for name, parameter in plain.trainable.items()}
    named = {names[id(layer.scale)]: layer for layer in layers}
    return CodesEngine(plain, named, next(iter(layers)).adapter, optim)


class CodesEngine(Engine):
    """See the module.

    Args:
        plain: trains the scales.
        layers: whose integers are trained, by name.
        adapter: how.
        optim: whose schedule shortens the V steps as it lowers the learning rate.
    """

    def __init__(self, plain: PlainEngine, layers: dict[str, PVLinear], adapter: PV, optim: Optimizer) -> None:
        self.plain, self.layers, self.adapter, self._optim = plain, layers, adapter, optim
        self.module, self.trainable = plain.module, plain.trainable
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._done = 0
        self.changed = 0
        """Integers that the last V step changed."""

    @property
    def chooses(self) -> bool:
        """Whether the step under way is a V step."""
        return (self._done + 1) % self.adapter.every == 0

    @property
    def trust(self) -> float:
        """Of the step under way."""
        asked = self._optim.warmup_steps
        lr = lr_at(self._done + 1, self._optim, 0 if asked == "auto" else asked)
        return self.adapter.trust * lr / self._optim.lr

    def backward(self, loss: Tensor, *, last: bool) -> None:
        trust = self.trust if last and self.chooses else None
        for layer in self.layers.values():
            layer.trust = trust
        try:
            self.plain.backward(loss, last=last)
        finally:
            for layer in self.layers.values():
                layer.trust = None

    def step(self, *, lr: float, clip_norm: float | None) -> float:
        chooses = self.chooses
        norm = self.plain.step(lr=0.0 if chooses else lr, clip_norm=clip_norm)
        if math.isfinite(norm):
            self._done += 1
            if chooses:
                self.changed = sum(layer.take_proposed() for layer in self.layers.values())
        for layer in self.layers.values():
            layer.proposed = None
        return norm

    def fragments(self) -> list[Fragment]:
        found = self.plain.fragments()
        for name, words in self._words().items():
            start, end = self._owned(words.numel(), self._rank)
            if start < end:
                found.append(Fragment(f"{name}.{KIND}", KIND, tuple(words.shape), start, words[start:end]))
        return found

    def restored(self, *, step: int) -> None:
        self.plain.restored(step=step)
        self._done = step
        for words in self._words().values():
            for owner in range(self._world_size if self._world_size > 1 else 0):
                start, end = self._owned(words.numel(), owner)
                if start < end:
                    dist.broadcast(words[start:end].view(torch.uint8), src=owner)

    def full_gradients(self) -> dict[str, Tensor]:
        return self.plain.full_gradients()

    def close(self) -> None:
        self.plain.close()

    def _owned(self, numel: int, rank: int) -> tuple[int, int]:
        """First and last (exclusive) of the words that a rank answers for."""
        return numel * rank // self._world_size, numel * (rank + 1) // self._world_size

    def _words(self) -> dict[str, Tensor]:
        return {name: layer.words() for name, layer in self.layers.items()}
