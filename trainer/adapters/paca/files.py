"""Trained columns on disk: a few megabytes beside the base they belong to.

    paca.json            rank, and the base model
    paca.safetensors     `<linear layer>.columns` [outputs, rank] and `<linear layer>.indices` int64 [rank]

No other library has a format for them. Written into the base they cost nothing more to run: `farspan export --merged`
makes a plain model of it that everybody opens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from farspan.errors import CheckpointError
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.load import dequantize, loading_options, quantize, take_over

CONFIG, WEIGHTS = "paca.json", "paca.safetensors"


def save(folder: Path, *, rank: int, base: str, revision: str | None, stored: Base, tensors: dict[str, Tensor]) -> None:
    """Write both files; `tensors` by their names on disk."""
    told = {"format": 1, "rank": rank, "base_model": base, "revision": revision, "base": stored.model_dump(mode="json")}
    told["dtype"] = dtype_of(tensors)
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )


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
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if told["format"] != 1:
            raise ValueError("written by a later version")
        stored = TypeAdapter(Base).validate_python(told["base"])
        dtype = getattr(torch, told["dtype"]) if dtype == "auto" else dtype
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise _wrong(folder, str(error).split("\n", maxsplit=1)[0]) from error
    if base is None:
        where, revision = told["base_model"], told["revision"]
        options |= loading_options(stored, where, revision)
        base = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=dtype, **options)
    else:
        quantize(base, stored)
    take_over(base)
    dequantize(base)
    for name, columns in tensors.items():
        layer_name, _, what = name.rpartition(".")
        if what != "columns":
            continue
        try:
            weight = base.get_submodule(layer_name).weight
            indices = tensors[f"{layer_name}.indices"]
            if columns.shape != (weight.shape[0], indices.numel()) or int(indices.max()) >= weight.shape[1]:
                raise IndexError(f"{list(columns.shape)} columns of a matrix of {list(weight.shape)}")
            weight.data.index_copy_(1, indices.to(weight.device), columns.to(weight))
        except (AttributeError, IndexError, KeyError) as error:
            raise _wrong(folder, f"{layer_name} of this model: {str(error).split(chr(10), maxsplit=1)[0]}") from error
    return base.eval()


def dtype_of(tensors: dict[str, Tensor]) -> str:
    """Of the floating-point ones, as torch calls it."""
    return str(next(t.dtype for t in tensors.values() if t.is_floating_point())).removeprefix("torch.")


def _wrong(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the folder has no trained columns for this model",
        at=str(folder),
        why=why,
        try_="give the export folder of a run with adapter.type=paca, and the base it was trained on",
    )
