"""Which blocks of memory lived when while a piece of work ran, from the CPU allocator's own events."""

from __future__ import annotations

from collections.abc import Callable

import torch

from farspan.memory.addresses import Block


def recorded(function: Callable[[], object], *, cut_bytes: int = 0) -> tuple[list[Block], list[int]]:
    """Every block that the CPU allocator hands out while `function` runs, and when blocks of `cut_bytes` were made.

    Moments count allocations and releases. What is released after the end lives to the end; what was there before is
    not among it. Blocks of `cut_bytes` are marks and are left out.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        function()
    events: list[tuple[int, int, int]] = []
    open_nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
    while open_nodes:
        node = open_nodes.pop()
        open_nodes += node.children
        if type(node.extra_fields).__name__.endswith("Allocation"):
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    blocks: list[Block] = []
    alive: dict[int, int] = {}
    cuts: list[int] = []
    for moment, (_, address, size) in enumerate(sorted(events)):
        if size == cut_bytes:
            cuts.append(moment)
        elif size > 0:
            alive[address] = len(blocks)
            blocks.append(Block(moment, len(events), size))
        elif address in alive:
            index = alive.pop(address)
            blocks[index] = blocks[index]._replace(end=moment)
    return blocks, cuts
