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

from farspan.errors import JobError, RunFailed
from farspan.jobs.config import SFTJob
from farspan.jobs.facts import Machine
from farspan.memory.calibration import (
    Calibration,
    Measured,
    calibration_key,
    load_calibration,
    save_calibration,
)
from farspan.memory.config import split_disk
from farspan.memory.shape import ModelShape, Training
from farspan.trainer.config import CalibrationRequest, TrainSpec
from farspan.trainer.run_folder import default_cache_root

Measure = Callable[[CalibrationRequest], str]
"""Runs `trainer.calibrate.calibrate` where the job will train; returns its JSON."""
LIMIT_S = 600.0


def known_calibration(shape: ModelShape, training: Training, device: str) -> Calibration | None:
    """What was measured before for this model, training and device."""
    return load_calibration(default_cache_root(), calibration_key(shape, training, device))


def not_measured(device: str) -> JobError:
    return JobError(
        "nothing was measured for this model on this machine",
        at="memory.profile",
        why=f"no calibration for {device} in {default_cache_root() / 'profiles'}",
        try_="farspan plan JOB --measure, or --set memory.profile=auto",
    )


def measured_calibration(
    job: SFTJob, train: TrainSpec, shape: ModelShape, training: Training, device: str, measure: Measure
) -> Calibration:
    """Measure, and keep it."""
    key = calibration_key(shape, training, device)
    found = Measured.model_validate_json(measure(request_of(job, train, shape, key["gradients"])))
    calibration = Calibration(key=key, profile=found.profile, links=found.links)
    save_calibration(default_cache_root(), calibration)
    return calibration


def request_of(job: SFTJob, train: TrainSpec, shape: ModelShape, gradients: str) -> CalibrationRequest:
    folder = split_disk(job.memory.disk)[0] or str(job.run_dir.parent) if job.memory.disk else None
    return CalibrationRequest.model_validate(
        {
            "model": train.model,
            "adapter": train.adapter,
            "precision": train.precision,
            "memory": train.memory,
            "context": train.data.context,
            "sp": train.mesh.sp,
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
        done = subprocess.run(
            [sys.executable, "-m", "farspan.trainer.calibrate", str(asked), str(answer)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        if done.returncode != 0:
            raise RunFailed(
                "measuring a layer of the model failed",
                at="memory.profile",
                why=" ".join(done.stderr.strip().splitlines()[-1:]) or f"exit code {done.returncode}",
                try_="--set memory.profile=analytic",
            )
        return answer.read_text(encoding="utf-8")
