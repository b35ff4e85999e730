"""What a job may say about LoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Ratio, Schema


class LoRA(Schema):
    """Low-rank adapters in peft's format. Source: Hu et al., LoRA, 2021."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the adapter is alpha / rank, with `rslora` alpha / sqrt(rank); by default it is 2 either way."""
    dropout: Ratio = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, as peft matches them."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole and stored beside the adapter (`lm_head`, `embed_tokens`)."""
    rslora: bool = False
    """Scale by sqrt(rank), so that high ranks learn as fast. Source: Kalajdzievski, rsLoRA, 2023."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How A (and, for `orthogonal`, B) start: peft's uniform, normal, or orthogonal halves whose product is zero. None
    of them changes the base, so that the adapter opens on the base it was made for."""
