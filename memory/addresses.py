"""Where blocks of memory lie, when it is known beforehand how long each one lives.

Dynamic storage allocation: blocks whose lives overlap must not overlap in memory, and the highest address is to be low.
The most bytes alive at one moment are a lower bound. Best-fit in several orders nearly always reaches it; where it does
not and blocks are few, a mixed-integer program decides for each pair which one lies below. Both levels of MEMO (Zhao
et al., 2024, https://arxiv.org/abs/2407.12117) are here: the short-lived blocks of one piece of work are packed first,
then whole pieces, as one block each, among what outlives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from farspan.memory.milp import Program

MIP_BLOCKS = 40
"""So many at most are left to a mixed-integer program."""
MIP_S = 5.0


class Block(NamedTuple):
    """Memory that is needed from one moment (inclusive) to another (exclusive); moments are the indices of events."""

    start: int
    end: int
    bytes: int

    def meets(self, other: Block) -> bool:
        """Whether both are alive at one moment."""
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Layout:
    """An address for every block."""

    offsets: tuple[int, ...]
    peak_bytes: int
    """Highest address in use."""
    bound_bytes: int
    """No layout has a lower peak."""
    how: str
    """What found it."""

    @property
    def gap(self) -> float:
        return self.peak_bytes / self.bound_bytes - 1 if self.bound_bytes else 0.0


def most_alive(blocks: Iterable[Block]) -> int:
    """Most bytes alive at one moment."""
    changes: dict[int, int] = {}
    for block in blocks:
        if block.start < block.end:
            changes[block.start] = changes.get(block.start, 0) + block.bytes
            changes[block.end] = changes.get(block.end, 0) - block.bytes
    level = top = 0
    for moment in sorted(changes):
        level += changes[moment]
        top = max(top, level)
    return top


ORDERS: dict[str, Callable[[Block], tuple[int, ...]]] = {
    "by size": lambda block: (-block.bytes, block.start),
    "by area": lambda block: (-block.bytes * (block.end - block.start), block.start),
    "by life": lambda block: (block.start - block.end, -block.bytes),
    "by start": lambda block: (block.start, -block.bytes),
}
"""In which blocks are placed."""


def best_fit(blocks: Sequence[Block], order: Callable[[Block], tuple[int, ...]]) -> list[int]:
    """Places one block after another in the smallest gap between those it meets, at its lower end."""
    offsets = [0] * len(blocks)
    placed: list[int] = []
    for index in sorted(range(len(blocks)), key=lambda i: order(blocks[i])):
        block = blocks[index]
        beside = sorted((offsets[i], offsets[i] + blocks[i].bytes) for i in placed if blocks[i].meets(block))
        best, smallest, free_from = None, None, 0
        for low, high in beside:
            room = low - free_from
            if room >= block.bytes and (smallest is None or room < smallest):
                best, smallest = free_from, room
            free_from = max(free_from, high)
        offsets[index] = free_from if best is None else best
        placed.append(index)
    return offsets


def pack(blocks: Sequence[Block], *, align: int = 1, time_limit_s: float = MIP_S) -> Layout:
    """The lowest layout found; sizes are rounded up to `align`, so offsets are multiples of it."""
    rounded = [block._replace(bytes=-(-block.bytes // align) * align) for block in blocks]
    bound = most_alive(rounded)
    tried = [(offsets := best_fit(rounded, order), _peak(rounded, offsets), name) for name, order in ORDERS.items()]
    offsets, peak_bytes, name = min(tried, key=lambda found: found[1])
    how = f"best fit, {name}"
    alive = [index for index, block in enumerate(rounded) if block.bytes and block.start < block.end]
    if peak_bytes > bound and len(alive) <= MIP_BLOCKS:
        few = [rounded[index] for index in alive]
        better = _by_program(few, [offsets[index] for index in alive], bound, peak_bytes, time_limit_s)
        if better is not None:
            offsets, peak_bytes, how = list(offsets), _peak(few, better), "mixed-integer program"
            for index, offset in zip(alive, better):
                offsets[index] = offset
    layout = Layout(tuple(offsets), peak_bytes, bound, how)
    assert overlapping(rounded, layout.offsets) is None, "two blocks share memory"
    return layout


def overlapping(blocks: Sequence[Block], offsets: Sequence[int]) -> tuple[int, int] | None:
    """Two blocks that share both a moment and a byte, if there are any."""
    order = sorted(range(len(blocks)), key=lambda index: blocks[index].start)
    alive: list[int] = []
    for index in order:
        block, low = blocks[index], offsets[index]
        if not block.bytes or block.start >= block.end:
            continue
        alive = [other for other in alive if blocks[other].end > block.start]
        for other in alive:
            if low < offsets[other] + blocks[other].bytes and offsets[other] < low + block.bytes:
                return other, index
        alive.append(index)
    return None


def _peak(blocks: Sequence[Block], offsets: Sequence[int]) -> int:
    alive = [offset + block.bytes for block, offset in zip(blocks, offsets) if block.start < block.end]
    return max(alive, default=0)


def _by_program(
    blocks: Sequence[Block], start: Sequence[int], bound: int, peak_bytes: int, time_limit_s: float
) -> list[int] | None:
    """A layout lower than `peak_bytes`, which `start` has; None when there is none or none was found in time."""
    program, unit = Program(), float(peak_bytes)
    top = program.column(1.0, 1.0, lower=bound / unit)
    columns = [program.column(1.0 - block.bytes / unit) for block in blocks]
    values = [1.0, *(offset / unit for offset in start)]
    for column, block in zip(columns, blocks):
        program.row([(top, 1.0), (column, -1.0)], lower=block.bytes / unit)
    for j in range(len(blocks)):
        for i in range(j):
            if not blocks[i].meets(blocks[j]):
                continue
            above = program.column(1.0, integer=True)  # 0: i below j
            values.append(float(start[i] >= start[j] + blocks[j].bytes))
            program.row(
                [(columns[j], 1.0), (columns[i], -1.0), (above, 1.0)],
                lower=blocks[i].bytes / unit,
            )
            program.row(
                [(columns[i], 1.0), (columns[j], -1.0), (above, -1.0)],
                lower=blocks[j].bytes / unit - 1.0,
            )
    found = program.improve(values, time_limit_s=time_limit_s, enough=bound / unit)
    if found is None:
        return None
    # in whole bytes: the program's order of addresses, each block as low as it goes
    offsets = [0] * len(blocks)
    order = sorted(range(len(blocks)), key=lambda index: found[columns[index]])
    for place, index in enumerate(order):
        below = [offsets[i] + blocks[i].bytes for i in order[:place] if blocks[i].meets(blocks[index])]
        offsets[index] = max(below, default=0)
    return offsets if _peak(blocks, offsets) < peak_bytes else None


class Piece(NamedTuple):
    """A stretch of events (first inclusive, last exclusive) whose short-lived blocks are packed by themselves."""

    start: int
    end: int


@dataclass(frozen=True)
class TwoLevels:
    """A layout of a step, piece by piece."""

    offsets: tuple[int, ...]
    peak_bytes: int
    bound_bytes: int
    pieces: tuple[Layout, ...]
    whole: Layout
    """Of what outlives its piece, with each piece as one block."""

    @property
    def gap(self) -> float:
        return self.peak_bytes / self.bound_bytes - 1 if self.bound_bytes else 0.0


def pack_in_pieces(
    blocks: Sequence[Block], pieces: Sequence[Piece], *, align: int = 1, time_limit_s: float = MIP_S
) -> TwoLevels:
    """Packs the blocks that live within one piece, then pieces and all other blocks together.

    Pieces that hold the same blocks, moments counted from their start, are packed once: so few as a model has kinds of
    layers.
    """
    inside: list[list[int]] = [[] for _ in pieces]
    outside: list[int] = []
    for index, block in enumerate(blocks):
        home = next(
            (p for p, piece in enumerate(pieces) if piece.start <= block.start and block.end <= piece.end), None
        )
        (outside if home is None else inside[home]).append(index)
    known: dict[tuple[Block, ...], Layout] = {}
    layouts = []
    for piece, members in zip(pieces, inside):
        shape = tuple(
            Block(blocks[i].start - piece.start, blocks[i].end - piece.start, blocks[i].bytes) for i in members
        )
        if shape not in known:
            known[shape] = pack(shape, align=align, time_limit_s=time_limit_s)
        layouts.append(known[shape])
    together = [blocks[index] for index in outside]
    together += [Block(piece.start, piece.end, layout.peak_bytes) for piece, layout in zip(pieces, layouts)]
    whole = pack(together, align=align, time_limit_s=time_limit_s)
    offsets = [0] * len(blocks)
    for index, offset in zip(outside, whole.offsets):
        offsets[index] = offset
    for members, layout, base in zip(inside, layouts, whole.offsets[len(outside) :]):
        for index, offset in zip(members, layout.offsets):
            offsets[index] = base + offset
    rounded = [block._replace(bytes=-(-block.bytes // align) * align) for block in blocks]
    assert overlapping(rounded, offsets) is None, "two blocks share memory"
    return TwoLevels(tuple(offsets), whole.peak_bytes, most_alive(rounded), tuple(layouts), whole)
