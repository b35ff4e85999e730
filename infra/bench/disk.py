"""The disk tier against a plain loop of O_DIRECT calls, and fio where installed, on the very same blocks.

Each variant of the tier has its file; the plain loop and fio open that file through /proc. All move the same bytes in
calls of the same size over a file that has been written before, as a run overwrites the same pages step after step. The
plain loop and fio move aligned memory as it lies; the tier starts and ends at tensors, so it copies every byte once
more. Each repeat begins with another system, since virtual disks have bursts; medians over the repeats, ratios within a
repeat. Where a buffer happens to lie in physical memory can change a system's speed twofold on a virtual machine, for
as long as it lives: the verdict takes the plain loop of the variant where it was fastest.

- `plain`: one thread, os.pwritev and os.preadv from and to a buffer as large as one of the tier's tensors;
- `fio`: psync, one job, if there is a `fio`;
- `tier`: tensors through bounce buffers; `staged`: with host memory to stage in; `checksum`: verified.

    farspan bench disk --folder /mnt/nvme      results/disk.json, results/disk.md
    farspan bench disk --toy                   seconds, for the test
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.memory.tiers import Store
from farspan.memory.tiers.store import CHUNK_BYTES

RESULTS = Path(__file__).parent / "results"
TENSOR_BYTES = 64 * 2**20
FETCHED_AHEAD = 2
ALLOWED_RATIO = 0.9
VARIANTS: dict[str, dict[str, Any]] = {
    "tier": {"host_bytes": 0},
    "staged": {"host_bytes": 4 * TENSOR_BYTES},
    "checksum": {"host_bytes": 0, "checksum": True},
}
Cell = dict[str, float]
"""Seconds by direction."""


def plain_pass(path: str, total_bytes: int, buffer: memoryview) -> Cell:
    """The shortest program that a file system can be asked to be fast for."""
    file = os.open(path, os.O_RDWR | os.O_DIRECT)

    def loop(call: Callable[..., int]) -> float:
        started_s = time.perf_counter()
        for offset in range(0, total_bytes, CHUNK_BYTES):
            at = offset % len(buffer)
            assert call(file, [buffer[at : at + CHUNK_BYTES]], offset) == CHUNK_BYTES
        return time.perf_counter() - started_s

    try:
        return {"write": loop(os.pwritev), "read": loop(os.preadv)}
    finally:
        os.close(file)


def fio_pass(path: str, total_bytes: int) -> Cell:
    def one(direction: str) -> float:
        done = subprocess.run(
            ["fio", "--name=disk", f"--filename={path}", f"--rw={direction}", f"--bs={CHUNK_BYTES}",
             f"--size={total_bytes}", "--direct=1", "--ioengine=psync", "--overwrite=1", "--output-format=json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return total_bytes / float(json.loads(done.stdout)["jobs"][0][direction]["bw_bytes"])

    return {"write": one("write"), "read": one("read")}


def tier_pass(store: Store, total_bytes: int, tensor: Tensor, buffers: list[Tensor]) -> Cell:
    """Tensors out until all are on disk, then back in the order they went, some fetched ahead."""
    started_s = time.perf_counter()
    stored = [store.put("disk", tensor) for _ in range(total_bytes // TENSOR_BYTES)]
    store.admit()  # the store has no slots: all is on disk
    written_s = time.perf_counter()
    for index, one in enumerate(stored):
        for ahead in range(index, min(index + FETCHED_AHEAD, len(stored))):
            store.fetch(stored[ahead], buffers[ahead % FETCHED_AHEAD])
        store.get(one)
    read_s = time.perf_counter()
    assert torch.equal(buffers[0], tensor)
    for one in stored:
        store.free(one)
    return {"write": written_s - started_s, "read": read_s - written_s}


def measure(folder: Path, variant: str, total_bytes: int, repeats: int) -> dict[str, list[Cell]]:
    """Seconds of each repeat by system; a first pass of each over the file is not counted."""
    pages = mmap.mmap(-1, TENSOR_BYTES)
    pages.madvise(mmap.MADV_HUGEPAGE)  # as the tier's arena: direct I/O is faster on contiguous memory
    aligned = memoryview(pages)
    aligned[:] = os.urandom(2**16) * (TENSOR_BYTES // 2**16)  # a disk that compresses must not gain from zeros
    tensor = torch.frombuffer(aligned, dtype=torch.uint8).clone()
    buffers = [torch.empty_like(tensor).fill_(0) for _ in range(FETCHED_AHEAD)]
    with Store(disk_dir=folder, disk_bytes=total_bytes, slots=0, prefault=True, **VARIANTS[variant]) as store:
        path = tier_file()
        runs = {"plain": partial(plain_pass, path, total_bytes, aligned)}
        if shutil.which("fio"):
            runs["fio"] = partial(fio_pass, path, total_bytes)
        runs[variant] = partial(tier_pass, store, total_bytes, tensor, buffers)
        for run in runs.values():
            run()
        cells: dict[str, list[Cell]] = {name: [] for name in runs}
        for repeat in range(repeats):
            first = repeat % len(runs)
            for name in [*runs][first:] + [*runs][:first]:
                cells[name].append(runs[name]())
                rates = {way: total_bytes / seconds_s / 1e9 for way, seconds_s in cells[name][-1].items()}
                print(
                    f"{repeat} {name:<9} write {rates['write']:5.2f} GB/s  read {rates['read']:5.2f} GB/s", flush=True
                )
    return cells


def tier_file() -> str:
    """The file of this process' store, which has no name."""
    paths = Path(f"/proc/{os.getpid()}/fd").iterdir()
    (found,) = [path for path in paths if "/farspan-offload-" in os.path.realpath(path)]
    return str(found)


