"""The benchmarks run end to end at toy size, by the command a user types; their numbers are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def toy(name: str, folder: Path) -> Path:
    """Run a benchmark at toy size; returns its JSON."""
    out = folder / f"{name}.json"
    done = subprocess.run(
        [sys.executable, "-m", "farspan.jobs", "bench", name, "--toy", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "infra/py"), "FARSPAN_CACHE": str(folder)},
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_memory_policies_and_peers(tmp_path: Path) -> None:
    out = toy("memory", tmp_path)
    cells = json.loads(out.read_text())["cells"]
    timed = {key.split("/")[3] for key in cells if key.startswith("time/")}
    assert timed == {"keep", "checkpoint", "solve at checkpoint"}
    losses = {key: cell["loss"] for key, cell in cells.items() if key.startswith("peak/")}
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    assert "Largest miss" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_sft_beside_trl_and_a_bare_loop(tmp_path: Path) -> None:
    out = toy("sft", tmp_path)
    cells = json.loads(out.read_text())["cells"]
    assert {key.split("/")[2] for key in cells} == {"farspan-1", "farspan-2", "trl", "bare"}
    losses = {key: cell["loss"] for key, cell in cells.items()}
    assert max(losses.values()) - min(losses.values()) < 0.1, losses  # the same model on tokens of the same kind
    assert "| 256 | farspan-2 |" in out.with_suffix(".md").read_text()


def test_exchange_in_few_bits(tmp_path: Path) -> None:
    out = toy("exchange", tmp_path)
    found = json.loads(out.read_text())
    assert {*found} == {"exact/0", "4 bits, the same for all/0", "4 bits, learned/0"}
    used = {key: sum(map(bool, cell["channels_by_bits"])) for key, cell in found.items() if "bits" in cell}
    assert used["4 bits, the same for all/0"] == 1 < used["4 bits, learned/0"], used
    assert 0.001 < found["4 bits, learned/0"]["error"] < 1
    assert "| 4 bits, learned | 4.00 |" in out.with_suffix(".md").read_text()


def test_lora_beside_peft(tmp_path: Path) -> None:
    out = toy("lora", tmp_path)
    for key, found in json.loads(out.read_text()).items():
        stored = {system: one["stored_bytes_per_row"] for system, one in found.items()}
        assert stored["Farspan"] <= stored["peft, adapters in bf16"] < stored["peft, its default"], key
    assert "| 0.05, 300 | Farspan |" in out.with_suffix(".md").read_text()


def test_reversible_layers_beside_checkpointing(tmp_path: Path) -> None:
    out = toy("reversible", tmp_path)
    cells = json.loads(out.read_text())
    assert {*cells} == {"depth/2", "depth/4", "float/bf16/4", "float/fp32/4", "start"}
    anchors = {name: one["anchor_every"] for name, one in cells["float/fp32/4"].items() if "anchor_every" in one}
    assert anchors["LoRA, float, lambda 1"] >= anchors["LoRA, float, lambda 0.1 (published)"] >= 1
    by_layer = {
        system: cells["depth/4"][system]["kept_bytes_per_row"] - cells["depth/2"][system]["kept_bytes_per_row"]
        for system in cells["depth/4"]
        if isinstance(cells["depth/4"][system], dict)
    }
    assert by_layer["LoRA, reversible, wiring 1"] == 2 * 64 * 3 / 8  # two layers of 64 elements, 3 bits each
    assert by_layer["LoRA, reversible, wiring 3"] == 2 * by_layer["LoRA, reversible, wiring 1"]
    assert by_layer["LoRA, every layer checkpointed"] >= 2 * 64 * 2
    assert "| 3 |" in out.with_suffix(".md").read_text()


def test_sparse_attention_beside_flash_attention(tmp_path: Path) -> None:
    out = toy("spt", tmp_path)
    cells = json.loads(out.read_text())
    assert {*cells} == {"256", "512"}
    for cell in cells.values():
        kept = {system: one["kept_bytes"] for system, one in cell.items() if isinstance(one, dict)}
        assert kept["flash attention"] <= kept["SPT, blocks"] < kept["weights stored"]
    assert "| 512 | SPT, blocks |" in out.with_suffix(".md").read_text()


def test_every_method_in_one_table(tmp_path: Path) -> None:
    out = toy("adapters", tmp_path)
    cells = json.loads(out.read_text())
    losses = {key: cell["held_out"] for key, cell in cells.items() if "/0" in key}
    assert len(losses) == len(cells["times"]) >= 25
    assert max(losses.values()) - min(losses.values()) < 0.5, losses
    assert cells["bytes/LoRA"]["kept_per_row"] < cells["bytes/LoRA, peft's default"]["kept_per_row"]
    states = [cells[f"bytes/{name}"]["states"] for name in ("full, coat", "full, muon", "full fine-tuning")]
    assert states == sorted(states)
    assert cells["bytes/LoRA on nf4"]["weights"] < cells["bytes/LoRA"]["weights"]
    assert "| reversible 3, 3 bits, LoRA |" in out.with_suffix(".md").read_text()


def test_rewards_that_know_about_length(tmp_path: Path) -> None:
    out = toy("rl-rewards", tmp_path)
    cells = json.loads(out.read_text())
    assert {"start", "plain/0", "LASER-D/0", "L1-Max/0"} <= cells.keys() and len(cells) == 11
    for cell in cells.values():
        assert sum(count for count, _ in cell["by_length"].values()) == 16
    assert "| LASER-D |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000
