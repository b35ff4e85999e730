"""Reads a run folder into plain values for the page. Only `metrics.jsonl` must be there; what else is missing is said.

Every text may be hostile (a run name, a log line inside an event), so it is cleaned here of what no reader should
see raw (control characters, lone surrogates) and escaped by the template. Files written by a crashed or newer program
are read as far as they make sense: a report is most wanted when something went wrong.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from farspan.cluster.journal import STALE_S
from farspan.errors import JobError
from farspan.jobs.measured import Comparison, compare
from farspan.jobs.plan_file import read_plan
from farspan.jobs.progress import clock, number
from farspan.trainer.run_folder import RunFolder, read_metrics


@dataclass(frozen=True)
class Setting:
    """One value of the resolved job and who set it."""

    path: str
    value: str
    origin: str
    note: str = ""


@dataclass(frozen=True)
class SavedState:
    """One checkpoint folder."""

    step: int
    complete: bool
    written_with: str
    when: str
    state_bytes: int
    export_bytes: int


@dataclass(frozen=True)
class Event:
    """One line of `events.jsonl`."""

    when: str
    kind: str
    attempt: int
    text: str
    log_tail: str = ""


@dataclass
class RunFacts:
    """All the page shows."""

    name: str
    status: str
    error: str
    records: list[dict[str, Any]]
    facts: list[tuple[str, str]]
    unigram: float | None
    restarts: list[tuple[float, str]]
    """Position on the step axis, between two steps, and what is known about it."""
    events: list[Event]
    checkpoints: list[SavedState]
    settings: list[Setting]
    plan: Comparison | None = None
    """The memory plan beside what was measured."""
    missing: list[str] = field(default_factory=list)


def collect(run_dir: Path) -> RunFacts:
    """Read the run folder.

    Raises:
        JobError: there is no folder, or no step has been recorded in it yet.
    """
    folder = RunFolder(run_dir)
    records = [clean for record in read_metrics(folder.metrics) if (clean := _record(record)) is not None]
    if not records:
        raise JobError(
            "nothing to report",
            at=str(folder.metrics),
            why="the file has no step in it" if folder.metrics.exists() else "there is no such file",
            try_="name a run folder (outputs/<name>) in which at least one step has finished",
        )
    missing: list[str] = []
    status, summary, resolved, job = (
        _json(path, missing) for path in (folder.status, folder.root / "summary.json", folder.resolved, folder.job)
    )
    raw_events = _lines(folder.events, missing)
    events = [_event(event) for event in raw_events]
    broken = sum(not math.isfinite(number(record.get("loss"))) for record in records)
    if broken:
        missing.append(f"{broken} of {len(records)} steps have no finite loss; the curve has gaps there")
    manifests = {path: _json(path / "manifest.json", []) for path in _step_folders(folder)}
    if not manifests:
        missing.append("no checkpoint")
    unigram = _unigram(summary, manifests)
    if unigram is None:
        missing.append("no unigram entropy of the data")
    return RunFacts(
        name=visible(job.get("name") or run_dir.resolve().name),
        status=_status(status),
        error=visible(status.get("error") or ""),
        records=records,
        facts=_times(status) + [(visible(label), _short(value)) for label, value in summary.items()],
        unigram=unigram,
        restarts=_restarts(records, events),
        events=events,
        checkpoints=[_checkpoint(path, manifest) for path, manifest in manifests.items()],
        settings=[_setting(path, row) for path, row in resolved.items()],
        plan=_plan(folder.plan, records, missing),
        missing=missing,
    )


def visible(value: Any) -> str:
    """Text with control, direction and unassigned characters spelled out, encodable as UTF-8."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _record(record: Any) -> dict[str, Any] | None:
    if not isinstance(record, dict) or not math.isfinite(number(record.get("step"))):
        return None
    return record | {"step": int(number(record["step"]))}


