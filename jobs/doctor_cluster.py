"""What `farspan doctor` asks of a Ray cluster: does it answer, and do all nodes share the output folder?"""

from __future__ import annotations

import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from farspan.errors import FarspanError
from farspan.jobs.finding import Finding

NODE_LIMIT_S = 10.0


def cluster(address: str, output_dir: Path) -> list[Finding]:
    """Whether Ray answers at `address`, what it has, and whether every node shares the output folder with us."""
    from farspan.cluster.session import connect

    began = time.monotonic()
    try:
        with connect(address) as session:
            import ray

            nodes = [node for node in ray.nodes() if node["Alive"]]
            has = ray.cluster_resources()
            count = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
            text = f"{session.address}: {count}, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
            took_s = time.monotonic() - began
            reached = Finding(
                "ray", "ok", f"{text} (in {took_s:.1f} s)", measured={"nodes": len(nodes), "connect_s": took_s}
            )
            return [reached, *shared_storage(nodes, output_dir)]
    except FarspanError as error:
        return [Finding("ray", "fail", f"{error.what}: {error.why}", error.try_)]


def shared_storage(nodes: list[dict[str, Any]], output_dir: Path) -> list[Finding]:
    """One task per node reads what we wrote into the output folder and writes what we then read."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = output_dir.expanduser().absolute()
    made = not folder.exists()
    probe = folder / f".farspan-doctor-{uuid.uuid4().hex[:12]}"
    try:
        probe.mkdir(parents=True)
        (probe / "driver").write_text(probe.name, encoding="utf-8")
        task = ray.remote(num_cpus=0, max_retries=0)(_write_and_read)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(probe), node["NodeID"]
            ): node
            for node in nodes
        }
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_LIMIT_S)
        return [_storage_finding(node, ask if ask in answered else None, probe) for ask, node in asked.items()]
    except OSError as error:
        return [
            Finding(
                "storage", "fail", f"{folder}: {error.strerror or error}", "set output_dir to storage all nodes mount"
            )
        ]
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _storage_finding(node: dict[str, Any], answer: Any, probe: Path) -> Finding:
    import ray

    name = f"storage on {node.get('NodeManagerAddress', node['NodeID'][:8])}"
    advice = "set output_dir to storage that every node mounts at the same path"
    if answer is None:
        return Finding(
            name, "fail", f"no answer in {NODE_LIMIT_S:.0f} s", "is the node busy or its mount stale? ray status"
        )
    try:
        seen = ray.get(answer, timeout=1)
    except Exception as error:  # whatever the task died of is the finding
        return Finding(name, "fail", str(error).strip().splitlines()[-1], advice)
    if seen != probe.name:
        return Finding(name, "fail", f"does not see {probe.parent} of this machine ({seen})", advice)
    try:
        written = (probe / node["NodeID"]).read_text(encoding="utf-8")
    except OSError as error:
        return Finding(name, "fail", f"its file does not reach this machine ({error.strerror})", advice)
    same = written == node["NodeID"]
    return Finding(
        name, "ok" if same else "fail", "reads and writes" if same else "reads back other bytes", "" if same else advice
    )


def _write_and_read(probe: str, node_id: str) -> str:
    """Runs on a node: what it reads of the driver's file, after writing its own."""
    try:
        (Path(probe) / node_id).write_text(node_id, encoding="utf-8")
        return (Path(probe) / "driver").read_text(encoding="utf-8")
    except OSError as error:
        return error.strerror or str(error)
