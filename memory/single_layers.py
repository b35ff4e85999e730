"""Single layers of a whole model, run alone: for measuring them and for testing what is done to them.

A decoder layer needs more than hidden states: position embeddings, masks, document boundaries, all made by the model
around it. So the whole model is called once, as in training, with every layer passed over: transformers hands each
layer's call, all arguments bound but hidden states, to the function in the place of checkpointing. Such a call can then
be run on any hidden states of the same shape. Costs embedding and final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""What transformers calls in the place of checkpointing: (call, hidden states) -> hidden states."""


def layer_kind(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that compute and cost the same: class, attention, tiles, dropout, parameters."""
    window = getattr(getattr(layer, "self_attn", None), "sliding_window", None)
    attention = getattr(layer, "attention_type", None) or getattr(layer, "layer_type", None)
    tiles = tuple(getattr(module, "tiled_rows", None) for module in layer.modules() if hasattr(module, "tiled_rows"))
    dropout = tuple(module.p for module in layer.modules() if isinstance(module, nn.Dropout))
    parameters = tuple(
        # under ZeRO-3 a parameter that is not gathered is empty and keeps its shape beside it
        (name, tuple(getattr(p, "ds_shape", p.shape)), p.dtype, p.requires_grad)
        for name, p in layer.named_parameters()
    )
    return type(layer).__name__, attention, window, tiles, dropout, parameters


@contextmanager
def nothing_zero(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Adapters begin with a factor of zeros, which would make the other factor's gradient zero however wrong."""
    zeros = [p for p in parameters if not p.detach().any()]
    try:
        for p in zeros:
            p.data.normal_(std=0.02)
        yield
    finally:
        for p in zeros:
            p.data.zero_()


@contextmanager
def hooked(layers: list[nn.Module], hooks: Mapping[int, Hook]) -> Iterator[None]:
    """Inside, these layers are replaced by their hooks and all others passed over. Training mode only."""
    before = [(layer.gradient_checkpointing, getattr(layer, "_gradient_checkpointing_func", None)) for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = hooks.get(index, lambda _, x: x)  # type: ignore[assignment]
        yield
    finally:
        for layer, (on, function) in zip(layers, before):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = on, function  # type: ignore[assignment]


def calls_of(layers: list[nn.Module], run: Callable[[], object]) -> tuple[list[Callable[[Tensor], Tensor]], Tensor]:
    """Every layer's call, and the hidden states the first one was given.

    Args:
        layers: decoder layers in training mode, bottom first.
        run: calls the whole model.
    """
    found: dict[int, Callable[[Tensor], Tensor]] = {}
    given: list[Tensor] = []

    def catch(index: int, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        found[index] = call
        given.append(x)
        return x

    with torch.no_grad(), hooked(layers, {index: partial(catch, index) for index in range(len(layers))}):
        run()
    assert len(found) == len(layers), "a decoder layer did not run, or not in training mode"
    return [found[index] for index in range(len(layers))], given[0]
