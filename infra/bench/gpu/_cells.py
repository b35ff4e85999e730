"""What one cell of a GPU benchmark does. It prints one JSON object as its last line.

Device bytes are the caching allocator's on CUDA; on CPU, for the toy runs, torch's CPU allocator's by its own events.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from farspan.memory.plan import Placement
from farspan.memory.tiers import Store

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GIB = 1 << 30


class Unavailable(Exception):
    """Why a peer cannot run here."""


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def median_s(run: Callable[[], object], *, repeats: int = 5, warm: int = 1) -> float:
    def once() -> float:
        wait()
        start_s = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start_s

    for _ in range(warm):
        once()
    return statistics.median(once() for _ in range(repeats))


# Ceilings


def machine(_: dict[str, Any]) -> dict[str, Any]:
    names = ("torch", "triton", "transformers", "peft", "trl", "deepspeed", "liger-kernel", "flash-attn", "highspy")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    status = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    found: dict[str, Any] = {
        "gpu": None,
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "host_bytes": min(int(status["MemTotal"].split()[0]) * 1024, _of_this_container()),
        "versions": versions,
    }
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "gpu": properties.name,
            "device_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        }
    return found


def _of_this_container() -> int:
    """Bytes of memory it may use."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return 1 << 62
    return 1 << 62 if limit == "max" else int(limit)


def matmul(task: dict[str, Any]) -> dict[str, Any]:
    """bf16 products of the widths of a layer, whole and in row tiles."""
    rows, inner, out = task["rows"], task["inner"], task["out"]
    a, b = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((rows, inner), (inner, out)))
    seconds = median_s(lambda: a @ b)
    return {"seconds": seconds, "flop_per_s": 2 * rows * inner * out / seconds}


def copies(task: dict[str, Any]) -> dict[str, Any]:
    """Device to device, and over the link: each way alone, both at once, and both beside products."""
    size = task["bytes"]
    a, b = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    found = {"device": 2 * size / median_s(lambda: a.copy_(b))}
    with Store(host_bytes=2 * size, device=DEVICE, slots=8, prefault=True) as store:
        waiting = store.put("host", b, label="in")
        store.drain()

        def out() -> None:
            stored = store.put("host", a, label="out")
            store.finish(stored)
            store.free(stored)

        def back() -> None:
            store.get(waiting, out=b)

        def both() -> None:
            stored = store.put("host", a, label="out")
            store.fetch(waiting, b)
            store.get(waiting, out=b)
            store.finish(stored)
            store.free(stored)

        found["out"], found["in"] = size / median_s(out), size / median_s(back)
        found["both"] = 2 * size / median_s(both)
        if DEVICE.type == "cuda":
            side = task["matmul"]
            m = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
            once_s = median_s(lambda: m @ m)
            count = max(1, int(2 * size / found["both"] / once_s * 1.5))

            def busy() -> None:
                for _ in range(count):
                    m @ m

            alone_s = median_s(busy)
            store.statistics(restart=True)

            def beside() -> None:
                # asked for first: a transfer begins where the device stands when it is asked for
                stored = store.put("host", a, label="out")
                store.fetch(waiting, b)
                busy()
                store.get(waiting, out=b)
                store.finish(stored)
                store.free(stored)

            together_s = median_s(beside, repeats=3, warm=0)
            seen = store.statistics()
            found["out beside products"] = seen.moved_bytes["copy_out"] / seen.busy_s["copy_out"]
            found["in beside products"] = seen.moved_bytes["copy_in"] / seen.busy_s["copy_in"]
            found["products slowed by"] = together_s / alone_s
        store.free(waiting)
    return found


def disk(task: dict[str, Any]) -> dict[str, Any]:
    """Device to disk and back through the tier."""
    size, count = task["bytes"], task["count"]
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    with (
        tempfile.TemporaryDirectory(dir=task["folder"]) as folder,
        Store(
            host_bytes=count * size, disk_dir=Path(folder), disk_bytes=count * size, device=DEVICE, slots=count
        ) as store,
    ):
        stored = [store.put("disk", tensors[index % 2], label=str(index)) for index in range(count)]
        store.drain()
        for one in stored:
            store.fetch(one)
        for one in stored:
            store.get(one)
        rates = {}
        for lane in ("disk_write", "disk_read"):
            times = [(i.start_s, i.end_s) for i in store.statistics().intervals if i.lane == lane]
            rates[lane] = count * size / (max(end for _, end in times) - min(start for start, _ in times))
        return rates


def attention(task: dict[str, Any]) -> dict[str, Any]:
    """A back end at one length: seconds, rates, error on some rows, whether a prefix has the bits of the whole."""
    from farspan.kernels.attention import timings
    from farspan.kernels.attention_backends import BACKENDS, Pack

    rows, heads, kv_heads, size = (task[name] for name in ("rows", "heads", "kv_heads", "size"))
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(1, rows, n, size, device=DEVICE, dtype=torch.bfloat16, generator=generator).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    pack = Pack((rows,), size**-0.5)
    flop = 2 * rows * rows * heads * size  # two products, half of the square
    name = task["backend"]
    told = timings(q, k, v, pack, repeats=task["repeats"], names=[name])[name]
    if isinstance(told, str):
        return {"failed": told}
    forward_s, backward_s = told
    backend = BACKENDS[name]
    out, lse = backend.forward(q, k, v, pack)
    prefix = max(1, rows // 2 - 3)
    into = torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))
    backend.prefix(q, k, v, pack, prefix, *into)
    same = torch.equal(into[0][:, :, :prefix], out[:, :, :prefix])
    same &= torch.equal(into[1][:, :, :prefix], lse[:, :, :prefix])
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "forward_flop_per_s": flop / forward_s,
        "backward_flop_per_s": 2.5 * flop / backward_s,
        "prefix_bit_equal": same,
        "error": _error_on_some_rows(q, k, v, out, pack.scale),
    }


