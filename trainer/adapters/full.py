"""No adapter at all."""

from __future__ import annotations

from typing import Literal

from farspan.schema import Schema


class FullFineTune(Schema):
    """Train every parameter."""

    type: Literal["full"] = "full"
