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

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from farspan.errors import CheckpointError
from farspan.trainer import export_check, export_s2a, export_unipt
from farspan.trainer.adapters.lora.start import START_A, START_B, STARTED
from farspan.trainer.adapters.paca import files as paca
from farspan.trainer.adapters.paca.apply import COLUMNS, INDICES, add_columns, write_back
from farspan.trainer.adapters.peqa import files as peqa
from farspan.trainer.adapters.peqa.apply import SCALE, add_scales
from farspan.trainer.adapters.reversible import files as reversible
from farspan.trainer.adapters.reversible.files import is_bottleneck
from farspan.trainer.bases.load import dequantize, loading_options, prepared_options, take_over
from farspan.trainer.bases.prepared.store import PREPARED, PreparedBase
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
from farspan.trainer.export_readme import readme
from farspan.trainer.export_tokenizer import copy_tokenizer, tokenizer_folder
from farspan.trainer.models import DTYPES, add_adapter

SHARD_SIZE = "5GB"
Kind: TypeAlias = Literal["full", "adapter", "merged"]
WHOLE_BASE = "base"
Written: TypeAlias = tuple[dict[str, tuple[int, ...]], list[str]]
"""Names and shapes on disk, and what was compared."""


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
        return whole, *(_export_merged_scales if merged else _export_scales)(job, adapter)
    if isinstance(adapter, PaCA):
        return whole, *(_export_merged_columns if merged else _export_columns)(job, adapter)
    assert isinstance(adapter, LoRA)
    return whole, *(_export_merged if merged else _export_adapter)(job, adapter)


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

    _write_config(job, skeleton)
    written = write_shards(job.out_dir, skeleton, saved, value)
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_model(job.out_dir, written, saved.keys(), value, dtype=job.dtype)


