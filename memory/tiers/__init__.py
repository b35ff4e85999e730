"""Where offloaded tensors live: host memory and disk, behind one small interface. Linux.

`Store` takes a tensor and gives it back bit for bit; everything between runs on its own threads. The caller decides
what goes where and when (see `farspan.memory.plan`); nothing here knows of layers or plans.
"""

from __future__ import annotations

from farspan.memory.tiers.base import Corrupted, Interval, Lane, OffloadFailed, OffTier, State, Statistics, Stored
from farspan.memory.tiers.store import Store

__all__ = ["Store", "Stored", "State", "Statistics", "Interval", "Lane", "OffTier", "OffloadFailed", "Corrupted"]
