"""Measures what a job's layers cost on this machine: one real layer of each kind, the head, and the lanes.

The model is built at full width with as many layers as it has kinds, random weights (their values cost nothing), the
job's adapter and tiles, and measured by `memory.measure`. So a 70B model is calibrated with one of its 80 layers; what
is needed is room for a layer, its adapter, the embedding and the head. With sp > 1 one rank is measured, which
exchanges rows with itself.

    python -m farspan.trainer.calibrate REQUEST.json OUT.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from farspan.memory.calibration import Measured, MeasuredLinks
from farspan.memory.measure import measure_profile
from farspan.memory.problem import Links
from farspan.memory.profile import Profile, Source
from farspan.memory.samples import Subject
from farspan.memory.tier_error import measure_codes
from farspan.memory.tiers import OffTier, Store
from farspan.trainer import attention
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.load import quantize
from farspan.trainer.config import AMAQ, CalibrationRequest, Model
from farspan.trainer.models import (
    DTYPES,
    decoder_layers,
    hollow_layers,
    prepare_model,
    random_config,
)
from farspan.trainer.parallel.learned_bits import LearnedBits
from farspan.trainer.parallel.ulysses import LoneRank

MIB = 2**20
LINKS = {"cpu": (256 * MIB, 32 * MIB), "cuda": (4096 * MIB, 256 * MIB)}
"""Bytes moved each way over each lane, and of a tensor: far more than any cache, and so much that starting and waking
threads is none of the time."""


def calibrate(request: CalibrationRequest) -> Measured:
    """Measure on this process's device: its GPU, if it has one."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Measured(profile=profile_of(request, device), links=measure_links(request.disk_dir, device))


def profile_of(request: CalibrationRequest, device: torch.device) -> Profile:
    """The profile of one rank of the job."""
    first = [request.kinds.index(kind) for kind in dict.fromkeys(request.kinds)]
    config = _some_layers(_config(request), first)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"), device:
        torch.manual_seed(0)
        causal = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[request.precision], attn_implementation=attention.NAME
        )
        quantize(causal, request.base)
        module, _ = prepare_model(
            causal, adapter=request.adapter, memory=request.memory, seed=0, density=request.density
        )
    ulysses = LoneRank(request.sp) if request.sp > 1 else None
    exactly = None
    if isinstance(request.exchange, AMAQ) and ulysses is not None:
        bits = LearnedBits.of(module.layers, config, request.exchange, device=device, steps=1, seed=0)
        bits.uniform(request.exchange.bits)
        exactly = bits.measured_against
    tiled = [m for m in module.modules() if getattr(m, "tiled_rows", None) is not None]
    loss_tile, mlp_tile = (
        request.memory.loss_tile,
        None if request.memory.mlp_tile == "off" else request.memory.mlp_tile,
    )

    def step(rows: int) -> torch.Tensor:
        ids = torch.randint(2, config.get_text_config().vocab_size, (1, rows), device=device)
        positions = torch.arange(rows, device=device)[None]
        return module(ids, ids.roll(-1, 1), positions, PackedSequence((rows * request.sp,), ulysses))

    def set_tile(rows: int | None) -> None:
        module.head.tile = rows or loss_tile
        for mlp in tiled:
            mlp.tiled_rows = rows or mlp_tile  # type: ignore[assignment]

    subject = Subject(
        model=module,
        layers=decoder_layers(causal),
        embedding=causal.get_input_embeddings(),
        step=step,
        set_tile=set_tile,
        hollow=hollow_layers(causal),
        gradients=request.gradients,
        exactly=exactly,
        tier_codec=request.memory.tier_codec,
    )
    names = [request.kinds[index] for index in first]
    profile = measure_profile(subject, names, loss_tile=loss_tile, mlp_tile=mlp_tile, sp=request.sp)
    if request.memory.tier_codec == "exact":
        return profile
    width, dtype = config.get_text_config().hidden_size, DTYPES[request.precision]
    codes = measure_codes(request.memory.tier_codec, width, dtype, device)
    source = Source(how="measured", what=f"rows of {width} elements made {codes.kind} and read again")
    return profile.model_copy(update={"codes": codes, "sources": {**profile.sources, "codes": source}})


