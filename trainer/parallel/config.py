"""How rows and heads change ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from farspan.schema import Schema


class ExactExchange(Schema):
    """Everything crosses as it is."""

    type: Literal["exact"] = "exact"


class AMAQ(Schema):
    """Queries, keys, values and outputs of attention cross ranks in codes of few bits, learned channel by channel.

    A channel has least + (most - least) * sigmoid(alpha * Q) bits, Q learned with the model. The average falls from
    `start` to `bits` over the first `settle` of the steps and is then held there; which channels have more than others
    is what is learned. Gradients on their way back have as many bits and are rounded at random. Evaluation and export
    are of the model without codes. Source: AMAQ, 2025, https://arxiv.org/abs/2510.05468.
    """

    type: Literal["amaq"] = "amaq"
    bits: float = Field(default=4.0, ge=1, le=8)
    """Of a channel, on average over the model, once settled."""
    start: float = Field(default=7.0, ge=1, le=8)
    """The same before the first step."""
    settle: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps over which bits fall."""
    least: int = Field(default=2, ge=1, le=8)
    most: int = Field(default=8, ge=1, le=8)
    """Between which a channel's bits lie."""
    alpha: float = Field(default=1.0, gt=0)
    lr: float = Field(default=0.1, ge=0)
    """Of Q, whose gradients are divided by their root mean square over the model. 0: all channels have the same."""
    gradients: Literal["coded", "exact"] = "coded"
    """How gradients cross. Exact ones take four times the bytes of 4 bits."""

    @model_validator(mode="after")
    def _between(self) -> AMAQ:
        for name in ("bits", "start"):
            if not self.least < getattr(self, name) < self.most:
                raise ValueError(
                    f"{name}={getattr(self, name):g} does not lie between least={self.least} and most={self.most}, "
                    "which no channel's bits reach"
                )
        return self


Exchange = Annotated[ExactExchange | AMAQ, Field(discriminator="type")]
