"""Which rule steps which parameter, for each optimizer a job may name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from farspan.trainer.optimizers.adam import AdamW, TrustRatio
from farspan.trainer.optimizers.config import COAT, LAMB, Adam, AdamW8bit, DCTAdamW, GaLore, Muon
from farspan.trainer.optimizers.eight_bit import AdamW8bit as AdamW8bitRule
from farspan.trainer.optimizers.eight_bit import ExpandedFP8
from farspan.trainer.optimizers.low_rank import Cosines, SingularVectors
from farspan.trainer.optimizers.muon import Orthogonal
from farspan.trainer.optimizers.rule import Parts, Rule


def make_rule(
    optim: Adam, masters: Mapping[str, Tensor], decay: Mapping[str, float], *, outside: Collection[str], narrow: bool
) -> Rule:
    """State for these masters, at zero.

    Args:
        outside: names of embedding and output projection: matrices whose rows are tokens.
        narrow: the model computes in bf16.
    """

    def of(names: Collection[str]) -> tuple[dict[str, Tensor], dict[str, float]]:
        return {name: masters[name] for name in names}, {name: decay[name] for name in names}

    def split(chosen: list[str]) -> tuple[tuple[dict[str, Tensor], dict[str, float]], AdamW]:
        return of(chosen), AdamW(*of([name for name in masters if name not in set(chosen)]), optim)

    if isinstance(optim, LAMB):
        return TrustRatio(masters, decay, optim)
    if isinstance(optim, COAT):
        return ExpandedFP8(masters, decay, optim)
    if isinstance(optim, AdamW8bit):
        large, rest = split([name for name, m in masters.items() if m.numel() >= AdamW8bitRule.least_elements])
        return Parts([AdamW8bitRule(*large, optim), rest])
    inside = [name for name, master in masters.items() if master.dim() == 2 and name not in outside]
    if isinstance(optim, Muon):
        matrices, rest = split(inside)
        return Parts([Orthogonal(*matrices, optim, torch.bfloat16 if narrow else torch.float32), rest])
    if isinstance(optim, GaLore | DCTAdamW):
        wider, rest = split([name for name in inside if min(masters[name].shape) > optim.rank])
        rule = SingularVectors(*wider, optim) if isinstance(optim, GaLore) else Cosines(*wider, optim)
        return Parts([rule, rest])
    return AdamW(masters, decay, optim)
