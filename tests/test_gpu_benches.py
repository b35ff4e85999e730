"""The GPU benchmarks run end to end at toy size, here on the CPU: every script, every system, resumed where it stopped.

What they measure says nothing here; that cells, plans, tables and verdicts hang together does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
SCRIPTS = Path(__file__).parents[1] / "infra/bench/gpu"


def run(script: str, out: Path, *more: str) -> tuple[dict[str, Any], str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "infra/py"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), "--toy", "--out", str(out), *more],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = out.with_suffix(".md").read_text()
    assert "no GPU: sizes are toys" in table
    return json.loads(out.read_text())["cells"], table


def test_ceilings(tmp_path: Path) -> None:
    cells, table = run("ceilings", tmp_path / "ceilings.json")
    assert {"copies", "disk", "attention/1000/cpu", "attention/1000/flash"} <= cells.keys()
    cpu = cells["attention/1000/cpu"]
    assert cpu["error"] < 1e-2 and cpu["prefix_bit_equal"] and cpu["backward_s"] > 0
    assert cells["attention/1000/flash3"] == {"failed": "tensors on cpu"}
    assert "| copy, both |" in table and "| 1000 | cpu |" in table


def test_the_race(tmp_path: Path) -> None:
    out = tmp_path / "race.json"
    before, _ = run("race", out, "--minutes", "0")
    assert not before, "no time, no cell"
    cells, table = run("race", out)
    ran = {key.split("/")[2]: cell for key, cell in cells.items() if key.startswith("toy LoRA/")}
    assert ran.keys() >= {"solve", "keep", "recompute", "offload-inputs", "hf-checkpoint", "hf-offload", "liger"}
    losses = {name: cell["loss"] for name, cell in ran.items() if "failed" not in cell and "tiles" not in name}
    assert len(losses) == 6 and len(set(losses.values())) == 1, losses
    for name in ("trl-offload", "deepspeed-offload", "liger", "solve, planned addresses"):
        assert ran[name]["failed"].startswith("not run: ")
    # the plan that was made from measured layers says what the allocator then counts
    planned = {name: cell for name, cell in ran.items() if "planned_s" in cell and "failed" not in cell}
    misses = {name: cell["planned_bytes"] / cell["peak_bytes"] - 1 for name, cell in planned.items()}
    assert len(misses) == 5 and max(map(abs, misses.values())) < 0.05, misses
    same = [cell for key, cell in cells.items() if key.startswith("gradients/")]
    assert len(same) == 2 and not any(cell["differing"] for cell in same) and all(cell["of"] > 50 for cell in same)
    assert "solve takes" in table and "Longest context that ran: 1100" in table


def test_capacity(tmp_path: Path) -> None:
    cells, table = run("capacity", tmp_path / "capacity.json")
    (cell,) = (cell for key, cell in cells.items() if key.startswith("capacity/"))
    assert cell["layers"] < cell["of_layers"] == 4
    assert cell["ballast_bytes"] > 0 and cell["host_bytes"] + cell["disk_bytes"] > 0
    assert cell["peak_bytes"] == pytest.approx(cell["planned_bytes"], rel=0.05)
    assert "of 4 layers" in table


def test_short_contexts(tmp_path: Path) -> None:
    cells, _ = run("short", tmp_path / "short.json")
    kinds = {key.split("/")[0] for key in cells if key.startswith("toy")}
    assert kinds == {"toy LoRA", "toy full"}
    solved = [cell for key, cell in cells.items() if key.endswith("/solve")]
    assert len(solved) == 2 and not any(sum(cell.get("moved_bytes", {}).values()) for cell in solved)


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "infra/py"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "race.py"), "--out", str(tmp_path / "race.json")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4 and "--toy runs small sizes" in done.stderr
