"""What a job may say about L4Q."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Schema


class L4Q(Schema):
    """Train low-rank adapters and the rounding of the matrices they are merged into, together.

    Every forward rounds W + s B A to a few bits, with a trained step and offset for each group: what was trained is
    what runs as integers, with no branch beside it. W stays in 16 bits while it trains. Source: Jeon et al., L4Q:
    Parameter Efficient Quantization-Aware Training on Large Language Models via LoRA-wise LSQ, 2024.
    """

    type: Literal["l4q"] = "l4q"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scale of B A is alpha / rank; by default it is 2."""
    bits: int = Field(default=4, ge=2, le=8)
    group: int | None = Field(default=None, ge=8)
    """Elements of a row that share a step and an offset; null: the whole row."""
    start: Literal["minmax", "lsq"] = "minmax"
    """First steps and offsets: from the smallest to the largest of a group, so that nothing is clipped; or those of
    LSQ+ (Bhalgat et al., 2020): mean and three standard deviations, about zero, which clips what lies beyond."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers, as peft matches them; the others stay in 16 bits and frozen."""
