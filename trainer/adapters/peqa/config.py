"""What a job may say about PEQA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Schema


class PEQA(Schema):
    """Round the linear layers of the decoder layers to a few bits and train their scales alone.

    The integers never change, so that a task is a few scales and what runs is an integer model still. Source: Kim et
    al., Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization, 2023.
    """

    type: Literal["peqa"] = "peqa"
    bits: int = Field(default=4, ge=2, le=8)
    group: int | None = Field(default=None, ge=8)
    """Elements of a row that share a scale; null: the whole row, which needs no input to be stored for backward."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers, as peft matches them; the others stay in 16 bits and frozen."""
