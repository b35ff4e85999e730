"""`farspan doctor`: is this machine, and this cluster, ready? Measured where possible, and what to do where not.

Each probe is small, bounded in time and independent: one that fails or hangs becomes a line of the table, not the end
of the program. Bandwidths are measured, since a name plate says little about a container's disk: the disk with
O_DIRECT, so that the page cache does not answer for it, and copies with the best of a few repetitions. A whole
examination takes 5 to 15 seconds and up to 256 MiB of disk for its duration.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from farspan.jobs.disk_speed import measure_disk
from farspan.jobs.doctor_cluster import cluster
from farspan.jobs.finding import Finding, Level
from farspan.jobs.matmul_speed import matmul_flop_per_s, slow_in_bf16
from farspan.jobs.progress import size

NOT_READY_EXIT = 4
PROBE_LIMIT_S = 8.0
LOW_HOST_BYTES = 2 * 2**30
LOW_SHM_BYTES = 2**30
LOW_DISK_BYTES = 10 * 2**30
LOW_DISK_BYTES_PER_S = 200e6
LOW_OPEN_FILES = 4096
PACKAGES = ("torch", "transformers", "peft", "ray", "deepspeed")


def doctor(address: str | None = None, *, console: Console, output_dir: Path = Path("outputs")) -> int:
    """Examine this machine, and the Ray cluster at `address` if one is given, and print a table.

    Returns:
        0 when ready (warnings allowed), 4 when something would stop a run.
    """
    findings = []
    with console.status("looking at this machine") if console.is_terminal else nullcontext():
        for finding in examine(address, output_dir=output_dir):
            findings.append(finding)
    console.print(_table(findings))
    failed = [finding.name for finding in findings if finding.level == "fail"]
    verdict = f"not ready: {', '.join(failed)}" if failed else "ready"
    console.print(Text(verdict, style="bold red" if failed else "bold green"))
    return NOT_READY_EXIT if failed else 0


def facts(address: str | None = None, *, output_dir: Path = Path("outputs")) -> dict[str, Any]:
    """The same as one JSON object: `ready`, and `findings` with their measured numbers."""
    findings = list(examine(address, output_dir=output_dir))
    return {
        "ready": all(finding.level != "fail" for finding in findings),
        "host": socket.gethostname(),
        "findings": [asdict(finding) for finding in findings],
    }


def examine(address: str | None, *, output_dir: Path) -> Iterator[Finding]:
    """All probes, in the order of the table."""
    for name, probe in (
        ("versions", versions),
        ("device", devices),
        ("cores", cores),
        ("host memory", host_memory),
        ("limits", limits),
        ("output folder", lambda: output_folder(output_dir)),
    ):
        yield from _bounded(name, probe)
    if address is None:
        yield Finding("ray", "ok", "not asked; a run without --address starts its own Ray here")
    else:
        yield from cluster(address, output_dir)


def versions() -> list[Finding]:
    """Installed packages, against the ranges this version of Farspan was tested with."""
    ranges = _supported_ranges()
    findings = [Finding("python", "ok", platform.python_version())]
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing: Level = "warn" if package == "deepspeed" and sys.platform != "linux" else "fail"
            findings.append(
                Finding(package, missing, "not installed", f"pip install '{package}{ranges.get(package, '')}'")
            )
            continue
        supported = ranges.get(package)
        if supported is not None and not supported.contains(version, prereleases=True):
            findings.append(Finding(package, "warn", version, f"tested with {supported}; install one of these"))
        else:
            findings.append(Finding(package, "ok", version))
    return findings


def devices() -> list[Finding]:
    """CUDA devices with their memory and the bandwidth to and from the first; or the word that there is none."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [Finding("device", "ok", "CPU only"), _cpu_precision()]
        advice = f"torch {torch.__version__} sees no GPU: install a CUDA build, or look at what nvidia-smi says"
        return [Finding("device", "warn", "CPU only, though nvidia-smi is here", advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        low = free_bytes < 0.9 * total_bytes
        findings.append(
            Finding(
                f"device {index}",
                "warn" if low else "ok",
                f"{torch.cuda.get_device_name(index)}, {size(free_bytes)} of {size(total_bytes)} free",
                "another process holds memory on it; nvidia-smi names it" if low else "",
                {"free_bytes": free_bytes, "total_bytes": total_bytes},
            )
        )
    return [*findings, _device_bandwidth()]


def _cpu_precision() -> Finding:
    """A CPU without instructions for bf16 is tens of times slower in it, and that is the default."""
    rates = matmul_flop_per_s()
    value = f"{rates['fp32'] / 1e9:.0f} GFLOP/s in fp32, {rates['bf16'] / 1e9:.3g} in bf16"
    measured = {f"{name}_flop_per_s": rate for name, rate in rates.items()}
    if slow_in_bf16(rates):
        advice = "this processor has no instructions for bf16: train with --set precision=fp32"
        return Finding("precision", "warn", value, advice, measured)
    return Finding("precision", "ok", value, measured=measured)


def _device_bandwidth() -> Finding:
    """Pinned copies of 256 MiB both ways on device 0, best of 5, timed by events on the device."""
    import torch

    count_bytes = 256 * 2**20
    host = torch.empty(count_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(count_bytes, dtype=torch.uint8, device="cuda:0")
    rates: dict[str, float] = {}
    for name, target, source in (("to_device", device, host), ("to_host", host, device)):
        best_s = float("inf")
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            best_s = min(best_s, start.elapsed_time(end) / 1000)
        rates[f"{name}_bytes_per_s"] = count_bytes / best_s
    text = f"{_rate(rates['to_device_bytes_per_s'])} to the device, {_rate(rates['to_host_bytes_per_s'])} back"
    return Finding("host <-> device", "ok", text, measured=rates)


def cores() -> list[Finding]:
    """Cores this process may use: of the machine, by affinity, and by the container's quota."""
    machine, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    usable = min(allowed, quota) if quota is not None else allowed
    measured: dict[str, Any] = {"machine": machine, "usable": usable}
    text = f"{usable:g} usable of {machine}" + (" (container quota)" if quota is not None and quota < allowed else "")
    return [
        Finding(
            "cores",
            "ok" if usable >= 2 else "warn",
            text,
            "" if usable >= 2 else "two ranks will share one core",
            measured,
        )
    ]


def host_memory() -> list[Finding]:
    """Memory that a run may really take, the container's limit included, and how fast it is copied."""
    memory = psutil.virtual_memory()
    limit, used = _memory_limit()
    free_bytes = memory.available if limit is None else max(0, min(memory.available, limit - used))
    total_bytes = memory.total if limit is None else min(memory.total, limit)
    low = free_bytes < LOW_HOST_BYTES
    text = f"{size(free_bytes)} of {size(total_bytes)} free"
    if limit is not None and limit < memory.total:
        text += f" (container limit; the machine has {size(memory.total)})"
    advice = (
        f"a small run takes {size(LOW_HOST_BYTES)}: end other processes, or raise the container's limit" if low else ""
    )
    measured = {"free_bytes": free_bytes, "total_bytes": total_bytes, "container_limit_bytes": limit}
    return [Finding("host memory", "warn" if low else "ok", text, advice, measured), _copy_bandwidth()]


def _copy_bandwidth() -> Finding:
    import numpy as np

    source = np.ones(64 * 2**20, np.uint8)
    target = np.empty_like(source)
    best_s = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        np.copyto(target, source)
        best_s = min(best_s, time.perf_counter() - began)
    rate = source.nbytes / best_s
    return Finding("memory copy", "ok", f"{_rate(rate)}, one thread", measured={"bytes_per_s": rate})


def limits() -> list[Finding]:
    """Limits of the process and of the container that stop Ray, NCCL or locked buffers late and obscurely."""
    findings = []
    if os.path.isdir("/dev/shm"):  # noqa: PTH112  not a path of ours
        shm = shutil.disk_usage("/dev/shm")
        low = shm.free < LOW_SHM_BYTES
        advice = "Ray's object store and NCCL live there: start the container with --shm-size=8g" if low else ""
        text = f"{size(shm.free)} of {size(shm.total)} free"
        findings.append(Finding("/dev/shm", "warn" if low else "ok", text, advice, {"free_bytes": shm.free}))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < LOW_OPEN_FILES
    advice = f"Ray opens many: ulimit -n {16 * LOW_OPEN_FILES}" if few else ""
    findings.append(Finding("ulimit -n", "warn" if few else "ok", _limit_text(files, str), advice, {"files": files}))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = _limit_text(locked, size)
    if 0 <= locked < LOW_HOST_BYTES:
        text += "; only buffers locked with mlock (direct disk I/O) need more, CUDA's pinned memory does not"
    return [*findings, Finding("ulimit -l", "ok", text, measured={"bytes": locked})]


def output_folder(folder: Path) -> list[Finding]:
    """Free space where runs are written, and the measured speed of that disk."""
    target = folder.expanduser().absolute()
    existing = next(path for path in (target, *target.parents) if path.exists())
    name = "output folder"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = "set output_dir to a folder this user may write"
        return [Finding(name, "fail", f"cannot write {existing}", advice)]
    usage = shutil.disk_usage(existing)
    low = usage.free < LOW_DISK_BYTES
    advice = "a checkpoint takes 14 bytes a weight: free space, or set output_dir" if low else ""
    text = f"{size(usage.free)} of {size(usage.total)} free in {existing}"
    space = Finding(name, "warn" if low else "ok", text, advice, {"free_bytes": usage.free})
    try:
        speed = measure_disk(existing)
    except OSError as error:
        return [space, Finding("disk speed", "fail", f"{error.strerror or error}", "free space, or set output_dir")]
    text = f"write {_rate(speed.write_bytes_per_s)}, read {_rate(speed.read_bytes_per_s)}, {speed.how}"
    slow = min(speed.write_bytes_per_s, speed.read_bytes_per_s) < LOW_DISK_BYTES_PER_S
    advice = "checkpoints will take long: put output_dir on a local SSD or a faster share" if slow else ""
    return [space, Finding("disk speed", "warn" if slow else "ok", text, advice, asdict(speed))]


def _bounded(name: str, probe: Callable[[], list[Finding]]) -> list[Finding]:
    """Run a probe aside: a stale mount or a wedged driver would otherwise hold the program for ever."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(probe())
        except Exception as error:  # a broken driver or library is what this program is here to report
            found.append(Finding(name, "fail", f"{type(error).__name__}: {error}", "the probe itself failed on this"))

    thread = threading.Thread(target=run, daemon=True, name=f"doctor-{name}")
    thread.start()
    thread.join(PROBE_LIMIT_S)
    if thread.is_alive():
        return [
            Finding(
                name,
                "fail",
                f"no answer in {PROBE_LIMIT_S:.0f} s",
                "something below it hangs: see dmesg, mount, nvidia-smi",
            )
        ]
    return found


def _supported_ranges() -> dict[str, Any]:
    """Version ranges from our own metadata; empty when Farspan runs from a checkout without being installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("farspan") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines if "extra ==" not in line]
    return {requirement.name: requirement.specifier for requirement in parsed}


def _cpu_quota() -> float | None:
    quota, _, period = _first_text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        return int(quota) / int(period)
    quota, period = (_first_text(f"/sys/fs/cgroup/cpu/cpu.cfs_{word}_us") for word in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory_limit() -> tuple[int | None, int]:
    """(limit, used) of this container in bytes, cgroup v2 then v1; a v1 "no limit" is a number near 2^63."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        text = _first_text(limit)
        if text.isdigit() and int(text) < 2**60:
            return int(text), int(_first_text(used) or 0)
    return None, 0


def _first_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _limit_text(value: int, shown: Callable[[int], str]) -> str:
    return "unlimited" if value in (-1, resource.RLIM_INFINITY) else shown(value)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "what", "how it is", "what to do"):
        table.add_column(heading, overflow="fold")
    marks: dict[Level, Text] = {
        "ok": Text("ok", "green"),
        "warn": Text("warn", "yellow"),
        "fail": Text("FAIL", "bold red"),
    }
    for finding in findings:
        table.add_row(marks[finding.level], Text(finding.name), Text(finding.value), Text(finding.advice))
    return table
