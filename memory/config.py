"""What a user may say about memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Count, Schema


class MemoryBudget(Schema):
    """How activations are treated during a step."""

    plan: Literal["keep", "recompute"] = "keep"
    """`keep` stores what autograd saves; `recompute` stores layer inputs only and runs each layer twice."""

    loss_tile: Count = Field(default=2048, ge=16)
    """Rows of logits that exist at one time; the whole logits matrix is never made."""

    mlp_tile: Count | Literal["off"] = "off"
    """Rows of the MLP that exist at one time in forward and backward; the MLP then runs twice."""
