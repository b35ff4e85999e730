"""A prepared base on disk: the rounded matrices of a model's decoder layers, and where the adapters on them start.

    prepared_base.json             format, what it was made for, and for each matrix how it is stored and its error
    <linear layer>.safetensors     the tensors of one matrix: what its format keeps, and `lora_A`, `lora_B`

A matrix is `Q + scale * lora_B @ lora_A` at the start of training. What it stands for is written down in
`kernels.quantized`: two-level NormalFloat (`formats`, `two_level`), nf4 as bitsandbytes has it, int8 with a scale for
each row. Embedding, norms, biases and head are those of the model it was made from, which the JSON names. The JSON is
written last: a folder with it is whole.

    from farspan.trainer.bases.prepared.store import open_dequantized
    base = open_dequantized("outputs/run/checkpoints/step_100/export/prepared_base")
    model = PeftModel.from_pretrained(base, "outputs/run/checkpoints/step_100/export")
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from farspan.errors import CheckpointError
from farspan.trainer.bases.linear import QuantizedLinear, restored, stored_parts
from farspan.trainer.bases.prepared.decompose import Decomposition, LowRank
from farspan.trainer.run_folder import write_json

PREPARED = "prepared_base"
"""The folder's name, in a run and in an export."""
INDEX = "prepared_base.json"
FORMAT = 1
A, B = "lora_A", "lora_B"


def write_matrix(folder: Path, name: str, made: Decomposition) -> dict[str, Any]:
    """Write one matrix's file; returns its entry of the index."""
    told, tensors = stored_parts(made.layer)
    if made.low_rank is not None:
        tensors |= {A: made.low_rank.a, B: made.low_rank.b}
    entry = {**told, "bytes": made.layer.stored_bytes, "squared_error": made.error}
    beside = folder / f".{name}.{os.getpid()}"
    metadata = {"format": "pt", "entry": json.dumps(entry)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, beside, metadata=metadata)
    beside.replace(folder / f"{name}.safetensors")
    return entry


def write_index(folder: Path, made_for: dict[str, Any], matrices: dict[str, dict[str, Any]], **more: Any) -> None:
    """Write the JSON; `more` goes beside the matrices."""
    write_json(folder / INDEX, {"format": FORMAT, "made_for": made_for, **more, "matrices": matrices})


@dataclass(frozen=True)
class PreparedBase:
    """A whole one."""

    folder: Path
    told: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> PreparedBase:
        """Read the index.

        Raises:
            CheckpointError: there is none, or none that is known here.
        """
        try:
            told = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise ValueError("written by a later version")
            _ = told["made_for"], told["matrices"], told["dtype"]
        except (OSError, ValueError, KeyError) as error:
            raise _wrong(folder, str(error).split("\n", maxsplit=1)[0]) from error
        return cls(folder, told)

    @property
    def matrices(self) -> dict[str, dict[str, Any]]:
        """By the name of the linear layer."""
        found: dict[str, dict[str, Any]] = self.told["matrices"]
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the model it was made for."""
        found: torch.dtype = getattr(torch, self.told["dtype"])
        return found

    @property
    def stored_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.matrices.values())

    @property
    def bits_per_weight(self) -> float:
        count = sum(entry["shape"][0] * entry["shape"][1] for entry in self.matrices.values())
        return 8 * self.stored_bytes / count

    def layer(self, name: str, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device) -> QuantizedLinear:
        """The layer of that name.

        Raises:
            CheckpointError: it is not there, or its file is damaged.
        """
        entry = self.matrices.get(name)
        if entry is None:
            raise _wrong(self.folder, f"it has no {name}")
        try:
            tensors = {n: t.to(device) for n, t in self._tensors(name).items() if n not in (A, B)}
            return restored(entry, tensors, bias, dtype)
        except KeyError as error:
            raise _wrong(self.folder, f"{name}: {error}") from error

    def start(self, name: str) -> LowRank | None:
        """Where the adapter on that layer starts; None: it has none."""
        tensors = self._tensors(name)
        return LowRank(tensors[A], tensors[B]) if A in tensors else None

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / f"{name}.safetensors")
        except (OSError, ValueError) as error:
            raise _wrong(self.folder, f"{name}: {str(error).split(chr(10), maxsplit=1)[0]}") from error

    def copy_to(self, folder: Path) -> None:
        """Beside an export: linked where the file system can, since nobody writes into these files."""
        folder.mkdir(parents=True)
        for name in [*(f"{matrix}.safetensors" for matrix in self.matrices), INDEX]:
            try:
                os.link(self.folder / name, folder / name)
            except OSError:
                shutil.copyfile(self.folder / name, folder / name)


def start_adapters(model: nn.Module, prepared: PreparedBase) -> int:
    """Put every LoRA layer where its matrix's low-rank part is; returns how many there are.

    An adapter on a matrix outside the decoder layers, which is not rounded, starts where peft has it.

    Args:
        model: of peft, around a base with these matrices.

    Raises:
        CheckpointError: an adapter's matrix has no start, or one of another rank.
    """
    from farspan.trainer.adapters.lora.start import lora_layers

    layers = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(model).items()}
    layers = {name: layer for name, layer in layers.items() if name in prepared.matrices}
    for own, layer in layers.items():
        start = prepared.start(own)
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if start is None or (start.a.shape, start.b.shape) != (pair[0].shape, pair[1].shape):
            raise _wrong(prepared.folder, f"it has no start of rank {layer.r['default']} for {own}")
        for parameter, value in zip(pair, (start.a, start.b)):
            parameter.data.copy_(value)
    return len(layers)


def open_dequantized(folder: Path | str, *, source: str | Path | None = None, **options: Any) -> nn.Module:
    """The base model in plain layers with the weights that training saw, for peft or transformers.

    Args:
        folder: a prepared base.
        source: the model it was made from, where it is now; None: where the folder says.
        options: for `from_pretrained` (`attn_implementation`, `device_map`, ...).

    Raises:
        CheckpointError: the folder is no prepared base.
    """
    from transformers import AutoModelForCausalLM

    from farspan.trainer.bases.load import dequantize, prepared_options

    prepared = PreparedBase.open(Path(folder))
    where, revision = (
        (str(source), None) if source is not None else (prepared.told["source"], prepared.told["revision"])
    )
    model = AutoModelForCausalLM.from_pretrained(
        where, revision=revision, dtype=prepared.dtype, **prepared_options(prepared), **options
    )
    dequantize(model)
    made: nn.Module = model.eval()
    return made


def _wrong(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the folder has no prepared base for this model",
        at=str(folder),
        why=why,
        try_="give `prepared_base` of a run, or start the run under another name so that it is made anew",
    )
