"""What one cell of `farspan bench memory` does, in a process of its own: measure layers, or train a step or two.

Device bytes are those of torch's CPU allocator, counted by its own events: states before the step, and on top of them
the highest point of the step, operators' workspaces included. The host arena is an mmap and not among them, nor are the
buffers into which the stand-in for `save_on_cpu` copies: on a CPU that hook would otherwise copy nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

from farspan.memory.allocations import allocated_bytes, footprint
from farspan.memory.config import Tiles
from farspan.memory.plan import Placement
from farspan.memory.tiers import Store
from farspan.trainer.attention import NAME, PackedSequence
from farspan.trainer.calibrate import calibrate
from farspan.trainer.config import Adapter, CalibrationRequest, FullFineTune, LoRA, Optim, RandomModel
from farspan.trainer.engine_plain import PlainEngine
from farspan.trainer.models import DTYPES, decoder_layers, prepare_model, random_config
from farspan.trainer.parallel.ulysses import Ulysses

WARM_ROWS = 256


def adapter_of(config: dict[str, Any]) -> Adapter:
    return LoRA(rank=config["lora"], alpha=2.0 * config["lora"]) if config["lora"] else FullFineTune()


def tiles_of(config: dict[str, Any]) -> Tiles:
    return Tiles(loss_tile=config["loss_tile"], mlp_tile=config["mlp_tile"] or "off")


def run_calibration(task: dict[str, Any]) -> dict[str, Any]:
    return json.loads(calibrate(CalibrationRequest.model_validate(task["request"])).model_dump_json())


class Settled(Ulysses):
    """Waits until the library's own threads have let go of what was exchanged: what these free, no profiler sees."""

    def all_to_all(self, recv: Tensor, send: Tensor, recv_heads: list[int], send_heads: list[int]) -> None:
        def users() -> list[int]:
            return [t._use_count() for t in (recv, send)]

        before = users()
        super().all_to_all(recv, send, recv_heads, send_heads)
        while any(now > then for now, then in zip(users(), before)):
            time.sleep(1e-5)


class Trained:
    """A model, its engine, and what a peer does to its layers."""

    def __init__(self, task: dict[str, Any]) -> None:
        config, self.rows = task["config"], task["length"]
        shape = RandomModel.model_validate(config["model"])
        placement = Placement.model_validate(task["placement"]) if task.get("placement") else None
        self.store = None
        if task.get("tiers"):
            self.folder = tempfile.TemporaryDirectory(dir=task["disk_dir"])
            tiers = task["tiers"]
            self.store = Store(
                host_bytes=tiers["host_bytes"],
                disk_dir=Path(self.folder.name) if tiers["disk_bytes"] else None,
                disk_bytes=tiers["disk_bytes"],
                slots=tiers["slots"],
            )
        torch.manual_seed(0)
        causal = AutoModelForCausalLM.from_config(
            random_config(shape, context=self.rows, eos_id=0, pad_id=1),
            dtype=DTYPES[config["precision"]],
            attn_implementation=NAME,
        )
        self.module, trainable = prepare_model(
            causal,
            adapter=adapter_of(config),
            memory=tiles_of(config),
            seed=0,
            placement=placement if placement is not None and not placement.keeps_everything else None,
            store=self.store,
        )
        self.hooks = PEERS[task["system"]](decoder_layers(causal)) if task["system"] in PEERS else nullcontext
        self.engine = PlainEngine(self.module, trainable, Optim(lr=1e-4), "cpu")
        self.vocab = shape.vocab
        self.sp = config["sp"]
        self.ulysses = Settled(dist.group.WORLD) if self.sp > 1 else None  # type: ignore[arg-type]

    def step(self, rows: int | None = None) -> float:
        mine = (rows or self.rows) // self.sp
        first = mine * (self.ulysses.rank if self.ulysses is not None else 0)
        generator = torch.Generator().manual_seed(1)
        whole = torch.randint(2, self.vocab, (1, mine * self.sp), generator=generator)
        ids, labels = whole[:, first : first + mine], whole.roll(-1, 1)[:, first : first + mine]
        positions = torch.arange(first, first + mine)[None]
        with self.hooks():
            loss = self.module(ids, labels, positions, PackedSequence((mine * self.sp,), self.ulysses))
            self.engine.backward(loss / (mine * self.sp), last=True)
        self.engine.step(lr=1e-4, clip_norm=1.0)
        return float(loss.detach())

    def close(self) -> None:
        self.engine.close()
        if self.store is not None:
            self.store.close()
            self.folder.cleanup()


