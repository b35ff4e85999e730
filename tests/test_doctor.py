"""The doctor: measures what it says, names what is wrong with a cure, and never hangs or dies of what it finds."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from farspan.jobs import disk_speed, doctor_cluster, matmul_speed
from farspan.jobs import doctor as examined
from farspan.jobs.disk_speed import BLOCK_BYTES, measure_disk
from farspan.jobs.doctor import Finding, devices, doctor, facts


def of(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_this_machine_is_ready_and_the_table_says_so(tmp_path: Path) -> None:
    out = io.StringIO()
    began = time.monotonic()
    code = doctor(console=Console(file=out, width=160), output_dir=tmp_path / "outputs")
    assert time.monotonic() - began < 30, "15 s on a quiet machine"
    text = out.getvalue()
    assert code == 0 and text.rstrip().endswith("ready")
    for name in (
        "torch",
        "ray",
        "device",
        "cores",
        "host memory",
        "memory copy",
        "ulimit -l",
        "/dev/shm",
        "disk speed",
    ):
        assert name in text
    assert list(tmp_path.iterdir()) == [], "nothing may stay behind"


def test_facts_are_json_with_the_measured_numbers(tmp_path: Path) -> None:
    found = json.loads(json.dumps(facts(output_dir=tmp_path)))
    assert found["ready"] is True
    measured = {finding["name"]: finding["measured"] for finding in found["findings"]}
    assert measured["memory copy"]["bytes_per_s"] > 1e8
    assert measured["disk speed"]["write_bytes_per_s"] > 1e6
    assert 0 < measured["host memory"]["free_bytes"] <= measured["host memory"]["total_bytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asked of processors only")
def test_a_processor_that_is_slow_in_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for share, level in ((0.0, "ok"), (1e9, "warn")):
        monkeypatch.setattr(matmul_speed, "SLOW_BF16", share)
        found = of(devices(), "precision")
        assert found.level == level and ("precision=fp32" in found.advice) == (level == "warn")
        assert found.measured["fp32_flop_per_s"] > 1e8 and found.measured["bf16_flop_per_s"] > 1e6


def test_nobody_at_the_address_is_exit_code_4_within_bounds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free_port = listener.getsockname()[1]
    out = io.StringIO()
    began = time.monotonic()
    code = doctor(f"127.0.0.1:{free_port}", console=Console(file=out, width=160), output_dir=tmp_path)
    assert code == 4 and time.monotonic() - began < 30
    assert "FAIL  ray" in out.getvalue() and "not ready: ray" in out.getvalue()


@pytest.mark.parametrize("where", ["a file", "below a file", "a folder on sysfs"])
def test_an_output_folder_that_cannot_be_written_fails(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    folder = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "outputs",
        "a folder on sysfs": Path("/sys/kernel"),
    }[where]
    failed = [
        finding for finding in examined._bounded("x", lambda: examined.output_folder(folder)) if finding.level == "fail"
    ]
    assert failed and failed[0].advice


def test_missing_and_untested_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, str] = {"torch": "9.9", "transformers": "5.20.0", "peft": "0.21.2", "ray": "2.60.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch<2.14,>=2.11", "deepspeed>=0.19; extra == 'x'"]
    )
    found = examined.versions()
    assert of(found, "torch").level == "warn" and "<2.14" in of(found, "torch").advice
    assert of(found, "deepspeed").level == "fail" and "pip install" in of(found, "deepspeed").advice
    assert of(found, "ray").level == "ok"


def test_a_probe_that_hangs_or_raises_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined, "PROBE_LIMIT_S", 0.2)
    gate = threading.Event()

    def hang() -> list[Finding]:
        gate.wait()
        return []

    (hung,) = examined._bounded("mount", hang)
    gate.set()
    assert hung.level == "fail" and "no answer" in hung.value
    (raised,) = examined._bounded("driver", lambda: [Finding("x", "ok", str(1 // 0))])
    assert raised.level == "fail" and "ZeroDivisionError" in raised.value


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000", "/sys/fs/cgroup/memory.max": "1073741824"}, 1.5, 2**30),
        ({"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"}, None, None),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            2.0,
            None,
        ),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None, None),
        ({}, None, None),
    ],
)
def test_container_limits_of_both_cgroup_versions(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None, limit: int | None
) -> None:
    monkeypatch.setattr(examined, "_first_text", lambda path: files.get(path, ""))
    assert examined._cpu_quota() == quota
    assert examined._memory_limit()[0] == limit
    if limit is not None:
        memory = examined.host_memory()[0]
        assert memory.level == "warn" and "container limit" in memory.value
        assert memory.measured["total_bytes"] == limit


def test_disk_is_measured_around_the_page_cache_or_says_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = measure_disk(tmp_path, file_bytes=4 * BLOCK_BYTES)
    assert direct.write_bytes_per_s > 0 and direct.read_bytes_per_s > 0
    really_open = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    cached = measure_disk(tmp_path, file_bytes=4 * BLOCK_BYTES)
    assert "page cache" in cached.how
    assert list(tmp_path.iterdir()) == []


def test_disk_rate_is_bytes_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes 20 ms a block, by construction: 8 MiB / 20 ms = 419 MB/s at most, and not much less."""

    def slow(at: int) -> int:
        time.sleep(0.02)
        return BLOCK_BYTES

    rate, done = disk_speed._timed(slow, 10 * BLOCK_BYTES)
    assert done == 10 * BLOCK_BYTES
    assert 0.3 * BLOCK_BYTES / 0.02 < rate <= BLOCK_BYTES / 0.02
    monkeypatch.setattr(disk_speed, "LIMIT_S", 0.1)
    _, done = disk_speed._timed(slow, 1000 * BLOCK_BYTES)
    assert done <= 6 * BLOCK_BYTES, "a slow disk is given up"


def test_a_full_disk_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    found = examined.output_folder(tmp_path)
    assert of(found, "disk speed").level == "fail" and "No space" in of(found, "disk speed").value
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from farspan.cluster.session import connect

    with connect(None, num_cpus=1):
        yield


@pytest.mark.ray
def test_ray_and_shared_storage_are_checked_on_every_node(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    found = doctor_cluster.cluster("auto", tmp_path / "outputs")
    assert [finding.level for finding in found] == ["ok", "ok"], found
    assert "1 node, " in found[0].value and found[1].value == "reads and writes"
    assert list(tmp_path.iterdir()) == [], "nothing may stay behind"

    # A node that does not share the folder cannot be had on one machine; a task that looks elsewhere is the same.
    monkeypatch.setattr(doctor_cluster, "_write_and_read", lambda probe, node: "No such file or directory")
    (elsewhere,) = doctor_cluster.shared_storage(ray.nodes(), tmp_path / "outputs")
    assert elsewhere.level == "fail" and "does not see" in elsewhere.value and elsewhere.advice
    monkeypatch.setattr(doctor_cluster, "_write_and_read", lambda probe, node: Path(probe).name)
    (silent,) = doctor_cluster.shared_storage(ray.nodes(), tmp_path / "outputs")
    assert silent.level == "fail" and "does not reach this machine" in silent.value
