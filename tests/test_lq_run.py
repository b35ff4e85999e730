"""Prepared bases by the command line on a local Ray: tasks, training on two ranks, resuming, exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.trainer.bases.prepared.store import PREPARED, PreparedBase
from farspan.trainer.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
LQ = ("base.type=lq", "base.bits=2.75", "base.iterations=2", "base.fisher=factored", "base.samples=2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text to learn\n" for i in range(2000)))
    (tmp_path / "job.yaml").write_text(
        "name: tiny\n"
        "model: {hidden: 64, layers: 1, heads: 4, kv_heads: 2, ffn: 128, vocab: 400}\n"
        "data: {source: a.txt, context: 256, on_too_long: split}\n"
        "adapter: {type: lora, rank: 4}\n"
        "optim: {steps: 2, lr: 1e-3}\n"
        "parallel: {sp: 2, dp: 1}\n"
        "evaluate: {share: 0}\n"
    )
    return tmp_path


def farspan(place: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FARSPAN_CACHE": str(place / "cache")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "infra/py")
    command = [sys.executable, "-m", "farspan.jobs", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(place: Path, *values: str, resume: bool = False) -> str:
    flags = [flag for value in values for flag in ("--set", value)]
    return farspan(place, "run", "job.yaml", *flags, *(["--resume"] if resume else []))


def test_a_run_on_lq(place: Path) -> None:
    out = run(place, *LQ)
    for said in ("taking gradients of 2", "what 7 matrices lose in 16 formats", "of 2.75 bits", "decomposing 7"):
        assert said in out
    folder = RunFolder(place / "outputs/tiny")
    found = PreparedBase.open(folder.prepared_base)
    assert 2.5 < found.bits_per_weight <= 2.75
    assert len(list((place / "cache/bases").glob("*.json"))) == 7
    export = folder.checkpoint(2) / "export"
    assert PreparedBase.open(export / PREPARED).matrices == found.matrices
    assert (export / PREPARED / "prepared_base.json").samefile(folder.prepared_base / "prepared_base.json")
    more = run(place, *LQ, "optim.steps=3", resume=True)
    assert "base     found in" in more and "done:    3 steps" in more
    wrote = farspan(place, "export", "tiny", "--whole-base", "--out", str(place / "out"))
    assert "checked  7 rounded matrices that open" in wrote
    told = json.loads((place / "out/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(place / "out/base") and (place / "out/base/config.json").exists()


def test_a_run_that_is_calibrated(place: Path) -> None:
    out = run(place, "base=nf4", "adapter.init=apiq", "adapter.init_packs=2", "adapter.init_tokens=64")
    assert "calibrating 7 matrices on 2 sequences" in out and "done:    2 steps" in out