Hooks = Callable[[], Any]


def torch_checkpoint(layers: list[nn.Module]) -> Hooks:
    """torch's non-reentrant checkpointing of every layer."""
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = lambda call, x: checkpoint(call, x, use_reentrant=False)  # type: ignore[assignment]
    return nullcontext


def torch_selective(layers: list[nn.Module]) -> Hooks:
    """The same, but attention's output and log-sum-exp are kept."""
    kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op == kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = lambda call, x: checkpoint(  # type: ignore[assignment]
            call, x, use_reentrant=False, context_fn=contexts
        )
    return nullcontext


HOST_PEAK = [0, 0]
"""Bytes that `save_on_cpu` holds now, and at most."""


FREE: dict[int, list[mmap.mmap]] = {}
"""Host buffers used before, by bytes: as malloc and the pinned allocator do, pages are not faulted in anew."""


class _OnHost:
    """A tensor copied to memory that is not the allocator's."""

    def __init__(self, tensor: Tensor) -> None:
        self.bytes = max(1, tensor.numel() * tensor.element_size())
        self.shape, self.dtype = tensor.shape, tensor.dtype
        free = FREE.setdefault(self.bytes, [])
        self.map = free.pop() if free else mmap.mmap(-1, self.bytes)
        self._view().copy_(tensor)
        HOST_PEAK[0] += self.bytes
        HOST_PEAK[1] = max(HOST_PEAK)

    def _view(self) -> Tensor:
        count = self.shape.numel()
        return torch.frombuffer(self.map, dtype=self.dtype, count=count).view(self.shape)

    def back(self) -> Tensor:
        return self._view().clone()

    def __del__(self) -> None:
        HOST_PEAK[0] -= self.bytes
        FREE[self.bytes].append(self.map)


def save_on_cpu(layers: list[nn.Module]) -> Hooks:
    """torch.autograd.graph.save_on_cpu: every saved tensor is copied out in forward and back in backward."""
    weights = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}

    @contextmanager
    def hooks() -> Iterator[None]:
        with saved_tensors_hooks(pack, lambda held: held.back() if isinstance(held, _OnHost) else held):
            yield

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in weights or tensor.numel() == 0:
            return tensor
        return _OnHost(tensor)

    return hooks


PEERS: dict[str, Callable[[list[nn.Module]], Hooks]] = {
    "checkpoint": torch_checkpoint,
    "selective": torch_selective,
    "save_on_cpu": save_on_cpu,
}


def run_training(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each measured step, or the peak of one."""
    before = allocated_bytes()
    process = psutil.Process()
    libraries = process.memory_info().rss
    trained = Trained(task)
    trained.step(WARM_ROWS)
    if trained.store is not None:
        trained.store.statistics(restart=True)
    found: dict[str, Any] = {}
    if task["what"] == "peak":
        footprint(lambda: None, torch.device("cpu"))
        arena = trained.store.arena_address if trained.store is not None else None
        states = allocated_bytes(arena) - before
        Path("/proc/self/clear_refs").write_text("5")
        HOST_PEAK[1] = HOST_PEAK[0]
        took = footprint(trained.step, torch.device("cpu"))
        status = Path("/proc/self/status").read_text().splitlines()
        resident = int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
        found |= {
            "peak_bytes": states + took.peak_bytes,
            "states_bytes": states,
            "resident_bytes": resident - libraries,
            "loss": took.result,
        }
    else:
        seconds = []
        for _ in range(task["steps"]):
            started = time.perf_counter()
            found["loss"] = trained.step()
            seconds.append(time.perf_counter() - started)
        found["step_s"] = seconds
    if trained.store is not None:
        moved = trained.store.statistics()
        found |= {
            "moved_bytes": dict(moved.moved_bytes),
            "stall_s": dict(moved.stall_s),
            "host_bytes": moved.peak_bytes["host"],
            "disk_bytes": moved.peak_bytes["disk"],
        }
    elif task["system"] == "save_on_cpu":
        found["host_bytes"] = HOST_PEAK[1]
    trained.close()
    return found


def cell(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    if task.get("ranks", 1) > 1:
        dist.init_process_group(
            "gloo", rank=int(os.environ["RANK"]), world_size=task["ranks"], init_method=f"file://{task['meet']}"
        )
    try:
        return run_calibration(task) if task["what"] == "calibrate" else run_training(task)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(cell(json.loads(sys.argv[1]))))
