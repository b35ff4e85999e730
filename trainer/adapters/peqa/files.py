"""Trained scales on disk: a task of a few megabytes.

    peqa.json            bits and group, and the base model
    peqa.safetensors     `<linear layer>.scale` fp32 [outputs, groups]

The integers are made from the base again, as they were made for training. `farspan export --merged` writes the model
that the scales and integers stand for, in 16 bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from farspan.errors import CheckpointError
from farspan.trainer.adapters.peqa.apply import add_scales
from farspan.trainer.adapters.peqa.config import PEQA

CONFIG, WEIGHTS = "peqa.json", "peqa.safetensors"


def save(
    folder: Path, adapter: PEQA, *, base: str, revision: str | None, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> None:
    """Write both files.

    Args:
        dtype: of the weights that were rounded.
        tensors: by their names on disk.
    """
    told = {"format": 1, "adapter": adapter.model_dump(mode="json"), "base_model": base, "revision": revision}
    told["dtype"] = str(dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


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
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if told["format"] != 1:
            raise ValueError("written by a later version")
        adapter = PEQA.model_validate(told["adapter"])
        dtype = getattr(torch, told["dtype"]) if dtype == "auto" else dtype
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise _wrong(folder, str(error).split("\n", maxsplit=1)[0]) from error
    if base is None:
        where, revision = told["base_model"], told["revision"]
        base = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=dtype, **options)
    names = add_scales(base, adapter)
    if {f"{name}.scale" for name in names} != tensors.keys():
        raise _wrong(folder, f"{len(tensors)} layers have scales there, {len(names)} in this model")
    for name in names:
        scale = base.get_submodule(name).scale
        if scale.shape != tensors[f"{name}.scale"].shape:
            raise _wrong(folder, f"{name} has scales of shape {list(scale.shape)} in this model")
        base.get_submodule(name).fresh_scale = scale.detach().clone()
        scale.data.copy_(tensors[f"{name}.scale"])
    return base.eval()


def _wrong(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the folder has no trained scales for this model",
        at=str(folder),
        why=why,
        try_="give the export folder of a run with adapter.type=peqa, and the base it was trained on",
    )
