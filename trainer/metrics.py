"""What a step leaves behind: one JSON object a line in `metrics.jsonl`, and the same scalars to trackers.

`metrics.jsonl` is the record of the run: flushed line by line, enough for the report without any service, and cut
back on restore so that a step is in it exactly once. Trackers (TensorBoard, W&B, MLflow) are mirrors of it. One that
is missing stops the run before it starts; one that fails later is dropped with one message, since a week of training
is worth more than a dashboard. TensorBoard files are written with the `tensorboard` package's own record writer:
`torch.utils.tensorboard` would import TensorFlow wherever it is installed.

Cost: about 0.3 ms a step for the file and 0.7 ms for TensorBoard, on one core of a server CPU.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from farspan.errors import JobError, RunFailed
from farspan.trainer.config import Track
from farspan.trainer.run_folder import RunFolder, read_metrics, write_atomically, write_json

PARTS = ("data", "forward", "backward", "reduce", "optimizer", "checkpoint", "evaluate")
"""Keys of `parts_s`, in the order they happen in a step."""

RECORD_KEYS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_total",
    "trained_tokens",
    "tokens_per_s",
    "step_s",
    "plan_step_s",
    "device_peak_bytes",
    "plan_device_peak_bytes",
    "host_bytes",
    "disk_bytes",
    "stall_s",
    "parts_s",
    "packing_efficiency",
    "epoch",
    "attempt",
    "time",
)
"""What every record has (null where there is no number); `eval_loss` is there when the step ended in an evaluation."""

_log = logging.getLogger(__name__)


class Tracker(ABC):
    """A place outside the run folder that mirrors the scalars of each step."""

    name: str

    @abstractmethod
    def log(self, step: int, scalars: Mapping[str, float], *, time_s: float) -> None:
        """Take the finite scalars of one step, nested names joined by `/`; `time_s` is a unix time."""

    @abstractmethod
    def close(self) -> None:
        """Flush and release."""


class TensorBoard(Tracker):
    """Event files below `<run>/tensorboard`, one for each start of the trainer."""

    name = "TensorBoard"

    def __init__(self, folder: Path, *, config: Mapping[str, Any], first_step: int) -> None:
        """A file of its own; `first_step` tells TensorBoard to forget what an earlier attempt wrote from there on."""
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab")  # noqa: SIM115  lives as long as the run
        self._records = RecordWriter(self._file)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        text = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[_indented(config).encode()])
        about = summary_pb2.SummaryMetadata(plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"))
        value = summary_pb2.Summary.Value(tag="config", tensor=text, metadata=about)
        for event in (
            event_pb2.Event(wall_time=now, file_version="brain.Event:2"),
            event_pb2.Event(wall_time=now, step=first_step, session_log=start),
            event_pb2.Event(wall_time=now, step=first_step, summary=summary_pb2.Summary(value=[value])),
        ):
            self._records.write(event.SerializeToString())
        self._file.flush()

    def log(self, step: int, scalars: Mapping[str, float], *, time_s: float) -> None:
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = self._event.Event(wall_time=time_s, step=step, summary=self._summary.Summary(value=values))
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WeightsAndBiases(Tracker):
    """A W&B run that a restarted trainer continues; W&B sends from its own process."""

    name = "W&B"

    def __init__(self, folder: RunFolder, project: str, *, run_name: str, config: Mapping[str, Any]) -> None:
        wandb = _import_extra("wandb", extra="wandb", field="track.wandb")
        known = _tracker_ids(folder)
        run_id = known.setdefault("wandb", uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project, name=run_name, id=run_id, resume="allow", config=dict(config), dir=str(folder.root)
        )
        # W&B refuses steps that go back, as after a restore; a metric of our own as the x axis may.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        write_json(_ids_path(folder), known)

    def log(self, step: int, scalars: Mapping[str, float], *, time_s: float) -> None:
        self._run.log({**scalars, "step": step, "time": time_s})

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """An MLflow run that a restarted trainer continues; metrics are sent from MLflow's own threads."""

    name = "MLflow"

    def __init__(self, folder: RunFolder, experiment: str, *, run_name: str, config: Mapping[str, Any]) -> None:
        self._mlflow = mlflow = _import_extra("mlflow", extra="mlflow", field="track.mlflow")
        known = _tracker_ids(folder)
        mlflow.set_experiment(experiment)
        if "mlflow" in known:
            mlflow.start_run(run_id=known["mlflow"])
        else:
            run = mlflow.start_run(run_name=run_name)
            known["mlflow"] = run.info.run_id
            write_json(_ids_path(folder), known)
            mlflow.log_dict(dict(config), "config.json")

    def log(self, step: int, scalars: Mapping[str, float], *, time_s: float) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


