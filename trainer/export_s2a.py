"""Exports of S2A's parts: their own files, or biases inside a plain model where its family has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from farspan.errors import CheckpointError
from farspan.trainer import export_check
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.s2a import files
from farspan.trainer.adapters.s2a.apply import BIAS, SIDE, add_parts
from farspan.trainer.attention import PREFIX_KEYS, PREFIX_VALUES
from farspan.trainer.export_job import ExportJob, Written

if TYPE_CHECKING:
    from torch import Tensor

    from farspan.trainer.adapters.s2a.config import S2A


def _skeleton(job: ExportJob, adapter: S2A) -> tuple[Any, list[str]]:
    """The model without weights, its parts added; and the names of its layers with a bias."""
    with torch.device("meta"):
        model = job.skeleton()
        names = add_parts(model, adapter, seed=0)
    job.require_parameters({name: p for name, p in model.named_parameters() if p.requires_grad})
    return model, names


def export_parts(job: ExportJob, adapter: S2A) -> Written:
    """Returns names and shapes on disk, and what was compared."""
    model, names = _skeleton(job, adapter)

    def trained(module: str, name: str) -> Tensor:
        full = f"{module}.{name}"
        return job.trained(full, tuple(model.get_parameter(full).shape))

    tensors = {f"{name}.bias": trained(name, BIAS) for name in names}
    inside = {id(layer): name for name, layer in model.named_modules()}
    layers = [inside[id(layer)] for layer in decoder_layers(model)]
    if adapter.side:
        tensors |= {f"{name}.side": trained(name, SIDE) for name in layers}
    prompt = [
        (trained(f"{name}.self_attn", PREFIX_KEYS), trained(f"{name}.self_attn", PREFIX_VALUES))
        for name in (layers if adapter.prompt else ())
    ]
    base, revision = job.base_in_words()
    saved = files.save(
        job.out_dir,
        adapter,
        base=base,
        revision=revision,
        stored=job.stored,
        dtype=job.dtype,
        tensors=tensors,
        prompt=prompt,
    )
    written = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if not job.verify:
        return written, ["nothing: not asked for"]
    return written, export_check.check_parts(job.out_dir, job.base, saved, dtype=job.dtype, stored=job.stored)


def merge_biases(job: ExportJob, adapter: S2A) -> Any:
    """A plain model with the trained biases.

    Raises:
        CheckpointError: there are parts that no plain model has.
    """
    _, names = _skeleton(job, adapter)
    whole: Any = job.whole()
    config = whole.config
    for flag in ("attention_bias", "mlp_bias"):
        if hasattr(config, flag):
            setattr(config, flag, True)
    with torch.device("meta"):
        possible = AutoModelForCausalLM.from_config(config, dtype=job.dtype)
    biased = [n for n, m in possible.named_modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]
    missing = sorted(set(names) - set(biased))
    if adapter.prompt or adapter.side or missing:
        what = f"bias on {missing[0]}" if missing else "prompt" if adapter.prompt else "side modules"
        raise CheckpointError(
            "the trained parts do not fit into a plain model",
            at=str(job.base),
            why=f"a {config.model_type} model has no {what}",
            try_="export without --merged; farspan.trainer.adapters.s2a.files.load opens it",
        )
    for name in biased:
        layer = whole.get_submodule(name)
        shape = (layer.out_features,)
        bias = job.trained(f"{name}.{BIAS}", shape) if name in names else torch.zeros(shape, dtype=job.dtype)
        files.put_bias(layer, bias)
    return whole