def _export_adapter(job: ExportJob, adapter: LoRA) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    from peft import get_peft_model_state_dict

    with torch.device("meta"):
        skeleton: Any = add_adapter(job.skeleton(), adapter, seed=0)
    trainable = {name: p for name, p in skeleton.named_parameters() if p.requires_grad}
    job.require_parameters(trainable)
    live = {name: job.trained(name, tuple(parameter.shape)) for name, parameter in trainable.items()}
    if adapter.init in STARTED:
        adapter, live = _difference(job, adapter, live)
        with torch.device("meta"):
            skeleton = add_adapter(job.skeleton(), adapter, seed=0)
    saved = get_peft_model_state_dict(skeleton, state_dict=live, save_embedding_layers=False)
    assert len(saved) == len(live), "peft left trained tensors out of the adapter"

    config = skeleton.peft_config["default"]
    config.base_model_name_or_path, config.revision = job.base_in_words()
    if job.prepared is not None:
        config.base_model_name_or_path, config.revision = _export_prepared(job, job.prepared), None
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(job.out_dir)
    save_file(saved, job.out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    text = readme(config.base_model_name_or_path, is_hub_id=job.on_hub, prepared=job.prepared is not None)
    (job.out_dir / "README.md").write_text(text, encoding="utf-8")

    written = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_adapter(job.out_dir, job.base, saved, dtype=job.dtype, prepared=job.prepared)


def _export_prepared(job: ExportJob, prepared: PreparedBase) -> str:
    """The base beside its adapter, without which that means nothing; returns what peft is to open."""
    prepared.copy_to(job.out_dir / PREPARED)
    if not job.whole_base:
        # no model that peft could open: with the pretrained weights it would run, and be wrong
        return str(prepared.folder.resolve())
    folder = job.out_dir / WHOLE_BASE
    folder.mkdir()
    write_plain(replace(job, out_dir=folder), job.whole())
    return str(folder.resolve())


def _export_columns(job: ExportJob, adapter: PaCA) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    with torch.device("meta"):
        skeleton = job.skeleton()
        indices = add_columns(skeleton, adapter, seed=job.seed)
    job.require_parameters({name: p for name, p in skeleton.named_parameters() if p.requires_grad})
    tensors: dict[str, Tensor] = {}
    for name, chosen in indices.items():
        shape = tuple(skeleton.get_submodule(name).get_parameter(COLUMNS).shape)
        tensors |= {f"{name}.columns": job.trained(f"{name}.{COLUMNS}", shape), f"{name}.indices": chosen}
    base, revision = job.base_in_words()
    paca.save(
        job.out_dir,
        rank=adapter.rank,
        base=base,
        revision=revision,
        stored=job.stored,
        dtype=job.dtype,
        tensors=tensors,
    )
    written = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_columns(job.out_dir, job.base, tensors, dtype=job.dtype, stored=job.stored)


def _export_scales(job: ExportJob, adapter: PEQA) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    with torch.device("meta"):
        skeleton = job.skeleton()
        names = add_scales(skeleton, adapter)
    job.require_parameters({name: p for name, p in skeleton.named_parameters() if p.requires_grad})
    shapes = {name: tuple(skeleton.get_submodule(name).get_parameter(SCALE).shape) for name in names}
    # fp32 as they were trained: there is nothing to be gained by rounding so few
    tensors = {f"{name}.{SCALE}": job.state.tensor(f"{name}.{SCALE}", shape) for name, shape in shapes.items()}
    base, revision = job.base_in_words()
    peqa.save(job.out_dir, adapter, base=base, revision=revision, dtype=job.dtype, tensors=tensors)
    written = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_scales(job.out_dir, job.base, tensors, dtype=job.dtype)


def _export_merged_scales(job: ExportJob, adapter: PEQA) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    whole = job.whole()
    names = add_scales(whole, adapter)
    job.require_parameters({name: p for name, p in whole.named_parameters() if p.requires_grad})
    for name in names:
        scale = whole.get_submodule(name).get_parameter(SCALE)
        scale.data.copy_(job.state.tensor(f"{name}.{SCALE}", tuple(scale.shape)))
    dequantize(whole)
    return write_plain(job, whole)


def _export_merged_columns(job: ExportJob, adapter: PaCA) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    whole = job.whole()
    names = add_columns(whole, adapter, seed=job.seed)
    trainable = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    job.require_parameters(trainable)
    for name in names:
        layer: Any = whole.get_submodule(name)
        parameter = layer.get_parameter(COLUMNS)
        parameter.data.copy_(job.trained(f"{name}.{COLUMNS}", tuple(parameter.shape)))
        write_back(layer)
        for own in (COLUMNS, INDICES):
            delattr(layer, own)
    return write_plain(job, whole)


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


def _difference(job: ExportJob, adapter: LoRA, live: dict[str, Tensor]) -> tuple[LoRA, dict[str, Tensor]]:
    """A plain LoRA of twice the rank: s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    if job.start is None or not job.start.exists():
        raise CheckpointError(
            "where the adapter started is not known",
            at=str(job.start),
            why=f"with adapter.init={adapter.init} what was trained is the difference to it",
            try_="export from the run folder, which has adapter_start.safetensors",
        )
    kept = load_file(job.start)
    assert adapter.alpha is not None
    scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
    twice = LoRA(
        rank=2 * adapter.rank,
        alpha=scale * 2 * adapter.rank,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        modules_to_save=adapter.modules_to_save,
    )
    found = {}
    for name, tensor in live.items():
        if ".lora_A." in name:
            tensor = torch.cat([tensor, kept[_start_of(name)].to(tensor.dtype)], 0)
        elif ".lora_B." in name:
            tensor = torch.cat([tensor, -kept[_start_of(name)].to(tensor.dtype)], 1)
        found[name] = tensor
    if all(torch.equal(live[n], kept[_start_of(n)].to(live[n].dtype)) for n in live if ".lora_" in n):
        raise CheckpointError(
            "the adapter is where it started, so that it changes nothing",
            at=str(job.start),
            why="A and B are those of the frozen pair: it was not trained, or not saved",
            try_="export a later checkpoint",
        )
    return twice, found


def _start_of(name: str) -> str:
    layer, _, last = name.partition(".lora_")
    return f"{layer}.{START_A if last.startswith('A.') else START_B}"


def _export_merged(job: ExportJob, adapter: LoRA) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    from peft.tuners.lora.layer import LoraLayer

    whole = job.whole()
    adapted: Any = add_adapter(whole, adapter, seed=0)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    job.require_parameters(trainable)
    live = {name: job.trained(name, tuple(parameter.shape)) for name, parameter in trainable.items()}
    if adapter.init in STARTED:
        adapter, live = _difference(job, adapter, live)
        adapted = add_adapter(job.whole(), adapter, seed=0)
        trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(live[name])
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.float()  # peft's own merge, in fp32: one rounding instead of two, one matrix at a time
                module.merge()
                module.to(job.dtype)
    merged: PreTrainedModel = adapted.unload()
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False  # trained apart by modules_to_save; loading must not tie them again
        merged.tie_weights()
    return write_plain(job, merged)


def write_plain(job: ExportJob, model: PreTrainedModel) -> Written:
    """A whole model that everybody opens; returns names and shapes on disk, and what was compared."""
    saved = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    _write_config(job, model)
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


def _write_config(job: ExportJob, model: PreTrainedModel) -> None:
    model.config.dtype = str(job.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(job.out_dir)
    has_own = (job.base / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(job.base) if has_own else model.generation_config
    if generation is not None:
        generation.save_pretrained(job.out_dir)


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
