"""What a job may say about adapters: one schema for each, from their folders. Neither torch nor ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from farspan.trainer.adapters.full import FullFineTune
from farspan.trainer.adapters.l4q.config import L4Q
from farspan.trainer.adapters.lora.config import LoRA
from farspan.trainer.adapters.paca.config import PaCA
from farspan.trainer.adapters.peqa.config import PEQA
from farspan.trainer.adapters.pv.config import PV
from farspan.trainer.adapters.reversible.config import Inside, Reversible
from farspan.trainer.adapters.s2a.config import S2A
from farspan.trainer.adapters.unipt.config import UniPT

__all__ = [
    "Adapter",
    "FullFineTune",
    "Inside",
    "L4Q",
    "LoRA",
    "PEQA",
    "PV",
    "PaCA",
    "Reversible",
    "S2A",
    "UniPT",
    "inner",
]

Adapter = Annotated[
    LoRA | FullFineTune | PaCA | PEQA | L4Q | PV | Reversible | S2A | UniPT, Field(discriminator="type")
]


def inner(adapter: Adapter) -> Inside | PV | S2A | UniPT:
    """What trains inside the layers."""
    return adapter.inside if isinstance(adapter, Reversible) else adapter
