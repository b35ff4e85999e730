"""What a job may say about PV-Tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Schema


class PV(Schema):
    """Round the linear layers of the decoder layers to a few bits and train both what is left: scales and integers.

    Most steps train the scales (P), as PEQA does. Every `every`-th chooses new integers (V): a gradient step on the few
    weights that it would change most, so long that some reach another integer, to which they are rounded. What is
    stored stays integers and scales throughout; no weight has a copy in floating point. Source: Malinovskii et al.,
    PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression, 2024.
    """

    type: Literal["pv"] = "pv"
    bits: int = Field(default=4, ge=2, le=8)
    group: int | None = Field(default=None, ge=8)
    """Elements of a row that share a scale; null: the whole row."""
    share: float = Field(default=0.01, gt=0, le=1)
    """Of a matrix's weights, those that a V step moves at most: the ones of largest gradient."""
    trust: float = Field(default=0.01, gt=0, le=1)
    """A V step moves a matrix by at most this share of its length; less as the schedule lowers the learning rate."""
    every: int = Field(default=2, ge=2)
    """Every so manyth step is a V step, and scales rest in it. It reads the gradient of the step's last micro-batch:
    gradients as large as the weights are not kept between micro-batches."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers, as peft matches them; the others stay in 16 bits and frozen."""
