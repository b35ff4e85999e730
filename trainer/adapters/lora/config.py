"""What a job may say about LoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Count, Ratio, Schema


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
    keep_rows: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the input's rows that are stored for A's gradient, the largest surely and some of the others: unbiased.
    Forward and the gradients of inputs stay exact. Source: Liu et al., WTA-CRS, 2023."""
    dora: bool = False
    """Train the length of each row of the adapted matrix apart from its direction. Runs by peft's own forward, whose
    cost has to be measured. Source: Liu et al., DoRA, 2024."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "lora_ga", "lorc", "loftq", "apiq"] = "default"
    """How A and B start: peft's uniform, normal, or orthogonal halves whose product is zero; or not at zero, from the
    weights (`pissa`, `olora`) or from the gradient of some packs (`lora_ga`), with a frozen second pair that takes the
    start off again. The base stays as it is; such an adapter is exported with twice the rank. On a base in nf4 or int8,
    where rounding left off: at the singular vectors of what it lost (`lorc`, ZeroQuant-V2), or with the rounding in
    turns (`loftq`). On `base=lq` the default is the low-rank part of its decomposition. `apiq`, on all three, fits
    scales, A and B to what layers put out on some of the data, with inputs from the layers that are rounded already."""
    init_rounds: int = Field(default=5, ge=1)
    """loftq, apiq: roundings, each followed by a low-rank part; the best is kept."""
    init_tokens: Count = Field(default=1024, ge=2)
    """apiq: of a sequence at most."""
    saliency: float = Field(default=0.0, ge=0)
    """apiq: how much weights shall stay what they were, in squares weighted by squared gradients, beside what layers
    put out; 0: not at all. Source: Cao & Aref, Saliency-Aware Partial Retraining, 2025."""
    gamma: float = Field(default=16.0, gt=0)
    """lora_ga: A and B start at out^(1/4) / sqrt(gamma)."""
    init_packs: int = Field(default=8, ge=1)
    """lora_ga: packs whose gradient is taken before the first step, all dp groups together; apiq: sequences."""
