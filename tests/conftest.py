"""Order of the suite: files whose tests are allowed the most time come first, so that two workers end together."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    allowed_s: dict[Path, float] = defaultdict(float)
    for item in items:
        timeout, ray = item.get_closest_marker("timeout"), item.get_closest_marker("ray")
        allowed_s[item.path] = max(allowed_s[item.path], timeout.args[0] if timeout else 300.0 if ray else 0.0)
    items.sort(key=lambda item: -allowed_s[item.path])
