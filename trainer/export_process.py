"""Runs an export in a process of its own, bounded in time and tied to the life of the process that asked for it.

Not in the thread that writes checkpoints, because loading a model changes what belongs to the whole process:
transformers sets torch's default dtype and replaces initialisers while it loads, and training runs beside it. The price
is the start of an interpreter with torch and transformers, a few seconds of one core at each save, off the critical
path. It also means that an export that runs out of memory fails a checkpoint and not the rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from farspan import errors
from farspan.errors import CheckpointError
from farspan.schema import Schema
from farspan.trainer.config import Adapter, Base, ModelSource, Precision, Unquantized


class ExportRequest(Schema):
    """Arguments of `farspan.trainer.export.export_checkpoint`, as they travel to the process."""

    checkpoint_dir: Path
    out_dir: Path
    model: ModelSource
    adapter: Adapter
    base_model_dir: Path | None
    tokenizer_dir: Path | None
    dtype: Precision
    merged: bool = False
    verify: bool = True
    seed: int = 0
    stored: Base = Unquantized()
    start: Path | None = None
    prepared: Path | None = None


def export_in_process(request: ExportRequest, *, timeout_s: float) -> dict[str, Any]:
    """Export in a process of its own; returns the fields of its `ExportReport` as JSON values.

    Raises:
        CheckpointError: the export failed (its own four lines), died, or took longer than `timeout_s`.
    """
    # the process reads from this pipe; when this end closes, for whatever reason, it ends
    lifeline_out, lifeline_in = os.pipe()
    command = [sys.executable, "-m", "farspan.trainer.export_process", request.model_dump_json()]
    try:
        process = subprocess.Popen(
            command, stdin=lifeline_out, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(), text=True
        )
        os.close(lifeline_out)
        try:
            answer, log = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.communicate()
            raise _failed(request, f"no answer after {timeout_s:.0f} s") from error
    finally:
        os.close(lifeline_in)
    with contextlib.suppress(ValueError):
        result = json.loads(answer)
        if "error" in result:
            raise _rebuilt(result["error"])
        return dict(result["report"])
    last = (log.strip().splitlines() or ["it wrote nothing"])[-1]
    raise _failed(request, f"the export process ended with code {process.returncode}: {last}")


def _environment() -> dict[str, str]:
    """This process' environment without its place in the gang: the export is one CPU process."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return kept | threads | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def _failed(request: ExportRequest, why: str) -> CheckpointError:
    return CheckpointError(
        "the export of a checkpoint did not finish",
        at=str(request.out_dir),
        why=why,
        try_="give rank 0's machine more memory, or set checkpoint.export=false and run `farspan export` elsewhere",
    )


def _rebuilt(fields: dict[str, str]) -> errors.FarspanError:
    kind = getattr(errors, fields["kind"], CheckpointError)
    return kind(fields["what"], at=fields["at"], why=fields["why"], try_=fields["try_"])


def _die_with_parent() -> None:
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Entry of the process: a request in, one JSON object out; everything else goes to stderr."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from farspan.trainer.export import export_checkpoint

    request = ExportRequest.model_validate_json(sys.argv[1])
    try:
        report = export_checkpoint(**{name: getattr(request, name) for name in ExportRequest.model_fields})
        result: dict[str, Any] = {"report": report.as_json()}
    except errors.FarspanError as error:
        lines = {"what": error.what, "at": error.at, "why": error.why, "try_": error.try_}
        result = {"error": {"kind": type(error).__name__, **lines}}
    json.dump(result, answer)
    answer.close()


if __name__ == "__main__":
    main()
