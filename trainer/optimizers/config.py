"""What a job may say about its optimizer. Neither torch nor ray.

Every optimizer shares schedule, weight decay and clipping. AdamW (`Optim`) may be sharded by DeepSpeed. The others keep
state of whole parameters: at ZeRO 0 each parameter has one rank that holds its state and takes its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from farspan.schema import Count, Ratio, Schema


class Adam(Schema):
    """What every optimizer has: steps, their size and rate; averages of gradients and of their squares."""

    lr: float = Field(default=1e-4, gt=0)
    steps: int = Field(default=100, ge=1)
    """Optimizer steps of the whole job."""
    tokens_per_step: Count | Literal["auto"] = "auto"
    """Global tokens of one optimizer step: a multiple of context x dp. `auto`: one pack per dp group."""
    warmup_steps: int | Literal["auto"] = "auto"
    """Linear warm-up. `auto`: 3 % of the steps, at least one."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to the floor, or stable then linear decay (WSD), or flat."""
    min_lr_ratio: Ratio = 0.1
    """The floor of the schedule as a share of lr."""
    decay_share: Ratio = 0.2
    """WSD: share of all steps spent decaying."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only (no norms, no biases)."""
    beta1: Ratio = 0.9
    beta2: Ratio = 0.95
    eps: float = Field(default=1e-8, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Global gradient norm is clipped to this; null: never."""
    in_backward: bool = False
    """Update a weight as soon as backward has its gradient, which then goes: no two layers' gradients exist at a time.
    Needs one micro-batch a step, no clipping, ZeRO 0."""
    seed: int = 0
    """Order of the data, dropout, adapter initialisation."""


class Optim(Adam):
    """AdamW, fused; by DeepSpeed over all ranks (ZeRO), on the host too (CPU Adam).

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """

    type: Literal["adamw"] = "adamw"


class AdamW8bit(Adam):
    """AdamW with both moments in 8 bits: bitsandbytes' dynamic code in blocks of 256. Tensors of fewer than 4,096
    elements keep theirs in fp32.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, https://arxiv.org/abs/2110.02861
    """

    type: Literal["adamw8bit"] = "adamw8bit"


class COAT(Adam):
    """AdamW with both moments in FP8, their range expanded by groups of 128.

    Source: Xi et al., COAT, 2024, https://arxiv.org/abs/2410.19313
    """

    type: Literal["coat"] = "coat"


class LowRank(Adam):
    """Adam in a subspace of each matrix of the decoder layers; what is as narrow as the subspace, the embedding, the
    output projection, vectors, and experts, which transformers stacks in one tensor, have AdamW."""

    rank: int = Field(default=128, ge=1)
    """Width of the moments."""
    every: int = Field(default=200, ge=1)
    """Steps between two choices of the subspace."""
    scale: float = Field(default=1.0, gt=0)
    """Of the learning rate inside the subspace."""


class DCTAdamW(LowRank):
    """AdamW on the r strongest cosines of a gradient's rows. Chosen among a fixed basis, a subspace is r integers.

    Source: SVD-Free Low-Rank Adaptive Gradient Optimization (later: FFT-based Dynamic Subspace Selection), 2025,
    https://arxiv.org/abs/2505.17967
    """

    type: Literal["dct_adamw"] = "dct_adamw"
    norm: Literal["l1", "l2"] = "l2"
    """What a cosine's strength is: the norm of its coefficients over all rows."""
    feedback: Literal["none", "8bit", "4bit"] = "none"
    """What the subspace leaves out of a gradient is added to the next one, stored in so many bits. It grows until the
    next choice of a subspace: choose often, with `every` of a few steps."""


class GaLore(LowRank):
    """Adam on a gradient projected to its largest singular vectors. What the others are measured by: an SVD of every
    matrix each `every` steps, and the projector stored.

    Source: Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507
    """

    type: Literal["galore"] = "galore"
    scale: float = Field(default=0.25, gt=0)
    """Of the learning rate inside the subspace."""


class LAMB(Adam):
    """Adam whose step on a matrix is as long as its rate says in lengths of the matrix itself.

    Source: You et al., Large Batch Optimization for Deep Learning, 2020, https://arxiv.org/abs/1904.00962
    """

    type: Literal["lamb"] = "lamb"
    trust_min: float = Field(default=0.01, ge=0)
    """Least ratio of a matrix' length to its step's."""
    trust_max: float = Field(default=10.0, gt=0)
    """Largest one."""


class Muon(Adam):
    """Momentum made orthogonal for matrices of the decoder layers, AdamW for the rest (embedding, output projection,
    vectors, stacked experts), both at one rate: a Muon step is as large as AdamW's, element by element, on average.

    Source: Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon; scale of the step: Liu et al., Muon is
    Scalable for LLM Training, 2025, https://arxiv.org/abs/2502.16982
    """

    type: Literal["muon"] = "muon"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations."""


def _named(value: Any) -> Any:
    """A section that names no type is AdamW's, in Python too."""
    return {"type": "adamw", **value} if isinstance(value, Mapping) and "type" not in value else value


Optimizer = Annotated[
    Optim | AdamW8bit | COAT | DCTAdamW | GaLore | LAMB | Muon,
    Field(discriminator="type"),
    BeforeValidator(_named),
]
