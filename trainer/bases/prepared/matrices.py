"""The matrices of a model's decoder layers as they lie on disk, read one by one: nothing here holds a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from farspan.errors import JobError
from farspan.trainer.adapters.config import Adapter, inner
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.lora.config import LoRA


@dataclass(frozen=True)
class Source:
    """A model by hub id or folder."""

    id: str
    revision: str | None = None

    def folder(self) -> Path:
        """On this node; downloaded where it is not there yet."""
        if Path(self.id).is_dir():
            return Path(self.id)
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(self.id, revision=self.revision, allow_patterns=["*.json", "*.safetensors", "*.py"])
        )


@dataclass(frozen=True)
class Matrix:
    """One linear layer's weight."""

    name: str
    """Of the layer in the model."""
    file: str
    key: str
    """Of the tensor in that file."""
    rows: int
    columns: int
    rank: int
    """Of the adapter on it; 0: none."""

    def read(self, source: Source) -> Tensor:
        """[rows, columns] in the dtype it is stored in."""
        with safe_open(source.folder() / self.file, framework="pt") as file:
            return file.get_tensor(self.key)


def fingerprint(*tensors: Tensor) -> str:
    """Of their bits."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def matrices_of(source: Source, adapter: Adapter) -> list[Matrix]:
    """The linear layers of the decoder layers, in the model's order.

    Raises:
        JobError: the folder has no safetensors, or calls a weight otherwise than the model does; the adapter names
            no layer of the model, or is wider than a matrix.
    """
    from farspan.trainer.models import add_adapter

    folder = source.folder()
    keys = _keys(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        inside = {id(m) for layer in decoder_layers(skeleton) for m in layer.modules() if type(m) is nn.Linear}
        linears = {name: m for name, m in skeleton.named_modules() if id(m) in inside}
        shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
        lora = inner(adapter)
        assert isinstance(lora, LoRA), "jobs.resolve lets no other adapter through"
        from farspan.trainer.adapters.lora.start import lora_layers

        adapted = {n.removeprefix("base_model.model.") for n in lora_layers(add_adapter(skeleton, lora, seed=0))}
    found = []
    for name, (rows, columns) in shapes.items():
        rank = lora.rank if name in adapted else 0
        if rank > min(rows, columns):
            raise JobError(
                f"{name} has {min(rows, columns)} directions, fewer than the {rank} it was to start at",
                at="adapter.rank",
                why="singular vectors of a matrix are no more than its rows or columns",
                try_=f"--set adapter.rank={min(rows, columns)}",
            )
        file, key = _key_of(name, keys, folder)
        found.append(Matrix(name, file, key, rows, columns, rank))
    return found


def _keys(folder: Path) -> dict[str, str]:
    """File of each tensor."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    if not found:
        raise JobError(
            "the model has no safetensors",
            at="model.id",
            why=f"{folder} holds {', '.join(sorted(p.name for p in folder.iterdir())[:8])}",
            try_="save it again with save_pretrained, or give another checkpoint",
        )
    return found


def _key_of(name: str, keys: dict[str, str], folder: Path) -> tuple[str, str]:
    """By the layer's name, or the one key that has a part of the model's more or less before it."""
    wanted = f"{name}.weight"
    near = [wanted] if wanted in keys else [k for k in keys if k.endswith(f".{wanted}") or wanted.endswith(f".{k}")]
    if len(near) != 1:
        raise JobError(
            f"the checkpoint has no weight called {wanted}",
            at="model.id",
            why=f"{folder} calls its tensors {', '.join(sorted(keys)[:3])}, ...; {len(near)} of them would do",
            try_="save the model again with this version of transformers, or --set base=nf4 with adapter.init=default",
        )
    return keys[near[0]], near[0]
