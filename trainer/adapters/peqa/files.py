"""Trained scales on disk: a task of a few hundred kilobytes.

    peqa.json            bits and group, the base model
    peqa.safetensors     `<linear layer>.scale` fp32 [outputs, groups]

The integers are made from the base again, as they were made for training. `farspan export --merged` writes the model
that the scales and integers stand for, in 16 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farspan.trainer.adapters import own_files
from farspan.trainer.adapters.peqa.apply import add_scales
from farspan.trainer.adapters.peqa.config import PEQA


def save(
    folder: Path, adapter: PEQA, *, base: str, revision: str | None, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> None:
    """Write both files; `tensors` by their names on disk."""
    told = {"adapter": adapter.model_dump(mode="json"), "base_model": base, "revision": revision}
    own_files.write(folder, "peqa", told, dtype=dtype, tensors=tensors)


def load(folder: Path | str, *, base: Any = None, dtype: torch.dtype | str = "auto", **options: Any) -> nn.Module:
    """The base model rounded, with the trained scales.

    Args:
        folder: an export of a run with `PEQA`.
        base: the loaded base model, changed in place; None: from where the folder says.
        dtype, options: for `from_pretrained`; `auto`: as in training, in which the base was rounded.

    Raises:
        CheckpointError: the folder is no such export, or belongs to another model.
    """
    folder = Path(folder)
    told, tensors = own_files.read(folder, "peqa")
    base = own_files.open_base(told, base, dtype, **options)
    names = add_scales(base, PEQA.model_validate(told["adapter"]))
    if {f"{name}.scale" for name in names} != tensors.keys():
        why = f"{len(tensors)} layers have scales there, {len(names)} in this model"
        raise own_files.wrong(folder, "peqa", why)
    for name in names:
        layer = base.get_submodule(name)
        trained = tensors[f"{name}.scale"]
        if layer.scale.shape != trained.shape:
            why = f"{name} has scales of shape {list(layer.scale.shape)} in this model"
            raise own_files.wrong(folder, "peqa", why)
        layer.fresh_scale = layer.scale.detach().clone()
        layer.scale.data.copy_(trained)
    return base.eval()