def ratios(cells: dict[str, list[Cell]], name: str, base: str, way: str) -> list[float]:
    """Speed over that of `base` in the same repeat, sorted."""
    return sorted(theirs[way] / ours[way] for ours, theirs in zip(cells[name], cells[base]))


def table(done: dict[str, Any]) -> str:
    total_bytes, variants = done["total_bytes"], done["cells"]
    lines = [
        "# The disk tier and a plain loop of O_DIRECT",
        "",
        f"`farspan bench disk`. {total_bytes / 2**20:.0f} MiB in calls of {CHUNK_BYTES / 2**20:.0f} MiB, overwriting a "
        f"preallocated file; medians over {len(variants['tier']['plain'])} interleaved repeats.",
        f"Machine: {', '.join(f'{key} {value}' for key, value in done['machine'].items())}.",
        "",
        "| file of | system | write GB/s | to plain (median, range) | read GB/s | to plain (median, range) |",
        "|---|---|---|---|---|---|",
    ]
    for variant, cells in variants.items():
        for name in cells:
            row = [variant, name]
            for way in ("write", "read"):
                rate = total_bytes / statistics.median(cell[way] for cell in cells[name]) / 1e9
                to_plain = ratios(cells, name, "plain", way)
                row += [f"{rate:.2f}", f"{statistics.median(to_plain):.3f} ({to_plain[0]:.3f} to {to_plain[-1]:.3f})"]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def verdict(variants: dict[str, dict[str, list[Cell]]]) -> int:
    """1 when the tier's median is below what is allowed of the fastest median of the plain loop or fio, either way."""
    found = {}
    for way in ("write", "read"):
        for base in [name for name in ("plain", "fio") if name in variants["tier"]]:
            best_s = min(statistics.median(cell[way] for cell in cells[base]) for cells in variants.values())
            found[way, base] = best_s / statistics.median(cell[way] for cell in variants["tier"]["tier"])
            print(f"{way}, tier / fastest {base}: {found[way, base]:.3f} (at least {ALLOWED_RATIO})")
    return 1 if min(found.values()) < ALLOWED_RATIO else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="farspan bench disk", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--toy", action="store_true", help="one repeat over 64 MiB")
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to measure")
    parser.add_argument("--mib", type=int, default=1024, help="MiB per pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "disk.json")
    options = parser.parse_args(arguments)
    repeats = 1 if options.toy else options.repeats
    tensors = 1 if options.toy else max(options.mib * 2**20 // TENSOR_BYTES, 1)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            cells = {name: measure(Path(folder), name, tensors * TENSOR_BYTES, repeats) for name in VARIANTS}
    except OSError as error:  # a tmpfs without O_DIRECT, a folder that is not there
        parser.error(f"{options.folder} cannot be measured: {error.strerror}")
    done = {"machine": machine(options.folder), "total_bytes": tensors * TENSOR_BYTES, "cells": cells}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    text = table(done)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if options.toy else verdict(cells)


def machine(folder: Path) -> dict[str, Any]:
    import psutil

    mounts = {part.mountpoint: part for part in psutil.disk_partitions(all=True)}
    at = next((str(p) for p in [folder.resolve(), *folder.resolve().parents] if str(p) in mounts), "/")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "file system": mounts[at].fstype if at in mounts else "?",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
