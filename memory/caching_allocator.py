"""What torch's caching allocator for CUDA would reserve for a sequence of requests, told from its rules, without a GPU.

c10/cuda/CUDACachingAllocator.cpp of torch 2.11 to 2.13, one stream, default settings: requests are rounded up to 512
bytes; those of up to 1 MiB come from segments of 2 MiB, others from segments of 20 MiB or, from 10 MiB on, of their own
size in steps of 2 MiB. The smallest free block that is large enough is taken, and cut if enough is left of it; what is
given back joins its free neighbours. Segments are kept for good. With `expandable_segments:True` each of the two pools
is one segment that grows by pages of 2 or 20 MiB at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from farspan.memory.addresses import Block

MIB = 2**20
ROUND = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE_SEGMENT, OWN_SEGMENT, OWN_STEP = 20 * MIB, 10 * MIB, 2 * MIB


@dataclass(eq=False)
class _Part:
    """A stretch of a segment, free or taken."""

    bytes: int
    free: bool = True


@dataclass
class _Pool:
    small: bool
    segments: list[list[_Part]] = field(default_factory=list)


class CachingAllocator:
    """Its bookkeeping. Bytes handed out are counted as rounded."""

    def __init__(self, *, expandable: bool = False) -> None:
        self.expandable = expandable
        self.small, self.large = _Pool(small=True), _Pool(small=False)
        self.reserved = self.allocated = self.peak_allocated = 0
        """Bytes; `reserved` only grows."""

    def malloc(self, size_bytes: int) -> tuple[_Pool, list[_Part], _Part]:
        """Hand out memory; the result is what `free` takes."""
        size = max(ROUND, -(-size_bytes // ROUND) * ROUND)
        pool = self.small if size <= SMALL else self.large
        fitting = [
            (part.bytes, s, p)
            for s, segment in enumerate(pool.segments)
            for p, part in enumerate(segment)
            if part.free and part.bytes >= size
        ]
        if fitting:
            _, s, p = min(fitting)
            segment, place = pool.segments[s], p
        else:
            segment, place = self._grow(pool, size) if self.expandable else self._segment(pool, size)
        part = segment[place]
        left = part.bytes - size
        if left >= ROUND if pool.small or self.expandable else left > SMALL:
            part.bytes = size
            segment.insert(place + 1, _Part(left))
        part.free = False
        self.allocated += part.bytes
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return pool, segment, part

    def free(self, given: tuple[_Pool, list[_Part], _Part]) -> None:
        _, segment, part = given
        assert not part.free, "given back twice"
        part.free = True
        self.allocated -= part.bytes
        place = segment.index(part)
        if place + 1 < len(segment) and segment[place + 1].free:
            part.bytes += segment.pop(place + 1).bytes
        if place > 0 and segment[place - 1].free:
            part.bytes += segment.pop(place - 1).bytes

    def _segment(self, pool: _Pool, size: int) -> tuple[list[_Part], int]:
        if pool.small:
            whole = SMALL_SEGMENT
        else:
            whole = LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // OWN_STEP) * OWN_STEP
        self.reserved += whole
        pool.segments.append([_Part(whole)])
        return pool.segments[-1], 0

    def _grow(self, pool: _Pool, size: int) -> tuple[list[_Part], int]:
        """Map pages at the end of the one segment, behind what is free there."""
        if not pool.segments:
            pool.segments.append([])
        segment, page = pool.segments[0], SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        if not segment or not segment[-1].free:
            segment.append(_Part(0))
        mapped = -(-(size - segment[-1].bytes) // page) * page
        segment[-1].bytes += mapped
        self.reserved += mapped
        return segment, len(segment) - 1


def reserved_bytes(blocks: Sequence[Block], *, expandable: bool = False) -> int:
    """What the allocator has reserved after these blocks came and went; at one moment releases come first."""
    allocator = CachingAllocator(expandable=expandable)
    held = {}
    moments = [(block.start, 1, index) for index, block in enumerate(blocks) if block.start < block.end]
    moments += [(block.end, 0, index) for index, block in enumerate(blocks) if block.start < block.end]
    for _, comes, index in sorted(moments):
        if comes:
            held[index] = allocator.malloc(blocks[index].bytes)
        else:
            allocator.free(held.pop(index))
    return allocator.reserved
