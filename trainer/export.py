"""From a checkpoint's state to a folder that transformers or peft opens. CPU only, and no rank gathers anything.

Masters are read tensor by tensor from the checkpoint, rounded to the model's dtype and written one safetensors shard at
a time, so memory is about one shard (5 GB at most) however large the model. Names come from the model itself, built on
the meta device: transformers decides which tied weights are left out and how they are called on disk, peft how an
adapter's are.

    full fine-tune    config.json, generation_config.json, safetensors (sharded with an index when large), tokenizer
    LoRA              adapter_config.json, adapter_model.safetensors (with modules_to_save), tokenizer
    PaCA              paca.json, paca.safetensors (indices and columns), tokenizer; merged, as a full fine-tune
    S2A               s2a.json, s2a.safetensors (biases, side modules), a prompt in peft's files; biases merged, too
    UniPT             unipt.json, unipt.safetensors (the network), tokenizer
    PEQA              peqa.json, peqa.safetensors (scales), tokenizer; merged, as a full fine-tune
    L4Q               l4q.json, l4q.safetensors (integers, steps, offsets), tokenizer; merged, as a full fine-tune
    PV                pv.json, pv.safetensors (integers, scales), tokenizer; merged, as a full fine-tune
    Reversible        one of these, with `reversible.json` and the adapters between the streams beside it
    LoRA, merged      as a full fine-tune: W + scale B A, each matrix computed in fp32 and rounded once. Needs the base
                      model in host memory once, in its own dtype

A folder is reported only after `farspan.trainer.export_check` has opened it again and compared it.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from farspan.errors import CheckpointError
from farspan.trainer import export_check, export_layers, export_lora, export_s2a, export_unipt
from farspan.trainer.adapters.reversible import files as reversible
from farspan.trainer.adapters.reversible.files import is_bottleneck
from farspan.trainer.bases.prepared.store import PreparedBase
from farspan.trainer.checkpoint_format import MANIFEST
from farspan.trainer.checkpoint_format import verify as verify_checkpoint
from farspan.trainer.checkpoint_state import StateReader
from farspan.trainer.config import (
    L4Q,
    PEQA,
    PV,
    S2A,
    Adapter,
    Base,
    FullFineTune,
    LoRA,
    Model,
    ModelSource,
    PaCA,
    Precision,
    Reversible,
    UniPT,
    Unquantized,
)
from farspan.trainer.export_integers import export_integers
from farspan.trainer.export_job import ExportJob, Written, write_config, write_plain, write_shards
from farspan.trainer.export_tokenizer import copy_tokenizer, tokenizer_folder
from farspan.trainer.models import DTYPES

Kind: TypeAlias = Literal["full", "adapter", "merged"]


@dataclass(frozen=True)
class ExportReport:
    """An export that was written and compared."""

    out_dir: Path
    kind: Kind
    files: tuple[str, ...]
    size_bytes: int
    num_tensors: int
    num_parameters: int
    """Elements in the written weight files."""
    compared: tuple[str, ...]
    """What was checked after writing, and what was left out, in words."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"out_dir": str(self.out_dir)}


