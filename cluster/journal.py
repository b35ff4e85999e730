"""What the supervisor writes into the run folder: `events.jsonl` (what happened) and `status.json` (how it stands).

`status.json` says running, done or failed, and is replaced whole, so a reader never sees half of it. A driver killed
by SIGKILL cannot write its end: `updated` is then older than `STALE_S` while the status still says running.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from farspan.trainer.run_folder import RunFolder, write_json

UPDATE_S = 5.0
STALE_S = 60.0


class Journal:
    """Events and status of one run.

    Args:
        folder: the run folder.
        on_event: called with every event as it is written: `time`, `event`, `text`, `attempt`, and what else belongs.
    """

    def __init__(self, folder: RunFolder, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        self._folder, self._on_event = folder, on_event
        self._started = _now()
        self._written_at_s = 0.0
        self._unwritable: set[Path] = set()
        self.attempt = 0
        self.step = 0

    def event(self, event: str, text: str, **more: Any) -> None:
        """Append one event and tell `on_event`."""
        entry = {"time": _now(), "event": event, "text": text, "attempt": self.attempt, **more}
        with self._telling_of_failure(self._folder.events):
            self._folder.events.parent.mkdir(parents=True, exist_ok=True)
            with open(self._folder.events, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self._on_event(entry)

    def status(self, status: Literal["running", "done", "failed"], *, error: str | None = None) -> None:
        """Replace `status.json`."""
        self._written_at_s = time.monotonic()
        now = _now()
        value = {
            "status": status,
            "attempt": self.attempt,
            "step": self.step,
            "error": error,
            "started": self._started,
            "updated": now,
            "ended": None if status == "running" else now,
        }
        with self._telling_of_failure(self._folder.status):
            write_json(self._folder.status, value)

    def still_running(self, step: int) -> None:
        """Note the last finished step; touches the disk every `UPDATE_S` at most."""
        self.step = step
        if time.monotonic() - self._written_at_s > UPDATE_S:
            self.status("running")

    @contextmanager
    def _telling_of_failure(self, path: Path) -> Iterator[None]:
        """A full disk ends a run with the error of the rank that met it, not with one of the journal's own."""
        try:
            yield
        except OSError as error:
            if path not in self._unwritable:
                self._unwritable.add(path)
                text = f"{path} cannot be written: {error.strerror}"
                self._on_event({"time": _now(), "event": "journal", "text": text, "attempt": self.attempt})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
