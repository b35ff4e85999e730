"""Blocks at addresses: no overlap, lowest on small cases, and what the caching allocator would do."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.memory.addresses import ORDERS, Block, Piece, best_fit, most_alive, overlapping, pack, pack_in_pieces
from farspan.memory.allocations import footprint
from farspan.memory.block_traces import recorded
from farspan.memory.caching_allocator import MIB, CachingAllocator, reserved_bytes

KIB = 1024


@st.composite
def blocks(draw: st.DrawFn, most: int, moments: int = 12) -> list[Block]:
    found = []
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, moments))
        found.append(Block(start, start + draw(st.integers(0, 6)), draw(st.integers(0, 9))))
    return found


def by_byte(found: list[Block], offsets: list[int] | tuple[int, ...]) -> int:
    """Highest address, by marking every byte at every moment; fails where two blocks want one."""
    owner: dict[tuple[int, int], int] = {}
    for index, (block, offset) in enumerate(zip(found, offsets)):
        assert offset >= 0
        for moment in range(block.start, block.end):
            for byte in range(offset, offset + block.bytes):
                assert owner.setdefault((moment, byte), index) == index
    return 1 + max((byte for _, byte in owner), default=-1)


def lowest(found: list[Block]) -> int:
    """The lowest peak there is: some order, each block as low as those placed before it allow, is best."""
    best = sum(block.bytes for block in found)
    for order in permutations(range(len(found))):
        offsets: dict[int, int] = {}
        for index in order:
            below = [offsets[i] + found[i].bytes for i in offsets if found[i].meets(found[index])]
            offsets[index] = max(below, default=0)
        best = min(best, by_byte(found, [offsets[i] for i in range(len(found))]))
    return best


@settings(max_examples=200, deadline=None)
@given(blocks(25), st.sampled_from([1, 4]))
def test_no_two_blocks_share_memory(found: list[Block], align: int) -> None:
    layout = pack(found, align=align, time_limit_s=0.2)
    rounded = [block._replace(bytes=-(-block.bytes // align) * align) for block in found]
    assert by_byte(rounded, layout.offsets) <= layout.peak_bytes
    assert layout.bound_bytes == most_alive(rounded) <= layout.peak_bytes
    assert all(offset % align == 0 for offset in layout.offsets)
    for order in ORDERS.values():
        offsets = best_fit(rounded, order)
        assert layout.peak_bytes <= max((o + b.bytes for o, b in zip(offsets, rounded)), default=0)
        assert overlapping(rounded, offsets) is None


@settings(max_examples=60, deadline=None)
@given(blocks(6, moments=6))
def test_small_cases_are_packed_as_low_as_can_be(found: list[Block]) -> None:
    assert pack(found).peak_bytes == lowest(found)


GAP = [
    (5, 9, 8), (4, 8, 4), (7, 8, 7), (10, 16, 5), (3, 9, 4), (0, 3, 5), (5, 11, 3), (11, 16, 5), (0, 2, 10), (4, 5, 3),
    (9, 15, 11), (0, 4, 8), (9, 15, 5), (3, 6, 6),
]  # fmt: skip


def test_a_program_finds_what_best_fit_does_not() -> None:
    """Fourteen blocks that no order of best-fit packs without a gap."""
    found = [Block(s, e, b) for s, e, b in GAP]
    greedy = min(max(o + b.bytes for o, b in zip(best_fit(found, order), found)) for order in ORDERS.values())
    layout = pack(found)
    assert greedy > layout.peak_bytes == layout.bound_bytes
    assert layout.how == "mixed-integer program" and layout.gap == 0


def test_overlaps_are_found() -> None:
    found = [Block(0, 4, 8), Block(3, 5, 8), Block(4, 6, 8)]
    assert overlapping(found, (0, 7, 0)) == (0, 1)
    assert overlapping(found, (0, 8, 0)) is None


@settings(max_examples=60, deadline=None)
@given(blocks(20), st.lists(st.integers(0, 18), max_size=5))
def test_pieces_are_packed_apart_and_together(found: list[Block], cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), 18]
    pieces = [Piece(start, end) for start, end in pairwise(ends)]
    levels = pack_in_pieces(found, pieces, time_limit_s=0.1)
    assert by_byte(found, levels.offsets) <= levels.peak_bytes
    assert levels.bound_bytes == most_alive(found) <= levels.peak_bytes


def test_like_pieces_are_packed_once() -> None:
    layer = [(0, 2, 5), (1, 3, 7), (2, 4, 5)]
    found = [Block(10 * n + s, 10 * n + e, b) for n in range(4) for s, e, b in layer] + [Block(0, 40, 3)]
    levels = pack_in_pieces(found, [Piece(10 * n, 10 * n + 10) for n in range(4)])
    assert len({id(layout) for layout in levels.pieces}) == 1
    assert levels.peak_bytes == 12 + 3 and levels.gap == 0


def test_recorded_blocks_are_those_of_the_footprint() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 64, requires_grad=True)

    def work() -> None:
        torch.empty(5, dtype=torch.uint8)
        (x @ x.t()).exp().square().sum().backward()
        torch.empty(5, dtype=torch.uint8)
        x.grad = None

    work()
    found, cuts = recorded(work, cut_bytes=5)
    assert most_alive(found) == footprint(work, x.device).peak_bytes
    assert len(cuts) == 2 and cuts[0] == 0
    assert pack(found).gap < 0.2


def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "addresses.json"
    command = [sys.executable, "-m", "farspan.jobs", "bench", "addresses", "--toy", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text())
    assert {key.split("/")[0] for key in cells} == {f"{f}, {a}" for f in ("llama", "qwen3") for a in ("full", "LoRA")}
    for cell in cells.values():
        assert cell["alive"] <= min(cell["whole"], cell["levels"]) <= cell["expandable"]
        assert cell["pieces"] > 3 and cell["blocks"] > 300
    assert "| llama, full | 900 |" in out.with_suffix(".md").read_text()


# The caching allocator, by hand


def test_small_requests_share_a_segment_of_two_mib() -> None:
    allocator = CachingAllocator()
    first = allocator.malloc(700 * KIB)
    allocator.malloc(MIB)
    assert (allocator.reserved, allocator.allocated) == (2 * MIB, 1724 * KIB)
    allocator.malloc(325 * KIB)
    assert allocator.reserved == 4 * MIB, "324 KiB were left"
    allocator.free(first)
    allocator.malloc(699 * KIB)
    assert allocator.reserved == 4 * MIB
    assert allocator.malloc(1)[2].bytes == 512


@pytest.mark.parametrize(
    ("requests", "reserved"),
    [([2], 20), ([2, 3, 9], 20), ([9, 9, 9], 40), ([10], 10), ([11], 12), ([19.5], 20), ([9, 12], 32)],
)
def test_segments_of_large_requests(requests: list[float], reserved: int) -> None:
    allocator = CachingAllocator()
    for request in requests:
        allocator.malloc(int(request * MIB))
    assert allocator.reserved == reserved * MIB


def test_a_large_block_is_cut_only_if_more_than_a_mib_is_left() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(20 * MIB))
    assert allocator.malloc(19 * MIB)[2].bytes == 20 * MIB
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(20 * MIB))
    assert allocator.malloc(19 * MIB - 512)[2].bytes == 19 * MIB - 512


def test_neighbours_join_and_the_smallest_fitting_block_is_taken() -> None:
    allocator = CachingAllocator()
    given = [allocator.malloc(5 * MIB) for _ in range(4)]
    for one in (given[0], given[2], given[1]):
        allocator.free(one)
    assert allocator.malloc(15 * MIB)[2].bytes == 15 * MIB
    assert allocator.reserved == 20 * MIB


def test_a_growing_sequence_wastes_segments_that_expandable_ones_do_not() -> None:
    """Each request is a little larger than the hole before it."""
    growing = [Block(n, n + 1, (20 + 2 * n) * MIB) for n in range(10)]
    assert reserved_bytes(growing) == sum(block.bytes for block in growing)
    assert reserved_bytes(growing, expandable=True) == 40 * MIB
    assert pack(growing).peak_bytes == 38 * MIB


@settings(max_examples=60, deadline=None)
@given(blocks(25), st.booleans())
def test_reserved_is_at_least_what_lives(found: list[Block], expandable: bool) -> None:
    large = [block._replace(bytes=block.bytes * 700 * KIB) for block in found]
    assert reserved_bytes(large, expandable=expandable) >= most_alive(large)
