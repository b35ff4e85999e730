"""Couples the decoder layers of a model reversibly, from outside (`farspan.memory.coupling` has how).

Bottleneck adapters become children of their layers, so that they are found, saved and restored like other parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farspan.errors import JobError
from farspan.memory.coupling import Coupling
from farspan.trainer.adapters.config import Reversible
from farspan.trainer.adapters.layers import decoder_layers

CHILD = "reversible_adapter"
"""Name of a layer's bottleneck adapter."""


class Bottleneck(nn.Module):
    """up(relu(down(x))), zero at first. [.., d] -> [.., d]."""

    def __init__(self, hidden: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(functional.relu(self.down(x)))


def couple(causal: Any, adapter: Reversible, *, seed: int) -> Coupling:
    """Add the adapters and rewire the layers.

    Args:
        causal: a causal language model; what trains inside its decoder layers is there already.
        seed: of the adapters' first weights; the same on every rank.

    Raises:
        JobError: the model's layers cannot be coupled so.
    """
    layers, hidden = decoder_layers(causal), causal.config.get_text_config().hidden_size
    some = causal.get_input_embeddings().weight
    if adapter.width and adapter.wiring == 3:
        raise JobError(
            "wiring 3 has no place for bottleneck adapters",
            at="adapter.width",
            why="both of its functions are parts of the pretrained layer",
            try_="--set adapter.width=0, or --set adapter.wiring=1",
        )
    if hidden % 8 and adapter.form == "exact":
        raise JobError(
            f"a hidden size of {hidden} does not pack into bytes",
            at="adapter.type",
            why="the side bits of 8 elements make whole bytes",
            try_="--set adapter.form=float, or --set adapter.type=lora",
        )
    adapters: list[nn.Module | None] = [None] * len(layers)
    if adapter.width:
        with torch.random.fork_rng(devices=[]), torch.device("cpu" if some.device.type != "meta" else "meta"):
            torch.manual_seed(seed + 1)  # the adapters inside were drawn from `seed`
            # above the last layer nothing reads the stream that wiring 1's adapter adds to
            for index, layer in enumerate(layers[:-1] if adapter.wiring == 1 else layers):
                adapters[index] = Bottleneck(hidden, adapter.width, dtype=some.dtype, device=some.device)
                setattr(layer, CHILD, adapters[index])
    coupling = Coupling(
        layers,
        wiring=adapter.wiring,
        bits=adapter.bits,
        adapters=adapters,
        store=adapter.store,
        form=adapter.form,
        factors=adapter.lambda_beta,
        anchor_every=adapter.anchors_planned("bf16" if some.dtype == torch.bfloat16 else "fp32"),
        tolerance=adapter.tolerance,
    )
    if adapter.fraction_bits != "auto":
        coupling.fraction = adapter.fraction_bits
    return coupling
