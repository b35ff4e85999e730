"""Planned addresses at run time: an allocator for CUDA that gives each request of a step the place a plan found for it.

`arena.cpp` is the allocator; `Arena` records a step, has its blocks packed and honours the result. Behind a switch
(`memory.addresses=planned`): whether it beats torch's expandable segments on a GPU has not been measured yet.
"""

from __future__ import annotations

from farspan.memory.arena.arena import Arena, ArenaStatistics, build

__all__ = ["Arena", "ArenaStatistics", "build"]