def export_checkpoint(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    model: ModelSource,
    adapter: Adapter,
    base_model_dir: Path | None = None,
    tokenizer_dir: Path | None = None,
    dtype: Precision = "bf16",
    merged: bool = False,
    verify: bool = True,
    seed: int = 0,
    stored: Base | None = None,
    start: Path | None = None,
    prepared: Path | None = None,
    whole_base: bool = False,
) -> ExportReport:
    """Write a HF or PEFT folder from a checkpoint.

    Loading a model changes process-wide state of torch and transformers for a moment; a process that trains uses
    `farspan.trainer.export_process` instead.

    Args:
        checkpoint_dir: a checkpoint; verified first when it is complete (has its manifest).
        out_dir: must not exist, or be empty.
        model, adapter: as the run was told.
        base_model_dir: HF folder of the untrained base, needed for a `RandomModel`.
        tokenizer_dir: folder of the tokenizer to copy; None: the base model's.
        dtype: of the written weights.
        merged: fold LoRA into the base's weights. A full fine-tune is whole already.
        verify: reopen and compare.
        seed: the run's, from which columns to train were drawn.
        start: where LoRA started, for an initialisation that is not zero; written beside the run's checkpoints.
        stored: how the base was stored; a merged export is of the weights that this stands for.
        prepared: the base that was prepared for the run; goes with its adapter.
        whole_base: write that base as a plain model too, for peft and transformers alone.

    Raises:
        CheckpointError: the checkpoint is damaged, belongs to another model, or what was written is not what was saved.
    """
    started = time.monotonic()
    if (checkpoint_dir / MANIFEST).exists():
        verify_checkpoint(checkpoint_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise CheckpointError(
            "the export folder is not empty",
            at=str(out_dir),
            why="files of an earlier export would be mixed with this one",
            try_="give a folder that does not exist yet",
        )
    base = _base_folder(model, base_model_dir)
    stored = stored or Unquantized()
    streams, adapter = (adapter, adapter.inside) if isinstance(adapter, Reversible) else (None, adapter)
    job = ExportJob(
        StateReader(checkpoint_dir),
        base,
        out_dir,
        model,
        adapter,
        DTYPES[dtype],
        verify,
        seed,
        stored,
        start,
        PreparedBase.open(prepared) if prepared is not None else None,
        whole_base,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        kind, written, compared = _write(job, adapter, merged=merged)
        if streams is not None:
            written, compared = {**written, **_export_streams(job, streams)}, [*compared, "streams: a finite forward"]
        copy_tokenizer(tokenizer_folder(model, base, tokenizer_dir), out_dir)
    except BaseException:
        shutil.rmtree(out_dir, ignore_errors=True)  # what was not compared must not be mistaken for an export
        raise
    files = sorted(path for path in out_dir.rglob("*") if path.is_file())
    return ExportReport(
        out_dir=out_dir,
        kind=kind,
        files=tuple(path.relative_to(out_dir).as_posix() for path in files),
        size_bytes=sum(path.stat().st_size for path in files),
        num_tensors=len(written),
        num_parameters=sum(torch.Size(shape).numel() for shape in written.values()),
        compared=tuple(compared),
        seconds=time.monotonic() - started,
    )


def _write(job: ExportJob, adapter: Adapter, *, merged: bool) -> tuple[Kind, dict[str, tuple[int, ...]], list[str]]:
    """Which export it is, names and shapes on disk, and what was compared."""
    whole: Kind = "merged" if merged else "adapter"
    if isinstance(adapter, FullFineTune):
        return "full", *_export_full(job)
    if isinstance(adapter, UniPT):
        return "adapter", *export_unipt.export_network(job, adapter, merged=merged)
    if isinstance(adapter, S2A) and merged:
        return whole, *write_plain(job, export_s2a.merge_biases(job, adapter))
    if isinstance(adapter, S2A):
        return whole, *export_s2a.export_parts(job, adapter)
    if isinstance(adapter, L4Q | PV):
        return whole, *export_integers(job, adapter, merged=merged)
    if isinstance(adapter, PEQA):
        return whole, *(export_layers.export_merged_scales if merged else export_layers.export_scales)(job, adapter)
    if isinstance(adapter, PaCA):
        return whole, *(export_layers.export_merged_columns if merged else export_layers.export_columns)(job, adapter)
    assert isinstance(adapter, LoRA)
    return whole, *(export_lora.export_merged if merged else export_lora.export_adapter)(job, adapter)


def _export_full(job: ExportJob) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    skeleton = job.skeleton()
    trainable = dict(skeleton.named_parameters())
    job.require_parameters(trainable)
    untrained = _SafetensorsFolder(job.base)
    saved = remove_tied_weights_from_state_dict(dict(skeleton.state_dict()), skeleton)

    def value(name: str) -> Tensor:
        # a tied weight has several names; the optimizer knows it by the first
        parameter = skeleton.get_parameter_or_buffer(name)
        first = next((known for known, other in trainable.items() if other is parameter), None)
        return untrained.tensor(name) if first is None else job.trained(first, tuple(parameter.shape))

    write_config(job, skeleton)
    written = write_shards(job.out_dir, skeleton, saved, value)
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_model(job.out_dir, written, saved.keys(), value, dtype=job.dtype)


def _export_streams(job: ExportJob, streams: Reversible) -> dict[str, tuple[int, ...]]:
    """What of a reversible model neither peft nor transformers has; returns names and shapes on disk."""
    weights: dict[str, Tensor] = {}
    for name, size in job.state.parameters().items():
        if is_bottleneck(name):
            hidden = size // streams.width
            down = name.endswith(".down.weight")
            weights[name] = job.trained(name, (streams.width, hidden) if down else (hidden, streams.width))
    reversible.save(job.out_dir, streams, weights, stored=job.stored, dtype=job.dtype)
    if job.verify:
        export_check.check_streams(job.out_dir, job.base, weights, dtype=job.dtype)
    return {reversible.name_on_disk(name): tuple(tensor.shape) for name, tensor in weights.items()}


class _SafetensorsFolder:
    """Tensors of an HF folder by name: the few that training does not touch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tensor(self, name: str) -> Tensor:
        for path in sorted(self._folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118  not a mapping
                    return file.get_tensor(name)
        raise CheckpointError(
            f"{name} is neither in the checkpoint nor in the base model",
            at=str(self._folder),
            why="the model keeps it beside its parameters, so it was not trained, and no safetensors file has it",
            try_="give the base model the run was started from",
        )


def _base_folder(model: ModelSource, base_model_dir: Path | None) -> Path:
    if base_model_dir is not None:
        if (base_model_dir / "config.json").exists():
            return base_model_dir
        problem = f"{base_model_dir} has no config.json"
    elif isinstance(model, Model):
        if Path(model.id).is_dir():
            return Path(model.id)
        return Path(snapshot_download(model.id, revision=model.revision, ignore_patterns=["*.bin", "*.pt", "*.gguf"]))
    else:
        problem = "no folder with the untrained weights was given"
    raise CheckpointError(
        "the base model of the export was not found",
        at=str(base_model_dir),
        why=problem,
        try_="give the run's base_model folder, which is written when training starts",
    )
