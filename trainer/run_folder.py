"""The run folder: every path a run writes, in one place, and the atomic way to write a small file.

outputs/<name>/{job.json, resolved.json, plan.json, kernels.json, adapter_start.safetensors, prepared_base/, trace.json,
                metrics.jsonl, events.jsonl, status.json, logs/attempt_<n>/<role>-<rank>.log,
                checkpoints/step_<n>/{manifest.json, state/, export/}, base_model/, tensorboard/, report.html}
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFolder:
    """Paths below one run folder. Making one touches nothing."""

    root: Path

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    @property
    def resolved(self) -> Path:
        return self.root / "resolved.json"

    @property
    def plan(self) -> Path:
        """The memory plan with the problem it solves, so that it can be walked again."""
        return self.root / "plan.json"

    @property
    def kernels(self) -> Path:
        """Which kernels were found to be fastest; attempts that resume use the same."""
        return self.root / "kernels.json"

    @property
    def adapter_start(self) -> Path:
        """Where an adapter that does not start at zero started; part of every checkpoint's meaning."""
        return self.root / "adapter_start.safetensors"

    @property
    def prepared_base(self) -> Path:
        """Matrices that were rounded before training, with where adapters start; part of every checkpoint's meaning."""
        return self.root / "prepared_base"

    @property
    def trace(self) -> Path:
        """Predicted lanes of a micro-batch and measured ones of a step, for ui.perfetto.dev."""
        return self.root / "trace.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def events(self) -> Path:
        """One object a line: starts, restarts, checkpoints, the end; written by the supervisor."""
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def base_model(self) -> Path:
        """HF folder of the untrained base, written once for models made on the spot."""
        return self.root / "base_model"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def log(self, attempt: int, role: str, rank: int) -> Path:
        return self.root / "logs" / f"attempt_{attempt}" / f"{role}-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def complete_checkpoints(self) -> list[Path]:
        """Folders of complete checkpoints (their manifest exists), oldest first."""
        found = []
        for manifest in self.checkpoints.glob("step_*/manifest.json"):
            step = manifest.parent.name.removeprefix("step_")
            if step.isdigit():
                found.append((int(step), manifest.parent))
        return [path for _, path in sorted(found)]


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`; a last line cut short by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def default_cache_root() -> Path:
    """`$FARSPAN_CACHE`, else `$XDG_CACHE_HOME/farspan`, else `~/.cache/farspan`."""
    if own := os.environ.get("FARSPAN_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "farspan"
