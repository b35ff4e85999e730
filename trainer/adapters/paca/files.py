"""Trained columns on disk: a few megabytes beside the base they belong to.

    paca.json            rank, how the base was stored, the base model
    paca.safetensors     `<linear layer>.columns` [outputs, rank] and `<linear layer>.indices` int64 [rank]

Written into the base they cost nothing more to run: `farspan export --merged` makes a plain model of it that everybody
opens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from farspan.trainer.adapters import own_files
from farspan.trainer.bases.config import Base


def save(
    folder: Path,
    *,
    rank: int,
    base: str,
    revision: str | None,
    stored: Base,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
) -> None:
    """Write both files; `tensors` by their names on disk."""
    told = {"rank": rank, "base_model": base, "revision": revision, "base": stored.model_dump(mode="json")}
    own_files.write(folder, "paca", told, dtype=dtype, tensors=tensors)


def load(folder: Path | str, *, base: Any = None, dtype: torch.dtype | str = "auto", **options: Any) -> nn.Module:
    """The base model with the trained columns written into it.

    Args:
        folder: an export of a run with `PaCA`.
        base: the loaded base model, changed in place; None: from where the folder says. Rounded as it was in training.
        dtype, options: for `from_pretrained`; `auto`: as in training, in which a quantized base was rounded.

    Raises:
        CheckpointError: the folder is no such export, or belongs to another model.
    """
    folder = Path(folder)
    told, tensors = own_files.read(folder, "paca")
    stored = TypeAdapter(Base).validate_python(told["base"])
    base = own_files.open_base(told, base, dtype, stored, **options)
    for name, columns in tensors.items():
        layer_name, _, what = name.rpartition(".")
        if what != "columns":
            continue
        try:
            weight, indices = base.get_submodule(layer_name).weight, tensors[f"{layer_name}.indices"]
            if columns.shape != (weight.shape[0], indices.numel()) or int(indices.max()) >= weight.shape[1]:
                raise IndexError(f"{list(columns.shape)} columns of a matrix of {list(weight.shape)}")
        except (AttributeError, IndexError, KeyError) as error:
            why = f"{layer_name} of this model: {str(error).split(chr(10), maxsplit=1)[0]}"
            raise own_files.wrong(folder, "paca", why) from error
        weight.data.index_copy_(1, indices.to(weight.device), columns.to(weight))
    return base.eval()
