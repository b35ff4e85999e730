"""Exports of UniPT: the network's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from farspan.errors import CheckpointError
from farspan.trainer import export_check
from farspan.trainer.adapters.unipt import files
from farspan.trainer.adapters.unipt.apply import CHILD, add_side_network
from farspan.trainer.export_job import ExportJob, Written

if TYPE_CHECKING:
    from farspan.trainer.adapters.unipt.config import UniPT


def export_network(job: ExportJob, adapter: UniPT, *, merged: bool) -> Written:
    """Returns names and shapes on disk, and what was compared.

    Raises:
        CheckpointError: it was to be merged.
    """
    if merged:
        raise CheckpointError(
            "a side network cannot be merged",
            at="--merged",
            why="it is a network beside the model, whose weights it leaves as they are",
            try_="export without --merged; farspan.trainer.adapters.unipt.files.load opens it",
        )
    with torch.device("meta"):
        model = job.skeleton()
        network = add_side_network(model, adapter, seed=0)
    job.require_parameters({name: p for name, p in model.named_parameters() if p.requires_grad})
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    tensors = {name: job.trained(f"{CHILD}.{name}", shape) for name, shape in shapes.items()}
    base, revision = job.base_in_words()
    files.save(job.out_dir, adapter, base=base, revision=revision, stored=job.stored, dtype=job.dtype, tensors=tensors)
    if not job.verify:
        return shapes, ["nothing: not asked for"]
    return shapes, export_check.check_network(job.out_dir, job.base, tensors, dtype=job.dtype, stored=job.stored)