def _json(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"no {path.name}")
        return {}
    except (OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be read: {visible(str(error))}")
        return {}
    if isinstance(value, dict):
        return value
    missing.append(f"{path.name} is not an object")
    return {}


def _plan(path: Path, records: list[dict[str, Any]], missing: list[str]) -> Comparison | None:
    try:
        return compare(read_plan(path), records)
    except FileNotFoundError:
        missing.append(f"no {path.name}")
    except (OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be replayed: {visible(str(error))}")
    return None


def _lines(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        missing.append(f"no {path.name}: restarts are known from the attempt number of the steps only")
        return []
    return [event for event in read_metrics(path) if isinstance(event, dict)]


def _event(event: Mapping[str, Any]) -> Event:
    tail = event.get("log_tail") or ""
    attempt = number(event.get("attempt"))
    return Event(
        when=_when(event.get("time")),
        kind=visible(event.get("event", "")),
        attempt=int(attempt) if math.isfinite(attempt) else 0,
        text=visible(event.get("text", "")),
        log_tail=visible("\n".join(map(str, tail)) if isinstance(tail, list) else tail),
    )


def _restarts(records: list[dict[str, Any]], events: list[Event]) -> list[tuple[float, str]]:
    """Before the first step of each later attempt; attempts that finished no step share the line of the next one."""
    said = {event.attempt: event.text for event in events if event.kind == "restarting"}
    found: list[tuple[float, str]] = []
    for before, after in itertools.pairwise(records):
        first, last = number(before.get("attempt")), number(after.get("attempt"))
        if last > first:
            texts = [text for attempt, text in said.items() if first < attempt <= last]
            found.append((after["step"] - 0.5, "; ".join(texts) or f"attempt {last:.0f} starts here"))
    unfinished = [text for attempt, text in said.items() if attempt > number(records[-1].get("attempt"))]
    return [*found, (records[-1]["step"] + 0.0, "; ".join(unfinished))] if unfinished else found


def _status(status: Mapping[str, Any]) -> str:
    """A driver that was killed leaves `running` behind; the page says so instead of repeating it."""
    word = visible(status.get("status", "unknown"))
    updated = _moment(status.get("updated"))
    if word == "running" and updated is not None:
        silent_s = (datetime.now(tz=UTC) - updated).total_seconds()
        if silent_s > STALE_S:
            return f"ended without a word, last seen {_when(status['updated'])} UTC"
    return word


def _times(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    started, ended = _moment(status.get("started")), _moment(status.get("ended") or status.get("updated"))
    if started is None or ended is None:
        return []
    return [("last driver ran for", clock((ended - started).total_seconds()))]


def _step_folders(folder: RunFolder) -> list[Path]:
    found = [path for path in folder.checkpoints.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _checkpoint(path: Path, manifest: Mapping[str, Any]) -> SavedState:
    written_with = manifest.get("written_with")
    told = _leaves(written_with) if isinstance(written_with, dict) else ()
    return SavedState(
        step=int(path.name.removeprefix("step_")),
        complete=(path / "manifest.json").exists(),
        written_with=", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in told),
        when=_when(path.stat().st_mtime),
        state_bytes=_tree_bytes(path / "state"),
        export_bytes=_tree_bytes(path / "export"),
    )


def _tree_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def _setting(path: str, row: Any) -> Setting:
    """A line of `resolved.json`: `{"value", "origin", "where"?, "why"?}` by dotted path."""
    if not isinstance(row, dict) or "value" not in row:
        return Setting(visible(path), _short(row), "")
    notes = [visible(row[key]) for key in ("where", "why") if row.get(key)]
    return Setting(visible(path), _short(row["value"]), visible(row.get("origin", "")), "; ".join(notes))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{visible(key)}.")
        else:
            yield prefix + visible(key), value


def _unigram(summary: Mapping[str, Any], manifests: Mapping[Path, Mapping[str, Any]]) -> float | None:
    """From `summary.json`, else from the token store the newest checkpoint was trained on."""
    for label, value in summary.items():
        if "unigram" in label.lower() and math.isfinite(number(value)):
            return number(value)
    for manifest in reversed(list(manifests.values())):
        job = manifest.get("job")
        if isinstance(job, dict) and isinstance(job.get("tokens_dir"), str):
            value = number(_json(Path(job["tokens_dir"]) / "meta.json", []).get("unigram_entropy_nats"))
            return value if math.isfinite(value) else None
    return None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return visible(value)


def _moment(time: Any) -> datetime | None:
    """A time zone aware ISO time, as the journal writes it, or unix seconds."""
    try:
        moment = datetime.fromisoformat(time) if isinstance(time, str) else datetime.fromtimestamp(time, tz=UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _when(time: Any) -> str:
    moment = _moment(time)
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if moment else ""