def fastest(task: dict[str, Any]) -> dict[str, Any]:
    """Which back ends a run would prefer."""
    from farspan.kernels.attention import fastest as quickest
    from farspan.kernels.attention_backends import Pack

    rows, heads, kv_heads, size = (task[name] for name in ("rows", "heads", "kv_heads", "size"))
    q, k, v = (
        torch.randn(1, rows, n, size, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    return {"names": quickest(q, k, v, Pack((rows,), size**-0.5))}


def _error_on_some_rows(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> float:
    """Largest relative error of single rows against fp64, the last one and those beside powers of two among them: past
    2^31 elements a kernel may be finite and wrong."""
    rows, group = q.shape[2], q.shape[1] // k.shape[1]
    chosen = sorted({0, rows // 3, rows // 2, rows // 2 + 1, rows - 2, rows - 1} & set(range(rows)))
    worst = 0.0
    for head in (0, q.shape[1] - 1):
        keys, values = k[0, head // group], v[0, head // group]
        for row in chosen:
            scores = (keys[: row + 1].double() @ q[0, head, row].double()) * scale
            want = scores.softmax(0) @ values[: row + 1].double()
            worst = max(worst, float((out[0, head, row].double() - want).norm() / want.norm()))
    return worst


# Training


def checkpointed(layers: list[nn.Module], run: Callable[[Any, Tensor], Any]) -> None:
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = lambda call, x: run(call, x)  # type: ignore[assignment]


class Around(NamedTuple):
    """Contexts that a peer's own trainer would enter."""

    forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Around forward and backward."""


def wants_grad(x: Tensor) -> Tensor:
    """Reentrant checkpointing needs an input with a gradient, as `enable_input_require_grads` sees to."""
    return x if x.requires_grad else x.detach().requires_grad_()


def hf_checkpoint(layers: list[nn.Module], _: nn.Module) -> Around:
    """Hugging Face's checkpointing, its default."""
    checkpointed(layers, lambda call, x: checkpoint(call, x, use_reentrant=False))
    return Around()


def hf_offload(layers: list[nn.Module], _: nn.Module) -> Around:
    """Hugging Face's checkpointing, reentrant, with what it saves moved out by torch's `save_on_cpu`."""
    checkpointed(layers, lambda call, x: checkpoint(call, wants_grad(x), use_reentrant=True))
    return Around(forward=lambda: save_on_cpu(pin_memory=DEVICE.type == "cuda"))


def trl_offload(layers: list[nn.Module], module: nn.Module) -> Around:
    """TRL's OffloadActivations over reentrant checkpointing."""
    try:
        from trl.models.activation_offloading import OffloadActivations
    except ImportError as error:
        raise Unavailable(f"{error}") from None
    checkpointed(layers, lambda call, x: checkpoint(call, wants_grad(x), use_reentrant=True))
    offload = OffloadActivations(use_pin_memory=True, use_streams=True)
    if hasattr(offload, "update_model_params"):
        offload.update_model_params(module)
    return Around(step=lambda: offload)


def deepspeed_offload(layers: list[nn.Module], _: nn.Module) -> Around:
    """DeepSpeed's activation checkpointing in host memory."""
    try:
        import deepspeed
    except ImportError as error:
        raise Unavailable(f"{error}") from None
    if not dist.is_initialized():  # it wants a group, of one
        meet = Path(tempfile.mkdtemp()) / "meet"
        dist.init_process_group("nccl", init_method=f"file://{meet}", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="nccl")
    deepspeed.checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=True)
    checkpointed(layers, lambda call, x: deepspeed.checkpointing.checkpoint(call, wants_grad(x)))
    return Around()


def liger(layers: list[nn.Module], module: nn.Module) -> Around:
    """Liger's kernels under Hugging Face's checkpointing."""
    try:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise Unavailable(f"{error}") from None
    _apply_liger_kernel_to_instance(model=module._causal[0])  # type: ignore[index, union-attr]
    return hf_checkpoint(layers, module)


PEERS: dict[str, Callable[[list[nn.Module], nn.Module], Around]] = {
    "hf-checkpoint": hf_checkpoint,
    "hf-offload": hf_offload,
    "trl-offload": trl_offload,
    "deepspeed-offload": deepspeed_offload,
    "liger": liger,
}


NEED_A_GPU = {
    "trl-offload": "OffloadActivations needs an accelerator",
    "deepspeed-offload": "what it moves to host memory must come from a GPU",
    "liger": "its kernels need a GPU",
}


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


def main(arguments: list[str]) -> int:
    from farspan.kernels import attention as kernels

    task = json.loads(arguments[0])
    kernels.use(*task.get("kernels", ()))
    try:
        found = WHAT[task["what"]](task)
    except Unavailable as error:
        found = {"failed": f"not run: {error}"}
    except torch.cuda.OutOfMemoryError:
        found = {"failed": "out of device memory"}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
