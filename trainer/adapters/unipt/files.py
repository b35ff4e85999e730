"""UniPT's network on disk, beside the model it belongs to.

    unipt.json            reduction, how the model was stored, where it is
    unipt.safetensors     `down`, `norm_weight`, `norm_bias`, `gate`, `proj`, `up`: see `apply`

It cannot be merged: it is a network of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from farspan.trainer.adapters import own_files
from farspan.trainer.adapters.unipt.apply import add_side_network
from farspan.trainer.adapters.unipt.config import UniPT
from farspan.trainer.bases.config import Base


def save(
    folder: Path,
    adapter: UniPT,
    *,
    base: str,
    revision: str | None,
    stored: Base,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
) -> None:
    """Write both files; `tensors` by their names in the network."""
    told = {"adapter": adapter.model_dump(mode="json"), "base_model": base, "revision": revision}
    own_files.write(folder, "unipt", told | {"base": stored.model_dump(mode="json")}, dtype=dtype, tensors=tensors)


def load(folder: Path | str, *, base: Any = None, dtype: torch.dtype | str = "auto", **options: Any) -> nn.Module:
    """The model with its network. It runs without a cache, on sequences of one length; so does `generate`.

    Args:
        folder: an export of a run with `UniPT`.
        base: the loaded model, changed in place; None: from where the folder says. Rounded as it was in training.
        dtype, options: for `from_pretrained`; `auto`: as in training.

    Raises:
        CheckpointError: the folder is no such export, or belongs to another model.
    """
    folder = Path(folder)
    told, tensors = own_files.read(folder, "unipt")
    base = own_files.open_base(told, base, dtype, TypeAdapter(Base).validate_python(told["base"]), **options)
    network = add_side_network(base, UniPT.model_validate(told["adapter"]), seed=0)
    there = dict(network.named_parameters())
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: list(p.shape) for name, p in there.items()}:
        why = f"its first matrices are {shapes.get('down')} there and {list(network.down.shape)} in this model"
        raise own_files.wrong(folder, "unipt", why)
    for name, tensor in tensors.items():
        there[name].data.copy_(tensor)
    base.config.use_cache = False
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.use_cache = False
    opened: nn.Module = base.eval()
    return opened
