"""Runs code on Triton kernels in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def in_process(code: str, **environment: str) -> dict[str, object]:
    """Triton decides at import whether it interprets, so each way runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found
