"""What one cell of a GPU benchmark does. It prints one JSON object as its last line.

Device bytes are the caching allocator's on CUDA; on CPU, for the toy runs, torch's CPU allocator's by its own events.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _ceiling_cells import attention, copies, disk, fastest, machine, matmul
from _device import DEVICE, wait
from _peers import NEED_A_GPU, PEERS, Around, Unavailable
from torch import Tensor

from farspan.memory.plan import Placement
from farspan.memory.tiers import Store


class Trained:
    """A model on the device with its engine, under a placement or a peer's way."""

    def __init__(self, task: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM

        from farspan.memory.config import Tiles
        from farspan.trainer.attention import NAME
        from farspan.trainer.config import FullFineTune, LoRA, Optim, RandomModel
        from farspan.trainer.engine_plain import PlainEngine
        from farspan.trainer.models import DTYPES, decoder_layers, prepare_model, random_config

        config, self.rows = task["config"], task["length"]
        shape = RandomModel.model_validate(config["model"])
        placement = Placement.model_validate(task["placement"]) if task.get("placement") else None
        self.folder = tempfile.TemporaryDirectory(dir=task["folder"])
        self.store = None
        if (tiers := task.get("tiers")) is not None:
            self.store = Store(
                host_bytes=tiers["host_bytes"],
                disk_dir=Path(self.folder.name) if tiers["disk_bytes"] else None,
                disk_bytes=tiers["disk_bytes"],
                slots=tiers["slots"],
                device=DEVICE,
            )
        torch.manual_seed(0)
        with DEVICE:
            causal = AutoModelForCausalLM.from_config(
                random_config(shape, context=self.rows, eos_id=0, pad_id=1),
                dtype=DTYPES[config["precision"]],
                attn_implementation=NAME,
            )
        adapter = LoRA(rank=config["lora"], alpha=2.0 * config["lora"]) if config["lora"] else FullFineTune()
        kept = placement is None or placement.keeps_everything
        self.module, trainable = prepare_model(
            causal,
            adapter=adapter,
            memory=Tiles(loss_tile=config["loss_tile"], mlp_tile=config["mlp_tile"] or "off"),
            seed=0,
            placement=None if kept else placement,
            store=self.store,
        )
        self.module.to(DEVICE)
        self.around = Around()
        if task["system"] in PEERS:
            self.around = PEERS[task["system"]](decoder_layers(causal), self.module)
        self.engine = PlainEngine(self.module, trainable, Optim(lr=1e-4), DEVICE)
        self.vocab = shape.vocab
        self.generator = torch.Generator().manual_seed(1)

    def step(self, rows: int | None = None) -> float:
        from farspan.trainer.attention import PackedSequence

        rows = rows or self.rows
        ids = torch.randint(2, self.vocab, (1, rows), generator=self.generator.manual_seed(1)).to(DEVICE)
        positions = torch.arange(rows, device=DEVICE)[None]
        with self.around.step():
            with self.around.forward():
                loss = self.module(ids, ids.roll(-1, 1), positions, PackedSequence((rows,), None))
            self.engine.backward(loss / rows, last=True)
        self.engine.step(lr=1e-4, clip_norm=1.0)
        return float(loss.detach()) / rows

    def close(self) -> None:
        self.engine.close()
        if self.store is not None:
            self.store.close()
        self.folder.cleanup()


def peak_of(step: Callable[[], float], store: Store | None, before: int) -> tuple[int, float]:
    """Most device bytes of a step, states included, and its loss."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats(DEVICE)
        loss = step()
        return torch.cuda.max_memory_allocated(DEVICE), loss
    from farspan.memory.allocations import allocated_bytes, footprint

    footprint(lambda: None, DEVICE)
    states = allocated_bytes(store.arena_address if store is not None else None) - before
    took = footprint(step, DEVICE)
    return states + took.peak_bytes, took.result


def train_planned(task: dict[str, Any]) -> dict[str, Any]:
    """The same with planned addresses in the place of torch's allocator: steps after a recorded one."""
    if DEVICE.type != "cuda":
        raise Unavailable("planned addresses are for a GPU's memory")
    from farspan.memory.arena import Arena, build
    from farspan.trainer.addresses import PlannedAddresses

    arena = Arena(build(Path(tempfile.mkdtemp())), cuda=True)
    trained = Trained(task)
    told: list[Any] = []
    steps = PlannedAddresses(arena, trained.module.layers, told.append)
    found: dict[str, Any] = {"step_s": []}
    for turn in range(3 + task["steps"]):  # one that warms up, one that is recorded, one that is planned
        arena.statistics(restart=True)
        wait()
        start_s = time.perf_counter()
        with steps.step():
            found["loss"] = trained.step(task["warm_rows"] if turn == 0 else None)
        wait()
        if turn > 2:
            found["step_s"].append(time.perf_counter() - start_s)
    seen = arena.statistics()
    found |= {
        "peak_bytes": seen.peak_live_bytes,
        "reserved_bytes": seen.peak_reserved_bytes,
        "off_plan": seen.off_plan + seen.occupied,
        "on_plan": seen.on_plan,
        "gap": told[0].gap,
    }
    trained.close()
    return found


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, the peak of one more, and what moved."""
    if DEVICE.type != "cuda" and task["system"] in NEED_A_GPU:
        raise Unavailable(NEED_A_GPU[task["system"]])
    if task.get("addresses") == "planned":
        return train_planned(task)
    from farspan.memory.allocations import allocated_bytes

    before = allocated_bytes() if DEVICE.type == "cpu" else 0
    trained = Trained(task)
    ballast = torch.empty(task.get("ballast_bytes", 0), dtype=torch.uint8, device=DEVICE)
    trained.step(min(task["warm_rows"], task["length"]))
    found: dict[str, Any] = {"step_s": []}
    if trained.store is not None:
        trained.store.statistics(restart=True)
    for _ in range(task["steps"]):
        wait()
        start_s = time.perf_counter()
        peak, loss = peak_of(trained.step, trained.store, before) if DEVICE.type == "cuda" else (0, trained.step())
        wait()
        found["step_s"].append(time.perf_counter() - start_s)
        found |= {"peak_bytes": peak, "loss": loss}
    if trained.store is not None:
        moved = trained.store.statistics()
        found |= {
            "moved_bytes": {lane: size // task["steps"] for lane, size in moved.moved_bytes.items()},
            "busy_s": {lane: busy_s / task["steps"] for lane, busy_s in moved.busy_s.items()},
            "stall_s": {lane: stall_s / task["steps"] for lane, stall_s in moved.stall_s.items()},
            "host_bytes": moved.peak_bytes["host"],
            "disk_bytes": moved.peak_bytes["disk"],
        }
    if DEVICE.type == "cpu":
        found["peak_bytes"], found["loss"] = peak_of(trained.step, trained.store, before)
    else:
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(DEVICE)
    found["ballast_bytes"] = ballast.nbytes
    trained.close()
    return found


def gradients(task: dict[str, Any]) -> dict[str, Any]:
    """Gradients under a placement against those of keeping everything: names that differ, and the largest difference
    beside that of two runs that keep everything."""
    torch.use_deterministic_algorithms(task["deterministic"])
    kept = {**task, "placement": None, "tiers": None}
    first, again, placed = (_gradients(each) for each in (kept, kept, task))
    return {
        "differing": [name for name in first if not torch.equal(first[name], placed[name])],
        "of": len(first),
        "largest": max(float((first[name] - placed[name]).abs().max()) for name in first),
        "largest of keep": max(float((first[name] - again[name]).abs().max()) for name in first),
    }


def _gradients(task: dict[str, Any]) -> dict[str, Tensor]:
    trained = Trained(task)
    try:
        found: dict[str, Tensor] = {}
        original = trained.engine.step

        def step(**_: Any) -> float:
            found.update({name: g.detach().float().cpu() for name, g in trained.engine.full_gradients().items()})
            return original(**_)

        trained.engine.step = step  # type: ignore[method-assign]
        trained.step()
        return found
    finally:
        trained.close()


def calibrate(task: dict[str, Any]) -> dict[str, Any]:
    from farspan.trainer.calibrate import calibrate as measure
    from farspan.trainer.config import CalibrationRequest

    return dict(json.loads(measure(CalibrationRequest.model_validate(task["request"])).model_dump_json()))


WHAT: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "machine": machine,
    "matmul": matmul,
    "copies": copies,
    "disk": disk,
    "attention": attention,
    "fastest": fastest,
    "calibrate": calibrate,
    "train": train,
    "gradients": gradients,
}


def cell(task: dict[str, Any]) -> dict[str, Any]:
    from farspan.kernels import attention as kernels

    kernels.use(*task.get("kernels", ()))
    if task["toy"]:
        torch.set_num_threads(1)
    try:
        return WHAT[task["what"]](task)
    except Unavailable as error:
        return {"failed": f"not run: {error}"}
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of device memory"}


if __name__ == "__main__":
    print(json.dumps(cell(json.loads(sys.argv[1]))))
