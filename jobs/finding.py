"""A line of `farspan doctor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do unless it is ok."""

    name: str
    level: Level
    value: str
    advice: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    """Numbers behind `value`, with units in their names."""
