"""What every export shares: the checkpoint, the base, and how a whole model is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from farspan.errors import CheckpointError
from farspan.trainer import export_check
from farspan.trainer.adapters.reversible.files import is_bottleneck
from farspan.trainer.bases.load import dequantize, loading_options, prepared_options, take_over
from farspan.trainer.bases.prepared.store import PreparedBase
from farspan.trainer.checkpoint_state import StateReader
from farspan.trainer.config import Adapter, Base, Model, ModelSource

SHARD_SIZE = "5GB"
Written: TypeAlias = tuple[dict[str, tuple[int, ...]], list[str]]
"""Names and shapes on disk, and what was compared."""


@dataclass(frozen=True)
class ExportJob:
    """What the three kinds of export share."""

    state: StateReader
    base: Path
    out_dir: Path
    model: ModelSource
    adapter: Adapter
    dtype: torch.dtype
    verify: bool
    seed: int
    stored: Base
    start: Path | None
    prepared: PreparedBase | None
    whole_base: bool

    def skeleton(self) -> PreTrainedModel:
        """The model without weights: names, shapes, tied weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.base), dtype=self.dtype)

    @property
    def on_hub(self) -> bool:
        return isinstance(self.model, Model) and not Path(self.model.id).is_dir()

    def base_in_words(self) -> tuple[str, str | None]:
        """Hub id and revision of the base, or its folder."""
        if isinstance(self.model, Model) and self.on_hub:
            return self.model.id, self.model.revision
        return str(self.base.resolve()), None

    def whole(self) -> PreTrainedModel:
        """The base with the weights that training saw, in plain layers."""
        prepared = self.prepared
        options = loading_options(self.stored, self.base) if prepared is None else prepared_options(prepared)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.base, dtype=self.dtype, attn_implementation="eager", **options
        )
        take_over(model)
        dequantize(model)
        return model

    def trained(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Trained parameter in the model's dtype, as the model held it when the checkpoint was taken."""
        return self.state.tensor(name, shape).to(self.dtype)

    def require_parameters(self, trainable: Mapping[str, nn.Parameter]) -> None:
        saved = {name: size for name, size in self.state.parameters().items() if not is_bottleneck(name)}
        here = {name: parameter.numel() for name, parameter in trainable.items()}
        different = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
        if different:
            raise CheckpointError(
                "the checkpoint's parameters are not this model's",
                at=str(self.base),
                why=f"{len(different)} differ in name or size, first {', '.join(different[:3])}",
                try_="give the model and adapter the checkpoint was trained with",
            )


def write_plain(job: ExportJob, model: PreTrainedModel) -> Written:
    """A whole model that everybody opens; returns names and shapes on disk, and what was compared."""
    saved = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    write_config(job, model)
    written = write_shards(job.out_dir, model, saved, saved.__getitem__)
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_model(job.out_dir, written, saved.keys(), saved.__getitem__, dtype=job.dtype)


def write_shards(
    out_dir: Path, model: PreTrainedModel, saved: dict[str, Tensor], value: Callable[[str], Tensor]
) -> dict[str, tuple[int, ...]]:
    """Write safetensors one shard at a time, as `save_pretrained` would name and split them.

    Args:
        out_dir: existing folder.
        model: knows how its weights are called on disk (fused experts are stored one by one).
        saved: what to write, in order; only shapes and dtypes are looked at.
        value: makes one tensor, by its name in `saved`.

    Returns:
        names and shapes on disk.
    """
    split = split_torch_state_dict_into_shards(saved, max_shard_size=SHARD_SIZE)
    written: dict[str, tuple[int, ...]] = {}
    weight_map: dict[str, str] = {}
    for file_name, names in split.filename_to_tensors.items():
        shard = revert_weight_conversion(model, {name: value(name) for name in names})
        save_file({k: v.contiguous() for k, v in shard.items()}, out_dir / file_name, metadata={"format": "pt"})
        written.update({name: tuple(tensor.shape) for name, tensor in shard.items()})
        weight_map.update(dict.fromkeys(shard, file_name))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (out_dir / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return written


def write_config(job: ExportJob, model: PreTrainedModel) -> None:
    """The model's configuration and that of generation."""
    model.config.dtype = str(job.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(job.out_dir)
    has_own = (job.base / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(job.base) if has_own else model.generation_config
    if generation is not None:
        generation.save_pretrained(job.out_dir)
