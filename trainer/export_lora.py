"""Exports of LoRA: peft's folder, with the base that was prepared for it, or merged into the base's weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from farspan.errors import CheckpointError
from farspan.trainer import export_check
from farspan.trainer.adapters.lora.start import START_A, START_B, STARTED
from farspan.trainer.bases.prepared.store import PREPARED, PreparedBase
from farspan.trainer.config import LoRA
from farspan.trainer.export_job import ExportJob, Written, write_plain
from farspan.trainer.export_readme import readme
from farspan.trainer.models import add_adapter

WHOLE_BASE = "base"


def export_adapter(job: ExportJob, adapter: LoRA) -> Written:
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


def export_merged(job: ExportJob, adapter: LoRA) -> Written:
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
