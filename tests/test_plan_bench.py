"""`farspan bench plan` at a reduced grid, by the command a user types; and the estimate it compares with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _closed_form import W_KIB, closed_form, longest_apart, longest_pooled

from farspan.memory.hardware import load_hardware
from farspan.memory.plan import POLICIES
from farspan.memory.shape import ModelShape

H200 = load_hardware("h200")
LLAMA_8B = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)


def test_the_benchmark_runs_and_keeps_its_promises(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "infra/py")}
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "farspan.jobs", "bench", "plan", "--toy", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    cells = found["cells"]["tiled"]
    assert cells.keys() == {"32K", "128K"} and all(tuple(row) == POLICIES for row in cells.values())
    assert cells["32K"]["solve"]["moved_bytes"] == 0
    assert not cells["128K"]["keep"]["fits"] and cells["128K"]["keep"]["over_bytes"]["device"] > 0
    assert (
        cells["128K"]["solve"]["step_s"] < min(row["step_s"] for row in cells["128K"].values() if row["fits"]) * 1.001
    )
    most = found["longest"]["tiled"]["three tiers"]
    assert most["solve"] > 3 * most["offload-inputs"] > most["recompute"]
    # nothing that either estimate counts is lost between its terms
    for pair in found["terms"].values():
        for estimate in pair.values():
            assert sum(estimate["terms"].values()) == pytest.approx(estimate["step_s"], rel=1e-9)
    text = out.with_suffix(".md").read_text()
    assert "| 128K | no: device +" in text and "| three tiers |" in text and "nothing leaves" not in text


@pytest.mark.parametrize(("tokens", "seconds", "k"), [(2**17, 35.8, 1), (2**19, 478.2, 1), (2**20, 1973, 4)])
def test_closed_form_by_hand(tokens: int, seconds: float, k: int) -> None:
    """By hand at 1M: 43.3 + 450.4 + 1334.4 s, 3.5 passes of 20.13 s, (1 - 0.593)^2 of 450.4 s."""
    found = closed_form(LLAMA_8B, H200, tokens)
    assert found["k"] == k
    assert found["step_s"] == pytest.approx(seconds, rel=1e-3)


def test_closed_form_ends_where_its_pool_does() -> None:
    """(116.5 + 115 + 60) GB / (64 + 32.5 + 40) KiB; with the device apart, 116.5 GB / (40 + 2 * 8.125 + 8) KiB."""
    assert longest_pooled(LLAMA_8B, H200) == pytest.approx(291.5e9 / (136.5 * 1024), rel=1e-3)
    states_bytes = 2 * LLAMA_8B.parameters + H200.context_bytes
    assert longest_apart(LLAMA_8B, H200, W_KIB, states_bytes) == pytest.approx(116.5e9 / (64.25 * 1024), rel=1e-3)
