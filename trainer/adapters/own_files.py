"""Adapters that no other library has a format for: a JSON that says what they are, and their tensors beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from farspan.errors import CheckpointError
from farspan.trainer.bases.config import Base, Unquantized
from farspan.trainer.bases.load import dequantize, loading_options, quantize, take_over

Kind = Literal["paca", "peqa", "l4q", "pv", "s2a", "unipt"]
WHAT: dict[Kind, str] = {
    "paca": "trained columns",
    "peqa": "trained scales",
    "l4q": "matrices of integers",
    "pv": "matrices of integers",
    "s2a": "trained parts",
    "unipt": "trained network",
}
FORMAT = 1


def config_of(folder: Path, kind: Kind) -> Path:
    return folder / f"{kind}.json"


def write(folder: Path, kind: Kind, told: dict[str, Any], *, dtype: torch.dtype, tensors: dict[str, Tensor]) -> None:
    """Write `<kind>.json` and `<kind>.safetensors`.

    Args:
        told: what opens them again; with `base_model` and `revision`.
        dtype: of the model, in which a base was rounded.
        tensors: by their names on disk.
    """
    told = {"format": FORMAT, **told, "dtype": str(dtype).removeprefix("torch.")}
    config_of(folder, kind).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(apart, folder / f"{kind}.safetensors", metadata={"format": "pt"})


def read(folder: Path, kind: Kind) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The reverse of `write`; of what is told, `dtype` as torch has it.

    Raises:
        CheckpointError: there are no such files.
    """
    try:
        told = json.loads(config_of(folder, kind).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError("written by a later version")
        told["dtype"] = getattr(torch, told["dtype"])
        return told, load_file(folder / f"{kind}.safetensors")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise wrong(folder, kind, str(error).split("\n", maxsplit=1)[0]) from error


def open_base(
    told: dict[str, Any], base: Any, dtype: torch.dtype | str, stored: Base | None = None, **options: Any
) -> Any:
    """The base model in plain layers, with the weights that training saw.

    Args:
        told: of `read`.
        base: a loaded one, changed in place; None: from where `told` says.
        dtype: `auto`: as in training.
        stored: how it was stored in training.
    """
    stored = stored or Unquantized()
    if base is None:
        where, revision = told["base_model"], told["revision"]
        options |= loading_options(stored, where, revision)
        dtype = told["dtype"] if dtype == "auto" else dtype
        base = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=dtype, **options)
    else:
        quantize(base, stored)
    take_over(base)
    dequantize(base)
    return base


def wrong(folder: Path, kind: Kind, why: str) -> CheckpointError:
    return CheckpointError(
        f"the folder has no {WHAT[kind]} for this model",
        at=str(folder),
        why=why,
        try_=f"give the export folder of a run with adapter.type={kind}, and the base it was trained on",
    )
