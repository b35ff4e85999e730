"""A run folder as a real run leaves it, simulated: 40 steps, evaluations, a rank lost at step 27, three checkpoints."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from farspan.trainer.config import Track
from farspan.trainer.metrics import MetricsWriter
from farspan.trainer.run_folder import RunFolder, write_json

START_S = 1_760_000_000.0
UNIGRAM = 6.412
HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>\u202e\x1b[31m{{ 7 * 7 }}"


def step_record(step: int, *, time_s: float, attempt: int = 1, steps: int = 40, seed: int = 0) -> dict[str, Any]:
    """What the trainer would write: falling noisy loss, warm-up and cosine, parts that nearly fill the step."""
    noise = random.Random(seed * 100_003 + step)
    pace = 1 + 0.05 * noise.random()
    parts = {
        "data": 0.02 * pace,
        "forward": 0.68 * pace,
        "backward": 1.31 * pace,
        "reduce": 0.12 * (1 + noise.random()),
        "optimizer": 0.21 * pace,
        "checkpoint": 0.34 if step % 10 == 0 else 0.0,
        "evaluate": 0.9 if step % 10 == 0 else 0.0,
    }
    step_s = sum(parts.values()) + 0.03
    loss = 4.6 + 3.7 * math.exp(-step / (steps / 4)) + 0.08 * noise.gauss(0, 1)
    warm, done = min(1.0, step / 4), step / steps
    record = {
        "step": step,
        "loss": loss,
        "grad_norm": 0.6 + 2.5 * math.exp(-step / 5) + 0.1 * noise.random(),
        "lr": 1e-3 * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))),
        "tokens": 8192,
        "tokens_total": 8192 * step,
        "trained_tokens": 8100,
        "tokens_per_s": 8192 / step_s,
        "step_s": step_s,
        "plan_step_s": None,
        "device_peak_bytes": int(1.35 * 2**30 + 2**23 * noise.random()),
        "plan_device_peak_bytes": None,
        "host_bytes": int(1.2 * 2**30 + 2**24 * noise.random() * 4 + 2**22 * min(step, 12)),
        "disk_bytes": 0,
        "stall_s": {"data": 0.004, "checkpoint": 0.05 if step % 10 == 0 else 0.0},
        "parts_s": parts,
        "packing_efficiency": 0.985 + 0.01 * noise.random(),
        "epoch": step // 30,
        "attempt": attempt,
        "time": time_s,
    }
    if step % 10 == 0:
        record["eval_loss"] = 4.72 + 3.6 * math.exp(-step / (steps / 4))
    return record


def write_sample(root: Path, *, name: str = "quickstart", hostile: str = "", steps: int = 40) -> RunFolder:
    """Write the folder. `hostile` goes into every text a user or a log line may put there."""
    folder = RunFolder(root)
    config = {"name": name + hostile}
    crash, restored, time_s = 27 * steps // 40, 20 * steps // 40, START_S
    for attempt, first, last in ((1, 1, crash), (2, restored + 1, steps)):
        restored_step = None if attempt == 1 else restored
        writer = MetricsWriter(
            folder, Track(tensorboard=steps <= 100), run_name=name, config=config, restored_step=restored_step
        )
        for step in range(first, last + 1):
            record = step_record(step, time_s=time_s, attempt=attempt, steps=steps)
            time_s += record["step_s"]
            writer.write(record | {"time": time_s})
        writer.close()
        time_s += 14.0
    _write_events(folder, attempts=((1, START_S - 6), (2, START_S + 80)), end_s=time_s, steps=steps, hostile=hostile)
    write_json(folder.job, {"name": name + hostile})
    write_json(
        folder.status,
        {
            "status": "done",
            "attempt": 2,
            "step": steps,
            "error": None,
            "started": iso(START_S - 6),
            "updated": iso(time_s),
            "ended": iso(time_s),
        },
    )
    write_json(
        folder.root / "summary.json",
        {
            "model": "llama, 4 layers, 3.4 M parameters",
            "data": "stdlib, 8k context" + hostile,
            "mesh": "dp 1 × sp 2",
            "unigram entropy": UNIGRAM,
        },
    )
    write_json(folder.resolved, _resolved(name + hostile))
    written_with = {"world_size": 2, "mesh": {"dp": 1, "sp": 2}, "zero": 1, "torch": "2.13.0"}
    for step in (steps // 4, steps // 2, steps):
        checkpoint = folder.checkpoint(step)
        (checkpoint / "state").mkdir(parents=True)
        (checkpoint / "state" / "__0_0.distcp").write_bytes(b"\0" * 40_000)
        (checkpoint / "export").mkdir()
        (checkpoint / "export" / "model.safetensors").write_bytes(b"\0" * 13_000)
        if step != steps // 4:
            write_json(checkpoint / "manifest.json", {"step": step, "written_with": written_with, "job": {}})
    return folder


def iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


def _write_events(
    folder: RunFolder, *, attempts: tuple[tuple[int, float], ...], end_s: float, steps: int, hostile: str
) -> None:
    lost = f"rank 1 (pid 4711) died by SIGKILL in phase backward of step 28 {hostile}"
    tail = ["step 27/40 done", f"Killed {hostile}"]
    events: list[dict[str, Any]] = []
    for attempt, start_s in attempts:
        again = ("restarting", f"attempt 2 of 4: {lost}; resuming from step 20")
        event, text = ("placing", "placing 2 ranks; starting from step 0") if attempt == 1 else again
        events += [
            {"time": iso(start_s), "event": event, "text": text, "attempt": attempt},
            {"time": iso(start_s + 1), "event": "starting", "text": "starting 2 ranks", "attempt": attempt},
            {"time": iso(start_s + 5), "event": "running", "text": "training on 2 ranks", "attempt": attempt},
        ]
    failure = {"event": "failure", "text": lost, "attempt": 1, "rank": 1, "phase": "backward", "log_tail": tail}
    events.insert(3, {"time": iso(attempts[1][1] - 1), **failure})
    events.append({"time": iso(end_s), "event": "finished", "text": f"finished after step {steps}", "attempt": 2})
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")


def _resolved(name: str) -> dict[str, Any]:
    def row(value: Any, origin: str = "default", **more: str) -> dict[str, Any]:
        return {"value": value, "origin": origin, **more}

    return {
        "name": row(name, "file", where="job.py:5"),
        "model.family": row("llama"),
        "model.hidden": row(256, "file", where="job.py:6"),
        "model.vocab": row(4096),
        "data.source": row("stdlib", "file", where="job.py:7"),
        "data.context": row(8192),
        "parallel.sp": row(2, "flag", where="--set parallel.sp=2"),
        "parallel.dp": row(1, "planner", why="2 ranks / sp 2 = 1"),
        "parallel.zero": row(1, "planner", why="optimizer states of 41 MB halve over 2 ranks"),
        "optim.lr": row(1e-3, "flag", where="--set optim.lr=1e-3"),
        "optim.beta2": row(0.95),
        "optim.clip_norm": row(1.0),
        "memory.plan": row("keep"),
    }
