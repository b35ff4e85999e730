"""Order of the suite: files that start a Ray take minutes, so they come first and two workers end together."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow_files = {item.path for item in items if item.get_closest_marker("ray") is not None}
    items.sort(key=lambda item: item.path not in slow_files)
