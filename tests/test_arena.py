"""The allocator for planned addresses, on malloc in the place of CUDA: two live blocks never share a byte, whatever a
step does; what was recorded comes back at its planned addresses; all else is counted."""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executor_models import Model, segments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farspan.errors import JobError
from farspan.memory.addresses import Block, Piece, most_alive
from farspan.memory.arena import Arena, build
from farspan.memory.arena.arena import trace_of
from farspan.memory.block_traces import recorded
from farspan.memory.executor import Executor
from farspan.trainer.addresses import PlannedAddresses, planned_arena

MIB = 1 << 20
MakeArena = Callable[[], Arena]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeArena]:
    """A library has one arena, so each is loaded from a copy."""
    folder = tmp_path_factory.mktemp("arena")
    library, count = build(folder), iter(range(10**6))

    def made() -> Arena:
        copy = folder / f"{next(count)}.so"
        shutil.copy(library, copy)
        return Arena(copy, cuda=False)

    yield made


class Watched:
    """Calls an arena and holds every live block against all others."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.live: dict[int, int] = {}

    def malloc(self, size: int, stream: int = 0) -> int:
        address = self.arena.malloc(size, stream)
        assert address is not None and address % 512 == 0
        for other, length in self.live.items():
            assert address + size <= other or other + length <= address, "two live blocks share memory"
        self.live[address] = size
        ctypes.memset(address, 0xA5, min(size, 64))  # it is memory
        return address

    def free(self, address: int) -> None:
        del self.live[address]
        self.arena.free(address)


def play(watched: Watched, blocks: list[Block], *, cuts: tuple[int, ...] = ()) -> list[int]:
    """Asks for blocks and releases them as a trace tells; returns where they were."""
    at: dict[int, list[tuple[str, int]]] = {}
    for index, block in enumerate(blocks):
        at.setdefault(block.start, []).append(("make", index))
        at.setdefault(block.end, []).append(("free", index))
    for cut in cuts:
        at.setdefault(cut, []).append(("cut", 0))
    addresses = [0] * len(blocks)
    for moment in sorted(at):
        for what, index in sorted(at[moment]):  # cut, free, make
            if what == "cut":
                watched.arena.cut()
            elif what == "free":
                watched.free(addresses[index])
            else:
                addresses[index] = watched.malloc(blocks[index].bytes)
    return addresses


@st.composite
def traces(draw: st.DrawFn) -> list[Block]:
    moments = draw(st.permutations(range(2 * draw(st.integers(1, 14)))))
    pairs = [sorted(moments[i : i + 2]) for i in range(0, len(moments), 2)]
    return sorted(Block(start, end, draw(st.integers(1, 40)) * 700) for start, end in pairs)


DRAWN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@DRAWN
@given(blocks=traces(), held=st.lists(st.integers(1, 10**6), max_size=4), data=st.data())
def test_a_recorded_step_comes_back_at_its_planned_addresses(
    make: MakeArena, blocks: list[Block], held: list[int], data: st.DataObject
) -> None:
    arena = make()
    watched = Watched(arena)
    for size in held:  # weights, say
        watched.malloc(size)
    cuts = tuple(sorted(data.draw(st.sets(st.sampled_from(sorted({b.start for b in blocks})), max_size=3))))
    with arena.record():
        play(watched, blocks, cuts=cuts)
    assert arena.trace is not None
    rounded = [-(-block.bytes // 512) * 512 for block in blocks]
    assert [block.bytes for block in arena.trace.blocks] == rounded
    assert len(arena.trace.pieces) == len(cuts)
    layout = arena.plan()
    assert layout.bound_bytes == most_alive([b._replace(bytes=size) for b, size in zip(blocks, rounded)])
    arena.statistics(restart=True)
    for _ in range(2):
        with arena.step():
            addresses = play(watched, blocks)
        assert [address - addresses[0] for address in addresses] == [o - layout.offsets[0] for o in layout.offsets]
    seen = arena.statistics()
    assert (seen.on_plan, seen.off_plan, seen.occupied) == (2 * len(blocks), 0, 0)
    assert seen.arena_bytes >= layout.peak_bytes and seen.live_bytes >= sum(held)


@DRAWN
@given(blocks=traces(), seed=st.integers(0, 10**6))
def test_a_step_that_goes_another_way_is_served_and_counted(make: MakeArena, blocks: list[Block], seed: int) -> None:
    arena, rng = make(), random.Random(seed)
    watched = Watched(arena)
    with arena.record():
        play(watched, blocks)
    arena.plan()
    changed = [block for block in blocks if rng.random() > 0.2]  # some are missing
    changed = [b._replace(bytes=b.bytes + 512 * rng.randrange(3)) if rng.random() < 0.2 else b for b in changed]
    last = max(block.end for block in blocks)
    changed = [b._replace(end=rng.randint(b.end, last)) if rng.random() < 0.3 else b for b in changed]  # live longer
    changed += [
        Block(start := rng.randrange(last), rng.randint(start + 1, last + 1), 700) for _ in range(rng.randrange(4))
    ]
    arena.statistics(restart=True)
    with arena.step():
        play(watched, sorted(changed))
    seen = arena.statistics()
    assert seen.on_plan + seen.off_plan + seen.occupied == len(changed)
    assert not watched.live and seen.live_bytes == 0
    with arena.step():
        play(watched, blocks)
    assert arena.statistics().on_plan == seen.on_plan + len(blocks), "the next step is on the plan again"


def test_after_a_gap_in_the_requests_the_place_in_the_plan_is_found_again(make: MakeArena) -> None:
    arena = make()
    watched = Watched(arena)
    blocks = [Block(2 * index, 2 * index + 1, 512 * (index + 1)) for index in range(60)]
    with arena.record():
        play(watched, blocks)
    arena.plan()
    with arena.step():
        play(watched, blocks[:10] + blocks[25:])
    seen = arena.statistics()
    assert seen.on_plan >= 30 and seen.off_plan <= 12


def test_what_outlives_its_step_is_not_overwritten(make: MakeArena) -> None:
    arena = make()
    watched = Watched(arena)
    blocks = [Block(0, 3, 4096), Block(1, 2, 8192)]
    with arena.record():
        play(watched, blocks)
    arena.plan()
    with arena.step():
        kept = watched.malloc(4096)
    with arena.step():
        play(watched, blocks)  # `Watched` would see a byte shared with `kept`
    assert arena.statistics().occupied >= 1
    with pytest.raises(AssertionError, match="still alive"):
        arena.plan()
    watched.free(kept)
    arena.plan()


@DRAWN
@given(seed=st.integers(0, 10**6))
def test_a_storm_of_requests_between_steps(make: MakeArena, seed: int) -> None:
    arena, rng = make(), random.Random(seed)
    watched = Watched(arena)
    for _ in range(150):
        if watched.live and rng.random() < 0.45:
            watched.free(rng.choice(list(watched.live)))
        else:
            watched.malloc(rng.choice([1, 511, 512, 5000, 3 * MIB, 30 * MIB]) + rng.randrange(100), rng.choice([0, 16]))
    live = arena.statistics()
    assert live.live_bytes >= sum(watched.live.values()) and live.reserved_bytes >= live.live_bytes
    for address in list(watched.live):
        watched.free(address)
    arena.give_up()
    after = arena.statistics()
    assert (after.live_bytes, after.reserved_bytes) == (0, 0), "neighbours were joined, and all was given back"
    assert after.peak_live_bytes >= live.live_bytes


def test_memory_of_one_stream_is_not_given_to_another(make: MakeArena) -> None:
    arena = make()
    first = arena.malloc(4096, 0)
    assert first is not None
    arena.free(first)
    assert arena.malloc(4096, 16) != first, "the first stream may still be using it"
    assert arena.malloc(4096, 0) == first


def test_when_memory_is_out_the_next_request_can_still_be_served(make: MakeArena) -> None:
    arena = make()
    assert arena.malloc(1 << 60) is None
    assert arena.malloc(4096) is not None
    with arena.record():
        address = arena.malloc(1000)
        assert address is not None
        arena.free(address)
    arena.trace = trace_of([1 << 60, -1])
    with pytest.raises(JobError, match="do not fit"):
        arena.plan()
    with arena.step():
        assert arena.malloc(1000) is not None


def test_a_step_of_training(make: MakeArena) -> None:
    """The blocks of a real step, as the CPU allocator was seen to hand them out."""
    model = Model()
    Executor(model.layers, segments(2, 0.5, 600))

    def step() -> None:
        model.gradients([600], micro_batches=1)

    step()
    blocks, _ = recorded(step)
    blocks = [block for block in blocks if block.bytes]
    arena = make()
    watched = Watched(arena)
    with arena.record():
        play(watched, blocks)
    layout = arena.plan()
    arena.statistics(restart=True)
    with arena.step():
        play(watched, blocks)
    seen = arena.statistics()
    assert (seen.on_plan, seen.off_plan, seen.occupied) == (len(blocks), 0, 0) and len(blocks) > 300
    assert layout.gap < 0.1


def test_events_become_blocks_and_pieces() -> None:
    trace = trace_of([512, 0, 1024, -1, 0, -2, 2048])
    assert trace.blocks == (Block(0, 3, 512), Block(2, 5, 1024), Block(6, 7, 2048))
    assert trace.pieces == (Piece(1, 4), Piece(4, 7))


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    false: Any = shutil.which("false")
    monkeypatch.setenv("CXX", false)
    with pytest.raises(JobError, match="cannot be built") as caught:
        build(tmp_path)
    assert "memory.addresses=torch" in str(caught.value)
    monkeypatch.setenv("CXX", "no such compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobError, match=r"no C\+\+ compiler"):
        build(tmp_path)


def test_a_run_records_its_second_step_and_plans_the_third(make: MakeArena) -> None:
    arena, layer, told = make(), torch.nn.Identity(), []
    steps = PlannedAddresses(arena, [layer], told.append)
    x = torch.zeros(1)

    def step() -> None:
        for _ in range(3):
            layer(x)
            one, two = arena.malloc(1000), arena.malloc(5000)
            assert one is not None and two is not None
            arena.free(one)
            arena.free(two)

    for _ in range(5):
        with steps.step(stream=0):
            step()
    assert len(told) == 1 and told[0].gap == 0.0 and len(told[0].pieces) == 3
    assert arena.statistics().on_plan == 3 * 6
    with PlannedAddresses(None, [layer], told.append).step():
        pass


def test_without_a_gpu_planned_addresses_are_refused() -> None:
    spec = SimpleNamespace(addresses="planned", zero=0)
    with pytest.raises(JobError, match="cannot be used here") as caught:
        planned_arena(spec, use_gpu=False)  # type: ignore[arg-type]
    assert "trains on CPU" in str(caught.value)
    assert planned_arena(SimpleNamespace(addresses="torch"), use_gpu=False) is None  # type: ignore[arg-type]
