"""What a job may say about PaCA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Schema


class PaCA(Schema):
    """Train `rank` input columns of each matrix in place, drawn once at random: no branch beside the matrix, and of the
    input only these columns are stored, once for q, k and v, once for gate and up.

    It learns slower than LoRA at the same learning rate: give it several times LoRA's. Source: Woo et al., PaCA, 2025.
    """

    type: Literal["paca"] = "paca"
    rank: int = Field(default=16, ge=1)
    """Columns of each matrix."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that are trained, as peft matches them."""
