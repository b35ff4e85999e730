"""Tests for a GPU run where there is one. Files whose tests are allowed the most time come first, so that two workers
end together."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    allowed_s: dict[Path, float] = defaultdict(float)
    for item in items:
        timeout, ray = item.get_closest_marker("timeout"), item.get_closest_marker("ray")
        allowed_s[item.path] = max(allowed_s[item.path], timeout.args[0] if timeout else 300.0 if ray else 0.0)
    items.sort(key=lambda item: -allowed_s[item.path])
