"""What a job may say about UniPT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Schema


class UniPT(Schema):
    """Train a narrow network that reads what the layers of a frozen model give, and adds to its final hidden states.

    No gradient passes through the model, whose layers store nothing, whatever it is stored in. What is trained is made
    causal: a token sees no later one, and no other document. Source: Diao et al., UniPT: Universal Parallel Tuning for
    Transfer Learning with Efficient Parameter and Memory, 2023.
    """

    type: Literal["unipt"] = "unipt"
    reduction: int = Field(default=8, ge=1)
    """The network's width is the hidden size divided by it."""
    store: Literal["nothing", "inputs"] = "nothing"
    """The first matrix behind each layer needs that layer's output for its gradient: the frozen model runs once more in
    backward (`nothing`), or the outputs are kept, as many bytes as plain checkpointing keeps (`inputs`)."""
