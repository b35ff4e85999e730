"""AdamW whose moments are stored in 8 bits: decoded, updated and encoded again some blocks at a time.

The update uses the moments before they are rounded, as bitsandbytes and COAT do. Costs 2 bytes a weight and a little
for scales instead of 8; on the way there is fp32 for `CHUNK_ELEMENTS` at a time, whatever the size of the model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from farspan.kernels.optimizer_states import BLOCK, CHUNK_ELEMENTS, GROUP, dynamic8, expanded8
from farspan.trainer.optimizers.adam import adam_direction
from farspan.trainer.optimizers.rule import HasBetas, Rule

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Coded(Rule):
    """AdamW over coded moments."""

    group: int
    """Elements that share a scale."""
    parts: tuple[str, ...]
    """Suffixes of what a moment becomes."""

    def __init__(self, masters: Mapping[str, Tensor], decay: Mapping[str, float], betas: HasBetas) -> None:
        super().__init__(masters, decay)
        self.betas = betas
        for name in masters:
            zero = torch.zeros_like(self.flat(name))
            self.states[name] = {
                f"{moment}{part}": coded.clone()  # without the end that filled up a group
                for moment in MOMENTS
                for part, coded in zip(self.parts, self.encode(zero, moment))
            }

    @abstractmethod
    def encode(self, x_N: Tensor, moment: str) -> tuple[Tensor, ...]:
        """What a piece of a moment becomes, in the order of `parts`."""

    @abstractmethod
    def decode(self, *parts: Tensor, moment: str) -> Tensor:
        """fp32 [N]."""

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, count: int) -> None:
        for name, gradient in gradients.items():
            master = self.flat(name)
            chunk = CHUNK_ELEMENTS.get(master.device.type, CHUNK_ELEMENTS["cuda"])
            for first in range(0, master.numel(), chunk):
                self._step(name, slice(first, min(master.numel(), first + chunk)), gradient.view(-1), lr, count)

    def _step(self, name: str, piece: slice, gradient_N: Tensor, lr: float, count: int) -> None:
        groups = slice(piece.start // self.group, -(-piece.stop // self.group))
        coded = {
            moment: [self.states[name][f"{moment}{part}"][piece if not part else groups] for part in self.parts]
            for moment in MOMENTS
        }
        exp_avg, exp_avg_sq = (self.decode(*parts, moment=moment) for moment, parts in coded.items())
        direction = adam_direction(gradient_N[piece], exp_avg, exp_avg_sq, self.betas, count)
        master = self.flat(name)[piece]
        master.mul_(1 - lr * self.decay[name]).sub_(direction, alpha=lr)
        del direction
        for (moment, parts), value in zip(coded.items(), (exp_avg, exp_avg_sq)):
            for part, new in zip(parts, self.encode(value, moment)):
                part.copy_(new)


class AdamW8bit(_Coded):
    """Dynamic code in blocks of 256. States `exp_avg`, `exp_avg_sq` uint8 [N], `*.largest` fp32 [ceil(N / 256)]."""

    group = BLOCK
    parts = ("", ".largest")
    least_elements = 4096
    """Smaller tensors cost nothing in fp32, and are mostly norms and biases (bitsandbytes' default)."""

    def encode(self, x_N: Tensor, moment: str) -> tuple[Tensor, ...]:
        return dynamic8.encode(x_N, signed=moment == "exp_avg")

    def decode(self, *parts: Tensor, moment: str) -> Tensor:
        return dynamic8.decode(*parts, signed=moment == "exp_avg")


class ExpandedFP8(_Coded):
    """COAT: E4M3 in groups of 128 with dynamic range expansion. States `exp_avg`, `exp_avg_sq` uint8 [N], `*.largest`
    fp32 and `*.power` uint8 [ceil(N / 128)]."""

    group = GROUP
    parts = ("", ".largest", ".power")

    def encode(self, x_N: Tensor, moment: str) -> tuple[Tensor, ...]:
        return expanded8.encode(x_N)

    def decode(self, *parts: Tensor, moment: str) -> Tensor:
        return expanded8.decode(*parts)
