"""The clock and the ledger of `memory.replay`: operations on five lanes, and each block of memory as it comes and goes.

Lanes run one operation at a time in the order in which they were handed them, as streams do. An operation starts when
its lane is free and all that it waits for has ended.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from farspan.memory.plan import TIERS, Tier

Lane = Literal["compute", "copy_out", "disk_write", "disk_read", "copy_in"]
TRANSFERS: tuple[Lane, ...] = ("copy_out", "disk_write", "disk_read", "copy_in")  # as rows pass them
LANES: tuple[Lane, ...] = ("compute", *TRANSFERS)
CAUSES = ("forward", "head", "inner_forward", "rebuild", "backward", "step", *(f"stall_{lane}" for lane in TRANSFERS))
"""What the compute lane spends its seconds on."""


class Entry(NamedTuple):
    """One line of the ledger: `bytes` more (or, below zero, less) on a tier."""

    time_s: float
    tier: Tier
    bytes: int
    label: str


class Span(NamedTuple):
    """One operation as it ran; `bytes` is what a transfer moved."""

    lane: Lane
    label: str
    start_s: float
    end_s: float
    bytes: int


class Peak(NamedTuple):
    """The most bytes a tier ever held, when that first was, and what compute was doing."""

    bytes: int
    time_s: float
    operation: str


@dataclass(frozen=True)
class Ran:
    """Operations as they ran."""

    seconds: float
    cause_s: dict[str, float]
    """Seconds of the compute lane by cause (`CAUSES`); they sum to `seconds`."""
    lane_bytes: dict[Lane, int]
    """Bytes moved by each transfer lane."""
    peaks: dict[Tier, Peak]
    ledger: tuple[Entry, ...]
    """In the order of events; begins with what was there at 0 s, and what is left at the end is that."""
    spans: tuple[Span, ...]
    """Operations in the order in which they started."""


class Block(NamedTuple):
    tier: Tier
    label: str
    bytes: int
    tensor: str = ""


Blocks = Sequence[Block]


@dataclass(eq=False, slots=True)
class Operation:
    lane: Lane
    cause: str
    label: str
    seconds: float
    bytes: int = 0
    after: Sequence[Operation] = ()
    """Operations that must have ended; those before it on its own lane go without saying."""
    drops: Blocks = ()
    """Freed when it starts; then `makes` are made. When it ends, `releases` are freed; then `leaves` are made."""
    makes: Blocks = ()
    releases: Blocks = ()
    leaves: Blocks = ()
    missing: int = field(default=0, init=False)
    followers: list[Operation] = field(default_factory=list, init=False)
    end_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.after)
        for earlier in self.after:
            earlier.followers.append(self)


class Ledger:
    """What lies where, and how much of it there has been at most."""

    def __init__(self) -> None:
        self.live: dict[tuple[Tier, str], int] = {}
        self.held_bytes = dict.fromkeys(TIERS, 0)
        self.peaks = {tier: Peak(0, 0.0, "start") for tier in TIERS}
        self.entries: list[Entry] = []

    def book(self, time_s: float, operation: str, freed: Iterable[Block], made: Iterable[Block]) -> None:
        for tier, label, size_bytes, _ in freed:
            assert self.live.pop((tier, label), None) == size_bytes, (tier, label)
            self.held_bytes[tier] -= size_bytes
            self.entries.append(Entry(time_s, tier, -size_bytes, label))
        for tier, label, size_bytes, _ in made:
            assert (tier, label) not in self.live, (tier, label)
            self.live[tier, label] = size_bytes
            self.held_bytes[tier] += size_bytes
            self.entries.append(Entry(time_s, tier, size_bytes, label))
            if self.held_bytes[tier] > self.peaks[tier].bytes:
                self.peaks[tier] = Peak(self.held_bytes[tier], time_s, operation)


def run(operations: Sequence[Operation], there: Blocks) -> Ran:
    """Starts what is first on a free lane and misses nothing, then goes to the next end.

    Args:
        there: blocks from before the first operation.
    """
    ledger, running, spans, busy = Ledger(), list[tuple[float, int, Operation]](), list[Span](), set[Lane]()
    ledger.book(0.0, "start", (), there)
    queues: dict[Lane, deque[Operation]] = {lane: deque() for lane in LANES}
    for operation in operations:
        queues[operation.lane].append(operation)
    cause_s, lane_bytes = dict.fromkeys(CAUSES, 0.0), dict.fromkeys(TRANSFERS, 0)
    now_s, free_s, doing = 0.0, 0.0, ""
    while running or any(queues.values()):
        for lane, queue in queues.items():
            if lane in busy or not queue or queue[0].missing:
                continue
            operation = queue.popleft()
            operation.end_s = now_s + operation.seconds
            if lane == "compute":
                doing = operation.label
                cause_s[operation.cause] += operation.seconds
                for waited_for in TRANSFERS:
                    until_s = max([free_s, *(other.end_s for other in operation.after if other.lane == waited_for)])
                    cause_s[f"stall_{waited_for}"] += until_s - free_s
                    free_s = until_s
                free_s = operation.end_s
            else:
                lane_bytes[lane] += operation.bytes
            ledger.book(now_s, doing, operation.drops, operation.makes)
            heapq.heappush(running, (operation.end_s, len(spans), operation))
            busy.add(lane)
            spans.append(Span(lane, operation.label, now_s, operation.end_s, operation.bytes))
        assert running, "every operation waits for another one"
        now_s, ended = running[0][0], list[Operation]()
        while running and running[0][0] == now_s:
            ended.append(heapq.heappop(running)[2])
        for operation in ended:
            busy.remove(operation.lane)
            ledger.book(now_s, doing, operation.releases, ())
            for follower in operation.followers:
                follower.missing -= 1
        for operation in ended:
            ledger.book(now_s, doing, (), operation.leaves)
        if "compute" not in busy and queues["compute"]:
            doing = f"waiting for {queues['compute'][0].label}"
    entries = [entry for entry in ledger.entries if entry.bytes]
    return Ran(free_s, cause_s, lane_bytes, ledger.peaks, tuple(entries), tuple(spans))
