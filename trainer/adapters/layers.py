"""The decoder layers of a causal language model of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(causal: Any) -> list[nn.Module]:
    """Bottom first: what a plan counts."""
    return [layer for layer in causal.get_decoder().modules() if isinstance(layer, GradientCheckpointingLayer)]
