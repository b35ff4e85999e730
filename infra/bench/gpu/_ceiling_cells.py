"""Cells about the machine: what it is, products, copies, the disk, attention kernels."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _device import DEVICE, median_s
from torch import Tensor

from farspan.memory.tiers import Store


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
