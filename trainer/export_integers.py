"""Exports of matrices of integers (L4Q, PV-Tuning): packed, or as the plain weights they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from farspan.trainer import export_check
from farspan.trainer.adapters import integer_files
from farspan.trainer.adapters.pv.apply import coded_layers
from farspan.trainer.bases.load import dequantize
from farspan.trainer.engine_codes import KIND as CODES
from farspan.trainer.export_job import ExportJob, Written, write_plain
from farspan.trainer.models import add_adapter

if TYPE_CHECKING:
    from farspan.trainer.config import L4Q, PV


def export_integers(job: ExportJob, adapter: L4Q | PV, *, merged: bool) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    whole = job.whole()
    add_adapter(whole, adapter, seed=job.seed)
    trainable = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    job.require_parameters(trainable)
    fresh = {name: p.detach().clone() for name, p in trainable.items() if not name.endswith("lora_A")}
    for name, parameter in trainable.items():
        parameter.data.copy_(job.state.tensor(name, tuple(parameter.shape)))
    if all(torch.equal(trainable[name], first) for name, first in fresh.items()):
        raise export_check.untrained(job.out_dir, "every scale is what training starts from")
    for name, layer in coded_layers(whole).items():
        words = layer.words()
        words.copy_(job.state.tensor(f"{name}.{CODES}", tuple(words.shape), kind=CODES))
    layers = integer_files.round_off(whole)
    if merged:
        dequantize(whole)
        return write_plain(job, whole)
    tensors = integer_files.tensors_of(layers)
    base, revision = job.base_in_words()
    integer_files.save(
        job.out_dir, adapter.type, adapter, base=base, revision=revision, dtype=job.dtype, tensors=tensors
    )
    written = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_integers(job.out_dir, job.base, adapter.type, tensors, dtype=job.dtype)
