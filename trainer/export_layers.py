"""Exports of PaCA's columns and PEQA's scales, alone or merged into the base's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farspan.trainer import export_check
from farspan.trainer.adapters.paca import files as paca
from farspan.trainer.adapters.paca.apply import COLUMNS, INDICES, add_columns, write_back
from farspan.trainer.adapters.peqa import files as peqa
from farspan.trainer.adapters.peqa.apply import SCALE, add_scales
from farspan.trainer.bases.load import dequantize
from farspan.trainer.config import PEQA, PaCA
from farspan.trainer.export_job import ExportJob, Written, write_plain


def export_columns(job: ExportJob, adapter: PaCA) -> Written:
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


def export_scales(job: ExportJob, adapter: PEQA) -> Written:
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


def export_merged_scales(job: ExportJob, adapter: PEQA) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    whole = job.whole()
    names = add_scales(whole, adapter)
    job.require_parameters({name: p for name, p in whole.named_parameters() if p.requires_grad})
    for name in names:
        scale = whole.get_submodule(name).get_parameter(SCALE)
        scale.data.copy_(job.state.tensor(f"{name}.{SCALE}", tuple(scale.shape)))
    dequantize(whole)
    return write_plain(job, whole)


def export_merged_columns(job: ExportJob, adapter: PaCA) -> Written:
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
