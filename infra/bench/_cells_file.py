"""Results of a benchmark, cell by cell, in a JSON file that several processes add to."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Cells:
    """What was measured so far, in a file that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell that is missing."""
        if key in self.read():
            return
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            sys.exit("the command this worker belongs to has ended")
        found = measure()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.path.write_text(json.dumps({**self.read(), key: found}, indent=1, sort_keys=True) + "\n")
        finally:
            os.close(folder)
        print(f"{key:<50} {json.dumps(found)[:120]}", flush=True)
