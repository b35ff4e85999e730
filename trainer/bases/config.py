"""What a job may say about the pretrained weights. Neither torch nor ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from farspan.schema import Schema


class Unquantized(Schema):
    """In the dtype of `precision`."""

    type: Literal["bf16"] = "bf16"


class Int8(Schema):
    """8-bit integers with a scale for each row, in the linear layers of the decoder layers."""

    type: Literal["int8"] = "int8"


class NF4(Schema):
    """4-bit NormalFloat in blocks of 64, in the linear layers of the decoder layers.

    Source: Dettmers et al., QLoRA, 2023. The format is bitsandbytes', whose 4-bit checkpoints open as models with this
    base.
    """

    type: Literal["nf4"] = "nf4"
    double: bool = True
    """Quantize the scales too: 4.127 bits a weight instead of 4.5."""


Base = Annotated[Unquantized | Int8 | NF4, Field(discriminator="type")]