class MetricsWriter:
    """Writes each step's record to `metrics.jsonl` and to the trackers; rank 0 of the trainer owns the only one.

    Args:
        folder: the run folder.
        track: which trackers to mirror to.
        run_name: the name trackers show.
        config: the resolved job, shown by trackers.
        restored_step: the step of the checkpoint this attempt starts from; later records are cut away. None: this
            attempt starts from the beginning, so every record is.

    Raises:
        JobError: a tracker was asked for whose package is not installed, or that refuses to start.
        RunFailed: `metrics.jsonl` cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        track: Track,
        *,
        run_name: str,
        config: Mapping[str, Any],
        restored_step: int | None,
    ) -> None:
        self._path = folder.metrics
        self._file: FileIO | None = None
        self._trackers = _start_trackers(folder, track, run_name=run_name, config=config, restored_step=restored_step)
        try:
            truncate_metrics(self._path, restored_step or 0)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  lives as long as the run
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append one step and mirror it.

        Args:
            record: `RECORD_KEYS`, any more of its own kind, and `eval_loss` if there was an evaluation. Python,
                numpy and one-element tensor scalars are taken.

        Returns:
            The record as it stands in the file: plain JSON, NaN and infinities as the text `float()` reads.
        """
        missing = [key for key in RECORD_KEYS if key not in record]
        assert not missing, f"step record without {missing}"
        assert self._file is not None, "record written after close"
        clean = _plain(record)
        try:
            line = (json.dumps(clean, allow_nan=False) + "\n").encode()
            while line:  # unbuffered: a line is on its way to the disk, or an error, when this returns
                line = line[self._file.write(line) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error
        scalars = {name: value for name, value in _scalars(clean).items() if name not in ("step", "time")}
        for tracker in list(self._trackers):
            try:
                tracker.log(int(clean["step"]), scalars, time_s=float(clean["time"]))
            except Exception as error:  # whatever a service throws, training goes on
                self._drop(tracker, error)
        return clean

    def close(self) -> None:
        """Close the file and every tracker; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for tracker in list(self._trackers):
            try:
                tracker.close()
            except Exception as error:  # the run is over and its record is whole
                self._drop(tracker, error)
        self._trackers = []

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        self._trackers.remove(tracker)
        _log.warning("%s is off from here on (%s); metrics.jsonl goes on", tracker.name, _one_line(error))


def truncate_metrics(path: Path, last_step: int) -> int:
    """Drop records after `last_step`, and a line cut short by a crash, atomically; returns how many records stay."""
    if not path.exists():
        return 0
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return len(kept)


def host_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _start_trackers(
    folder: RunFolder, track: Track, *, run_name: str, config: Mapping[str, Any], restored_step: int | None
) -> list[Tracker]:
    """Start what was asked for; only a run that goes on after a restore may go on without."""
    config = _plain(config)
    wandb, mlflow, first = track.wandb, track.mlflow, (restored_step or 0) + 1
    starts: list[tuple[str, Callable[[], Tracker]]] = []
    if track.tensorboard:
        starts.append(("tensorboard", lambda: TensorBoard(folder.tensorboard, config=config, first_step=first)))
    if wandb is not None:
        starts.append(("wandb", lambda: WeightsAndBiases(folder, wandb, run_name=run_name, config=config)))
    if mlflow is not None:
        starts.append(("mlflow", lambda: MLflow(folder, mlflow, run_name=run_name, config=config)))
    trackers: list[Tracker] = []
    for field, start in starts:
        try:
            trackers.append(start())
        except Exception as error:
            if restored_step is not None and not isinstance(error, JobError):
                _log.warning("track.%s is off from here on (%s); metrics.jsonl goes on", field, _one_line(error))
                continue
            for tracker in trackers:
                tracker.close()
            if isinstance(error, JobError):
                raise
            off = "false" if field == "tensorboard" else "null"
            raise JobError(
                f"the tracker of track.{field} did not start",
                at=f"track.{field}",
                why=_one_line(error),
                try_=f"put that right (login, address, network), or turn it off with --set track.{field}={off}",
            ) from error
    return trackers


def _import_extra(module: str, *, extra: str, field: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise JobError(
            f"{field} is set but the package {module} is not installed",
            at=field,
            why=f"{error}; {module} comes with the extra `{extra}`, which a plain install leaves out",
            try_=f"pip install 'farspan[{extra}]', or --set {field}=null",
        ) from error


def _ids_path(folder: RunFolder) -> Path:
    return folder.root / "trackers.json"


def _tracker_ids(folder: RunFolder) -> dict[str, str]:
    """Which outside run mirrors this one, so that a restart continues it; gone with the folder on `--clean`."""
    path = _ids_path(folder)
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known


def _plain(value: Any) -> Any:
    """Only what JSON has. Non-finite numbers become the text the schema uses too, since JSON has no word for them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if not isinstance(value, float):
        item = getattr(value, "item", None)
        return _plain(item()) if callable(item) else str(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found


def _indented(config: Mapping[str, Any]) -> str:
    """Markdown shows four leading spaces as code."""
    return "\n".join("    " + line for line in json.dumps(config, indent=2).splitlines())


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _unwritable(path: Path, error: OSError) -> RunFailed:
    return RunFailed(
        "metrics cannot be written",
        at=str(path),
        why=error.strerror or str(error),
        try_="free space or fix the permissions of the run folder, then run again with --resume",
    )
