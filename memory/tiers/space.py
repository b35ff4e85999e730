"""Which pages of a range are free: the allocator of the host arena and of the disk file.

Best fit, with freed neighbours joined. When no hole is large enough an allocation is split over several holes: tensors
are copied in and out, so they need not lie in one piece, and "as many bytes are free" then means "it fits". A plan that
adds up fits whatever the order of allocations. Costs a walk over the holes, of which activations, freed in reverse
order, leave few.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter
from typing import NamedTuple

PAGE_BYTES = 4096
"""Also the largest block that drives in use ask of O_DIRECT."""


class Extent(NamedTuple):
    """Bytes `start` to `end` (exclusive) of a range, whole pages."""

    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def whole_pages(size_bytes: int) -> int:
    """`size_bytes` rounded up to pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


_size = attrgetter("bytes")


class Space:
    """Pages of `total_bytes` bytes (rounded up to pages), all free at first. Not thread-safe."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = whole_pages(total_bytes)
        self.used_bytes = 0
        self._holes = [Extent(0, self.total_bytes)] if self.total_bytes else []
        """By address; no two touch."""

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    def take(self, size_bytes: int, *, split: bool = True) -> tuple[Extent, ...] | None:
        """Pages for `size_bytes` bytes in the order of the data, or None when they are not free (not free in one hole,
        with `split` off)."""
        left = whole_pages(size_bytes)
        fitting = [hole for hole in self._holes if hole.bytes >= left]
        if left > self.free_bytes or (not fitting and not split):
            return None
        taken = []
        while left:
            hole = min(fitting, key=_size) if fitting else max(self._holes, key=_size)
            taken.append(Extent(hole.start, min(hole.end, hole.start + left)))
            at = self._holes.index(hole)
            self._holes[at : at + 1] = [Extent(taken[-1].end, hole.end)] if hole.end > taken[-1].end else []
            left -= taken[-1].bytes
            fitting = [hole for hole in self._holes if hole.bytes >= left]
        self.used_bytes += sum(extent.bytes for extent in taken)
        return tuple(taken)

    def release(self, extents: tuple[Extent, ...]) -> None:
        """Give pages back."""
        for start, end in extents:
            assert 0 <= start < end <= self.total_bytes, (start, end)
            at = bisect_left(self._holes, (start, end))
            before, after = self._holes[at - 1 : at] if at else [], self._holes[at : at + 1]
            assert not before or before[0].end <= start, "released twice"
            assert not after or end <= after[0].start, "released twice"
            self.used_bytes -= end - start
            first, last = at, at
            if before and before[0].end == start:
                start, first = before[0].start, at - 1
            if after and after[0].start == end:
                end, last = after[0].end, at + 1
            self._holes[first:last] = [Extent(start, end)]
