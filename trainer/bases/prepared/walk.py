"""Walk through a model's decoder layers and calibrate their matrices, each with what the rounded ones before it give.

Of a layer, linear layers that read the same input (q, k and v; gate and up) are calibrated together, in the order in
which they run; then the layer is run as rounded, and its output is what the next one reads. Two streams of hidden
states are held, the pretrained model's and the rounded one's, and one layer's inputs; the model is in 16 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.bases.prepared.calibrated import Products
from farspan.trainer.batch import rows_of
from farspan.trainer.data.packing import Pack
from farspan.trainer.models import CausalLMLoss

Calibrate = Callable[[str, Tensor, Products], Tensor]
"""Of a linear layer its name, weight and products; returns what it stands for from now on, [N, C]."""


@dataclass
class _Sequence:
    """One calibration sequence on its way up."""

    hidden: Tensor
    rounded: Tensor
    calls: list[dict[str, Any]]
    """What each decoder layer is called with beside its input."""


def walk(causal: Any, names: Sequence[str], packs: Sequence[Pack], calibrate: Calibrate) -> None:
    """Call `calibrate` for every linear layer called `names`, bottom first.

    Args:
        causal: a model with Farspan's attention, in plain layers; left as it was.
    """
    layers = decoder_layers(causal)
    name_of = {id(module): name for name, module in causal.named_modules()}
    with torch.no_grad():
        sequences = [_entered(causal, layers, pack) for pack in packs]
        for index, layer in enumerate(layers):
            prefix = f"{name_of[id(layer)]}."
            inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            _layer(layer, index, inside, sequences, lambda name, w, p, prefix=prefix: calibrate(prefix + name, w, p))  # type: ignore[misc]


def _layer(
    layer: nn.Module, index: int, inside: Sequence[str], sequences: Sequence[_Sequence], calibrate: Calibrate
) -> None:
    inputs: list[dict[str, Tensor]] = []
    for each in sequences:
        caught: dict[str, Tensor] = {}
        with _catching(layer, inside, caught):
            each.hidden = _run(layer, each.hidden, each.calls[index])
        inputs.append(caught)
    rounded = copy.deepcopy(layer)
    for group in _groups(inputs[0]):
        first: Any = layer.get_submodule(group[0])
        products = Products.zeros(first.in_features, first.weight.device)
        for each, caught in zip(sequences, inputs):
            reached: dict[str, Tensor] = {}
            with _catching(rounded, group[:1], reached):
                _run(rounded, each.rounded, each.calls[index])
            columns = first.in_features
            products.add(caught[group[0]].reshape(-1, columns), reached[group[0]].reshape(-1, columns))
        for name in group:
            plain: Any = layer.get_submodule(name)
            own: Any = rounded.get_submodule(name)
            own.weight.data = calibrate(name, plain.weight.detach(), products).to(own.weight)
    for each in sequences:
        each.rounded = _run(rounded, each.rounded, each.calls[index])


def _entered(causal: Any, layers: Sequence[nn.Module], pack: Pack) -> _Sequence:
    """A sequence before the first layer, and what the model calls its layers with."""
    first: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            first.append(args[0] if args else kwargs["hidden_states"])
        calls.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        rows = rows_of(pack, sp=1, sp_index=0, ulysses=None, device=causal.get_input_embeddings().weight.device)
        module = CausalLMLoss(causal, causal, loss_tile=512)
        module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
    finally:
        for each in hooks:
            each.remove()
    return _Sequence(first[0], first[0], calls)


def _run(layer: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    out = layer(hidden, **call)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@contextmanager
def _catching(layer: nn.Module, names: Sequence[str], caught: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the inputs of these linear layers, in the order in which they run."""
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: caught.__setitem__(name, args[0])
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _groups(caught: dict[str, Tensor]) -> list[list[str]]:
    """Names by the input they share, in the order in which they run."""
    groups: dict[int, list[str]] = {}
    for name, x in caught.items():
        groups.setdefault(id(x), []).append(name)
    return list(groups.values())
