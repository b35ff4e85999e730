"""Which numbers a job is planned with: those measured on this machine, or the analytic ones.

Measuring takes some ten seconds, most of them spent loading libraries, so it is done when it can change something: when
what the layers would need, by the analytic profile, is more than half of what there is, or when it is asked for. What
was measured is kept in the user's cache and used by every later plan for the same model, training and machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farspan.errors import JobError, RunFailed
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import Machine, ModelFacts
from farspan.jobs.plan import shape_of, training_of
from farspan.memory.calibration import (
    Calibration,
    Measured,
    calibration_key,
    calibration_path,
    load_calibration,
)
from farspan.memory.config import split_disk
from farspan.trainer.adapters.config import inner
from farspan.trainer.config import CalibrationRequest, Model, TrainSpec, UniPT
from farspan.trainer.run_folder import default_cache_root, write_atomically

Measure = Callable[[CalibrationRequest], str]
"""Runs `trainer.calibrate.calibrate` where the job will train; returns its JSON."""
LIMIT_S = 600.0


def known_calibration(facts: ModelFacts, train: TrainSpec, device: str) -> Calibration | None:
    """What was measured before for this model, training and device."""
    return load_calibration(default_cache_root(), key_of(facts, train, device))


def key_of(facts: ModelFacts, train: TrainSpec, device: str) -> dict[str, Any]:
    source = f" {train.model.id} {train.model.revision}" if isinstance(train.model, Model) else ""
    return calibration_key(shape_of(facts), training_of(train, facts), device, f"{facts.family}{source}")


def not_measured(device: str) -> JobError:
    return JobError(
        "nothing was measured for this model on this machine",
        at="memory.profile",
        why=f"no calibration for {device} in {default_cache_root() / 'profiles'}",
        try_="farspan plan JOB --measure, or --set memory.profile=auto",
    )


def measured_calibration(
    job: SFTJob, train: TrainSpec, facts: ModelFacts, device: str, measure: Measure
) -> Calibration:
    """Measure, and keep it.

    Raises:
        JobError: the cache cannot be written, or the job's layers are not measured.
        RunFailed: measuring failed.
    """
    if isinstance(train.adapter, UniPT):
        raise JobError(
            "layers beside a side network are counted, not measured",
            at="memory.profile",
            why="they run without autograd, which is not how a measurement runs them",
            try_="--set memory.profile=analytic, and no --measure",
        )
    key = key_of(facts, train, device)
    found = Measured.model_validate_json(measure(request_of(job, train, facts, key["gradients"])))
    calibration = Calibration(key=key, profile=found.profile, links=found.links)
    path = calibration_path(default_cache_root(), key)
    try:
        write_atomically(path, calibration.model_dump_json(indent=1))
    except OSError as error:
        raise JobError(
            "what was measured cannot be kept",
            at=str(path),
            why=f"the system says: {error.strerror}",
            try_="free space there, set FARSPAN_CACHE to another folder, or --set memory.profile=analytic",
        ) from error
    return calibration


def request_of(job: SFTJob, train: TrainSpec, facts: ModelFacts, gradients: str) -> CalibrationRequest:
    shape, tile = shape_of(facts), training_of(train, facts).mlp_tile
    folder = split_disk(job.memory.disk)[0] or str(job.run_dir.parent) if job.memory.disk else None
    return CalibrationRequest.model_validate(
        {
            "model": train.model,
            "adapter": inner(train.adapter),
            "base": train.base,
            "precision": train.precision,
            "density": train.density,
            "memory": {**train.memory.model_dump(), "mlp_tile": tile or "off"},
            "context": train.data.context,
            "sp": train.mesh.sp,
            "exchange": train.exchange,
            "kinds": tuple(shape.form(layer).name for layer in range(shape.layers)),
            "gradients": gradients,
            "disk_dir": folder,
        }
    )


def device_name(machine: Machine) -> str:
    """Of the device ranks train on: a GPU's name, or this machine's processor."""
    if machine.gpu_name:
        return machine.gpu_name
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"cpu: {model}"


def measure_here(request: CalibrationRequest, *, threads: int) -> str:
    """Measure in a process of its own, so that the planner needs no torch."""
    with tempfile.TemporaryDirectory(prefix="farspan-calibrate-") as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(request.model_dump_json(), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "farspan.trainer.calibrate", str(asked), str(answer)],
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise _failed(f"no answer after {LIMIT_S:g} s") from None
        if done.returncode != 0:
            raise _failed(" ".join(done.stderr.strip().splitlines()[-1:]) or f"exit code {done.returncode}")
        return answer.read_text(encoding="utf-8")


def _failed(why: str) -> RunFailed:
    return RunFailed(
        "measuring a layer of the model failed",
        at="memory.profile",
        why=why,
        try_="--set memory.profile=analytic",
    )
