"""What a job may say about adapters: one schema for each, from their folders. Neither torch nor ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from farspan.trainer.adapters.full import FullFineTune
from farspan.trainer.adapters.lora.config import LoRA
from farspan.trainer.adapters.paca.config import PaCA
from farspan.trainer.adapters.peqa.config import PEQA
from farspan.trainer.adapters.reversible.config import Inside, Reversible
from farspan.trainer.adapters.s2a.config import S2A
from farspan.trainer.adapters.unipt.config import UniPT

__all__ = ["Adapter", "FullFineTune", "Inside", "LoRA", "PEQA", "PaCA", "Reversible", "S2A", "UniPT", "inner"]

Adapter = Annotated[LoRA | FullFineTune | PaCA | PEQA | Reversible | S2A | UniPT, Field(discriminator="type")]


def inner(adapter: Adapter) -> Inside | S2A | UniPT:
    """What trains inside the layers."""
    return adapter.inside if isinstance(adapter, Reversible) else adapter
