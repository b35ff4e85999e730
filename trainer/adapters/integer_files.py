"""Matrices of integers on disk, of methods that end in them (L4Q, PV-Tuning).

    <kind>.json            bits, the adapter, the base model
    <kind>.safetensors     of each linear layer `.packed` uint8 [outputs, inputs * bits / 8], and [outputs, groups]
                           each `.scale` fp32, `.zero` uint8 and, where there are offsets, `.offset` fp32

W = scale (integer - zero) + offset, computed in fp32 and rounded to the model's dtype: the very bits of training. Of 8
elements in a row `bits` bytes are stored, byte j with bit j of each, the first element lowest. What is not a matrix of
integers is the base model's. `farspan export --merged` writes the same model in plain weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farspan.trainer.adapters import own_files
from farspan.trainer.adapters.l4q.apply import L4QLinear
from farspan.trainer.adapters.own_files import Kind
from farspan.trainer.adapters.pv.apply import PVLinear
from farspan.trainer.bases.linear import IntegerLinear

PARTS = ("packed", "scale", "zero", "offset")


def round_off(model: nn.Module) -> dict[str, IntegerLinear]:
    """Replace the layers that end in integers by these; by name."""
    found = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, L4QLinear | PVLinear):
            found[name] = module.rounded()
            model.set_submodule(name, found[name])
    return found


def tensors_of(layers: dict[str, IntegerLinear]) -> dict[str, Tensor]:
    """By their names on disk."""
    found = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in PARTS}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def save(
    folder: Path,
    kind: Kind,
    adapter: Any,
    *,
    base: str,
    revision: str | None,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
) -> None:
    """Write both files.

    Args:
        adapter: as the job has it.
        tensors: of `tensors_of`.
    """
    told = {"bits": adapter.bits, "adapter": adapter.model_dump(mode="json"), "base_model": base, "revision": revision}
    own_files.write(folder, kind, told, dtype=dtype, tensors=tensors)


def load(
    folder: Path | str, kind: Kind, *, base: Any = None, dtype: torch.dtype | str = "auto", **options: Any
) -> nn.Module:
    """The base model with its matrices of integers.

    Args:
        folder: an export of a run with that adapter.
        base: the loaded base model, changed in place; None: from where the folder says.
        dtype, options: for `from_pretrained`; `auto`: as in training.

    Raises:
        CheckpointError: the folder is no such export, or belongs to another model.
    """
    folder = Path(folder)
    told, tensors = own_files.read(folder, kind)
    base = own_files.open_base(told, base, dtype, **options)
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        try:
            plain = base.get_submodule(name)
            packed, scale, zero = (tensors[f"{name}.{part}"] for part in PARTS[:3])
            made = IntegerLinear(
                packed,
                told["bits"],
                scale,
                zero,
                tensors.get(f"{name}.offset"),
                bias=plain.bias,
                dtype=plain.weight.dtype,
            )
            if (made.out_features, made.in_features) != tuple(plain.weight.shape):
                raise KeyError(f"integers of a matrix of {[made.out_features, made.in_features]}")
        except (AttributeError, KeyError) as error:
            why = f"{name} of this model: {str(error).split(chr(10), maxsplit=1)[0]}"
            raise own_files.wrong(folder, kind, why) from error
        base.set_submodule(name, made.to(plain.weight.device))
    return base.eval()