def _config(request: CalibrationRequest) -> Any:
    if isinstance(request.model, Model):
        return AutoConfig.from_pretrained(request.model.id, revision=request.model.revision)
    return random_config(request.model, context=request.context, eos_id=0, pad_id=1)


def _some_layers(config: Any, indices: Sequence[int]) -> Any:
    """The configuration with these layers only: their number, and whatever it lists layer by layer."""
    inner = config.get_text_config()
    count = inner.num_hidden_layers
    for name, value in list(vars(inner).items()):
        if isinstance(value, list | tuple) and len(value) == count and name.endswith(("layer_types", "_layers")):
            setattr(inner, name, [value[index] for index in indices])
    # layers told apart by their numbers: plain MLPs among mixtures of experts
    if listed := getattr(inner, "mlp_only_layers", None):
        inner.mlp_only_layers = [new for new, old in enumerate(indices) if old in listed]
    if first := getattr(inner, "first_k_dense_replace", None):
        inner.first_k_dense_replace = sum(index < first for index in indices)
    step = getattr(inner, "decoder_sparse_step", None) or 1
    if step > 1:
        inner.decoder_sparse_step = 1
        inner.mlp_only_layers = [new for new, old in enumerate(indices) if (old + 1) % step or old in (listed or ())]
    inner.num_hidden_layers = len(indices)
    return config


def measure_links(disk_dir: str | None, device: torch.device) -> MeasuredLinks:
    """Sustained rates through the tiers themselves: copies into and out of the arena, reads and writes of the disk.

    A rank without a disk tier keeps the copies' rates for it; no plan uses them.
    """
    total_bytes, tensor_bytes = LINKS[device.type]
    count = total_bytes // tensor_bytes
    tensors = [torch.ones(tensor_bytes // 4, device=device) for _ in range(2)]
    busy: dict[str, float] = {}
    for tier in ("host", "disk") if disk_dir is not None else ("host",):
        folder = Path(disk_dir) if disk_dir is not None and tier == "disk" else None
        with Store(
            host_bytes=total_bytes,
            disk_dir=folder,
            disk_bytes=total_bytes if folder is not None else 0,
            slots=count,
            prefault=True,
            device=device,
        ) as store:
            _there_and_back(store, tier, tensors[:1], 1)  # streams and mappings are made on first use
            store.statistics(restart=True)
            _there_and_back(store, tier, tensors, count)
            for lane in ("copy_out", "copy_in") if tier == "host" else ("disk_write", "disk_read"):
                times = [(i.start_s, i.end_s) for i in store.statistics().intervals if i.lane == lane]
                busy[lane] = max(end_s for _, end_s in times) - min(start_s for start_s, _ in times)
    rates = {lane: total_bytes / seconds for lane, seconds in busy.items()}
    how = f"{total_bytes >> 20} MiB in pieces of {tensor_bytes >> 20} MiB through each lane"
    return MeasuredLinks(
        links=Links(
            copy_out_bytes_per_s=rates["copy_out"],
            copy_in_bytes_per_s=rates["copy_in"],
            disk_write_bytes_per_s=rates.get("disk_write", rates["copy_out"]),
            disk_read_bytes_per_s=rates.get("disk_read", rates["copy_in"]),
        ),
        source=Source(how="measured", what=how),
    )


def _there_and_back(store: Store, tier: OffTier, tensors: list[torch.Tensor], count: int) -> None:
    stored = [store.put(tier, tensors[index % len(tensors)]) for index in range(count)]
    store.drain()
    for one in stored:  # all are asked for before any is waited for
        store.fetch(one)
    for one in stored:
        store.get(one)
        store.free(one)


def main(arguments: Sequence[str]) -> int:
    request, out = arguments
    found = calibrate(CalibrationRequest.model_validate_json(Path(request).read_text(encoding="utf-8")))
    Path(out).write_text(found.model_dump_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
