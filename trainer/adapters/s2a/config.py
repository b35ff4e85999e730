"""What a job may say about S2A's structure."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Schema


class S2A(Schema):
    """Train what needs little stored for its gradient: biases (the gradient of the output alone), a prompt of keys and
    values (what attention stores anyway) and narrow side modules. No linear layer stores its input.

    With `memory.activations=int4` the rest is stored in 4 bits, which is the other half of the paper. Source: Jin et
    al., S2A: A Unified Framework for Parameter and Memory Efficient Transfer Learning, 2025.
    """

    type: Literal["s2a"] = "s2a"
    bias: bool = True
    """A trained bias, zero at first, on each linear layer that `target_modules` names."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers with a bias, as peft matches them."""
    prompt: int = Field(default=0, ge=0)
    """Trained keys and values in front of every document, in every layer (prefix tuning, Li and Liang, 2021), in
    peft's file format. Positions of tokens begin behind them, and no row of a pack is taken up. Training then starts
    near the pretrained model and not at it."""
    side: int = Field(default=0, ge=0)
    """Width of the side module beside each MLP: its input pooled to this width, a trained square matrix, zero at
    first, and the result spread again. It stores so many numbers a row. 0: none."""
