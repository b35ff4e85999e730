"""Host and disk tiers: what goes out comes back bit for bit, whatever the system does in between.

Oracles: the tensor itself, a map of single pages for the allocator, the kernel's own refusals (file size limit, full
file system). What is not covered: CUDA, and file systems other than the one tests run on (and its buffered fall-back).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from farspan.errors import DoesNotFit, FarspanError
from farspan.memory.tiers import Corrupted, OffloadFailed, OffTier, State, Store, Stored
from farspan.memory.tiers.device import Cpu
from farspan.memory.tiers.disk import chunks_of
from farspan.memory.tiers.space import PAGE_BYTES, Extent, Space, whole_pages

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content(size_bytes: int, seed: int) -> Tensor:
    """uint8 [size_bytes], none of them 0xFF, which is the poison."""
    return torch.randint(0, 255, (size_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def wait_for(condition: Callable[[], bool], seconds_s: float = 10.0) -> None:
    end_s = time.monotonic() + seconds_s
    while not condition():
        assert time.monotonic() < end_s, "did not happen"
        time.sleep(1e-3)


def settled(store: Store, stored: Stored) -> None:
    wait_for(lambda: stored.state is not State.FILLING)


def small(folder: Path, **changes: Any) -> Store:
    """Chunks of two pages, so that a few KiB are many chunks."""
    values: dict[str, Any] = {"host_bytes": 64 * PAGE_BYTES, "disk_dir": folder, "disk_bytes": MIB}
    return Store(**(values | {"chunk_bytes": 2 * PAGE_BYTES} | changes))


def four_lines(error: FarspanError) -> str:
    assert [line[:7] for line in str(error).splitlines()] == ["error: ", "   at: ", "  why: ", "  try: "]
    return str(error)


def offload_files() -> list[str]:
    """Descriptors of this process that are disk tiers."""
    return [entry.path for entry in os.scandir("/proc/self/fd") if "farspan-offload-" in os.path.realpath(entry.path)]


def offload_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("farspan-")]


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not offload_threads() and not offload_files()
    assert not list(tmp_path.iterdir())


# The allocator, against a map of pages


@given(
    pages=st.integers(0, 40),
    steps=st.lists(
        st.tuples(st.sampled_from(["take", "whole", "release"]), st.integers(0, 5 * PAGE_BYTES)), max_size=60
    ),
)
@settings(deadline=None, max_examples=300)
def test_space_against_a_map_of_pages(pages: int, steps: list[tuple[str, int]]) -> None:
    space, used = Space(pages * PAGE_BYTES), [False] * pages
    taken: list[tuple[Extent, ...]] = []
    for kind, size in steps:
        if kind == "release":
            if taken:
                given_up = taken.pop(size % len(taken))
                space.release(given_up)
                for page in pages_of(given_up):
                    assert used[page]
                    used[page] = False
            continue
        need = whole_pages(size) // PAGE_BYTES
        runs = [len(run) for run in "".join("x" if page else "." for page in used).split("x") if run]
        extents = space.take(size, split=kind == "take")
        if kind == "whole":
            assert (extents is not None) == (need <= max(runs, default=0) and (need > 0 or bool(runs)))
        else:
            assert (extents is not None) == (need <= used.count(False))
        if extents is not None:
            fitting = [run for run in runs if run >= need]
            if need and fitting:
                assert len(extents) == 1
                start = extents[0].start // PAGE_BYTES
                assert run_around(used, start) == min(fitting), "not the best fit"
            for page in pages_of(extents):
                assert not used[page], "overlap"
                used[page] = True
            assert len(pages_of(extents)) == need
            taken.append(extents)
        assert space.used_bytes == used.count(True) * PAGE_BYTES
        assert space.free_bytes == used.count(False) * PAGE_BYTES
    for left in taken:
        space.release(left)
    assert space.take(pages * PAGE_BYTES, split=False) == ((Extent(0, pages * PAGE_BYTES),) if pages else None)


def pages_of(extents: tuple[Extent, ...]) -> list[int]:
    return [page for start, end in extents for page in range(start // PAGE_BYTES, end // PAGE_BYTES)]


def run_around(used: list[bool], page: int) -> int:
    """Length of the free run that contains `page`."""
    start = end = page
    while start > 0 and not used[start - 1]:
        start -= 1
    while end < len(used) and not used[end]:
        end += 1
    return end - start


def test_pages_are_not_released_twice() -> None:
    space = Space(8 * PAGE_BYTES)
    extents = space.take(2 * PAGE_BYTES)
    assert extents is not None
    space.release(extents)
    with pytest.raises(AssertionError, match="released twice"):
        space.release(extents)


@given(size=st.integers(0, 20 * PAGE_BYTES), gaps=st.lists(st.integers(1, 4), min_size=20, max_size=20))
@settings(deadline=None)
def test_chunks_cover_a_tensor_once_and_lie_on_its_pages(size: int, gaps: list[int]) -> None:
    place, left, at = [], whole_pages(size), 0
    for gap in gaps:
        take = min(left, gap * PAGE_BYTES)
        if take:
            place.append(Extent(at, at + take))
        left, at = left - take, at + take + gap * PAGE_BYTES
    chunks = chunks_of(size, tuple(place), 2 * PAGE_BYTES)
    assert sum(chunk.bytes for chunk in chunks) == size
    assert [chunk.start for chunk in chunks] == [sum(c.bytes for c in chunks[:i]) for i in range(len(chunks))]
    written = [page for c in chunks for page in pages_of((Extent(c.offset, c.offset + whole_pages(c.bytes)),))]
    assert sorted(written) == pages_of(tuple(place))


# Round trips


@given(
    tier=st.sampled_from(["host", "disk"]),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=4),
    host_pages=st.sampled_from([0, 1, 3000]),
    checksum=st.booleans(),
    give_out=st.booleans(),
    at_once=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(SLOW, max_examples=100)
def test_any_tensor_comes_back_bit_for_bit(
    tmp_path: Path, tier: OffTier, dtype: torch.dtype, shape: list[int], host_pages: int, checksum: bool,
    give_out: bool, at_once: bool, seed: int,
) -> None:  # fmt: skip
    numel = torch.Size(shape).numel()
    if numel > 40_000:
        shape, numel = [numel % 40_000], numel % 40_000
    kept = content(numel * dtype.itemsize, seed)
    kept = kept.bool() if dtype is torch.bool else kept.view(dtype)
    tensor = kept.reshape(shape).clone()
    if tier == "host":
        host_pages = 3000
    with small(
        tmp_path, host_bytes=host_pages * PAGE_BYTES, disk_bytes=MIB, checksum=checksum, test_seed=seed
    ) as store:
        stored = store.put(tier, tensor, label="x")
        if not at_once:
            settled(store, stored)
            del tensor
        out = torch.empty(shape, dtype=dtype) if give_out else None
        found = store.get(stored, out)
        assert out is None or found is out
        assert (found.shape, found.dtype) == (torch.Size(shape), dtype) and found.is_contiguous()
        assert raw(found) == raw(kept)
        again = store.get(stored)
        assert raw(again) == raw(kept)
        store.free(stored)
        store.free(stored)
        assert stored.state is State.FREE
        wait_for(lambda: not any(store.statistics().held_bytes.values()))


@pytest.mark.parametrize("seed", range(6))
def test_storm_of_puts_gets_and_frees(tmp_path: Path, seed: int) -> None:
    """Random order, random delays, freed memory poisoned, both tiers nearly full all the time."""
    rng = random.Random(seed)
    held: list[tuple[Stored, Tensor]] = []
    with small(
        tmp_path, host_bytes=100 * PAGE_BYTES, disk_bytes=100 * PAGE_BYTES, test_seed=seed, checksum=True
    ) as store:
        for turn in range(400):
            action = rng.choice(["put", "put", "fetch", "get", "free", "admit"])
            if action == "put":
                kept = content(rng.randrange(12 * PAGE_BYTES), turn)
                try:
                    held.append((store.put(rng.choice(["host", "disk"]), kept.clone(), label=f"t{turn}"), kept))
                except DoesNotFit:
                    action = "free"
            if action == "admit":
                store.admit()
            elif held and action != "put":
                stored, kept = held[rng.randrange(len(held))]
                if action == "fetch":
                    store.fetch(stored)
                elif action == "get":
                    assert torch.equal(store.get(stored), kept), stored.label
                else:
                    store.free(stored)
                    held.remove((stored, kept))
            seen = store.statistics()
            assert seen.held_bytes["host"] <= 100 * PAGE_BYTES and seen.held_bytes["disk"] <= 100 * PAGE_BYTES
        for stored, kept in held:
            assert torch.equal(store.get(stored), kept)
            store.free(stored)
        wait_for(lambda: not any(store.statistics().held_bytes.values()))
        assert store.statistics().peak_bytes["disk"] > 50 * PAGE_BYTES, "not much of a storm"


def test_into_every_other_row_of_a_batch(tmp_path: Path) -> None:
    """Rows of a batch are no contiguous target; fetched ahead or not, only they are written."""
    with small(tmp_path, test_seed=0) as store:
        for tier in ("host", "disk"):
            for ahead in (False, True):
                kept, whole = content(2 * 5000, 0).view(2, 10, 500), torch.zeros(2, 30, 500, dtype=torch.uint8)
                stored = store.put(tier, kept.clone())
                settled(store, stored)
                if ahead:
                    store.fetch(stored)
                store.get(stored, whole[:, 10:20])
                assert torch.equal(whole[:, 10:20], kept)
                assert not whole[:, :10].any() and not whole[:, 20:].any()
                store.free(stored)


def test_a_fetch_that_is_freed_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may use its memory as soon as `free` returns."""
    with small(tmp_path, host_bytes=0) as store:
        stored = store.put("disk", content(20 * PAGE_BYTES, 0))
        settled(store, stored)
        with gate(monkeypatch, "preadv") as reads:
            out = torch.zeros(20 * PAGE_BYTES, dtype=torch.uint8)
            store.fetch(stored, out)
            assert reads.reached.wait(10)
            threading.Timer(0.05, reads.open.set).start()
            store.free(stored)
            then = out.clone()
        assert not then[12 * PAGE_BYTES :].any(), "what had not begun was not cancelled"
        time.sleep(0.02)
        assert torch.equal(out, then)


def test_two_callers_at_once(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            for turn in range(60):
                kept = content(5 * PAGE_BYTES + turn, seed * 1000 + turn)
                stored = store.put("disk" if turn % 2 else "host", kept.clone())
                assert torch.equal(store.get(stored), kept)
                store.free(stored)
        except BaseException as error:
            errors.append(error)

    with small(tmp_path, test_seed=1) as store:
        callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not errors


def test_a_tensor_may_lie_in_several_pieces(tmp_path: Path) -> None:
    """Every other tensor freed: half of the bytes are free, no two pages of them together, and a large one fits."""
    for tier in ("host", "disk"):
        with small(tmp_path, host_bytes=32 * PAGE_BYTES, disk_bytes=32 * PAGE_BYTES, test_seed=3) as store:
            pages = [(kept := content(PAGE_BYTES, i), store.put(tier, kept.clone())) for i in range(32)]
            for _, stored in pages:
                settled(store, stored)
            for _, stored in pages[::2]:
                store.free(stored)
            large = content(16 * PAGE_BYTES - 5, 99)
            stored = store.put(tier, large.clone())
            settled(store, stored)
            assert torch.equal(store.get(stored), large)
            assert all(torch.equal(store.get(other), kept) for kept, other in pages[1::2])
            assert store.statistics().held_bytes[tier] == 32 * PAGE_BYTES


# In flight


class Gate:
    """Stands before a system call: `reached` when the first call has come, all go on when `open` is set."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()


@contextmanager
def gate(monkeypatch: pytest.MonkeyPatch, name: str, module: Any = os) -> Iterator[Gate]:
    """Calls of <module>.<name> wait until the gate opens, at the latest at the end of the block."""
    found, real = Gate(), getattr(module, name)

    def waiting(*arguments: Any) -> Any:
        found.reached.set()
        assert found.open.wait(20)
        return real(*arguments)

    monkeypatch.setattr(module, name, waiting)
    try:
        yield found
    finally:
        found.open.set()


@pytest.mark.parametrize("staged", [True, False])
def test_in_flight_is_handed_back_without_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: bool) -> None:
    kept = content(9 * PAGE_BYTES + 7, 0)
    original = kept.clone()
    with small(tmp_path, host_bytes=64 * PAGE_BYTES if staged else 0) as store:
        monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read from disk"))
        with gate(monkeypatch, "pwritev"):
            stored = store.put("disk", original, label="x")
            if staged:  # the device has its memory back, the bytes wait in the arena
                wait_for(lambda: store.statistics().held_bytes["device"] == 0)
                assert store.statistics().held_bytes["staging"] == 10 * PAGE_BYTES
            else:
                assert store.statistics().held_bytes["device"] == len(kept)
            assert stored.state is State.FILLING
            store.fetch(stored)
            found = store.get(stored)
            assert torch.equal(found, kept)
            assert (found.data_ptr() == original.data_ptr()) is not staged
            out = torch.empty_like(kept)
            assert store.get(stored, out) is out and torch.equal(out, kept)
        settled(store, stored)
        assert stored.state is State.READY
        assert store.statistics().held_bytes["staging"] == 0
        assert store.statistics().moved_bytes["disk_read"] == 0


def test_freeing_what_is_being_written_gives_pages_back_only_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small(tmp_path, disk_bytes=8 * PAGE_BYTES) as store, gate(monkeypatch, "pwritev") as writes:
        stored = store.put("disk", content(8 * PAGE_BYTES, 0))
        assert writes.reached.wait(10)
        store.free(stored)
        assert stored.state is State.FREE
        assert store.statistics().held_bytes["disk"] == 8 * PAGE_BYTES, "a worker still writes there"
        threading.Timer(0.05, writes.open.set).start()
        kept = content(8 * PAGE_BYTES, 1)
        second = store.put("disk", kept.clone())  # waits for the pages instead of refusing
        settled(store, second)
        assert torch.equal(store.get(second), kept)
        assert store.statistics().stall_s["disk_write"] > 0.01


def test_freeing_what_is_queued_gives_pages_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small(tmp_path, host_bytes=0, disk_threads=1) as store, gate(monkeypatch, "pwritev") as writes:
        store.put("disk", content(8 * PAGE_BYTES, 0))
        second = store.put("disk", content(8 * PAGE_BYTES, 1))
        assert writes.reached.wait(10)
        wait_for(lambda: len(second._writing) == 4)
        store.free(second)
        assert store.statistics().held_bytes == {
            "device": 8 * PAGE_BYTES,
            "host": 0,
            "staging": 0,
            "disk": 8 * PAGE_BYTES,
        }


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_is_fetched_for_the_last_time_leaves_its_pages_when_it_has_arrived(tmp_path: Path, tier: OffTier) -> None:
    kept = content(9 * PAGE_BYTES + 7, 0)
    with small(tmp_path, test_seed=0) as store:
        stored = store.put(tier, kept.clone(), label="x")
        store.drain()
        out = torch.empty_like(kept)
        store.fetch(stored, out, last=True)
        wait_for(lambda: not any(store.statistics().held_bytes.values()))
        assert torch.equal(store.get(stored, out), kept)
        with pytest.raises(AssertionError, match="had for the last time"):
            store.get(stored)
        store.free(stored)
        again = store.put(tier, kept.clone(), label="x")  # on its way out still, or not
        store.fetch(again, last=True)
        assert torch.equal(store.get(again), kept)
        wait_for(lambda: not any(store.statistics().held_bytes.values()))
        store.free(again)


def test_a_put_waits_for_staging_to_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small(tmp_path, host_bytes=8 * PAGE_BYTES) as store, gate(monkeypatch, "pwritev") as writes:
        store.put("disk", content(8 * PAGE_BYTES, 0))
        wait_for(lambda: store.statistics().held_bytes["staging"] == 8 * PAGE_BYTES)
        threading.Timer(0.05, writes.open.set).start()
        kept = content(8 * PAGE_BYTES, 1)
        assert torch.equal(store.get(store.put("host", kept.clone())), kept)


def test_a_layer_may_start_when_all_but_the_last_slots_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small(tmp_path, slots=2) as store, gate(monkeypatch, "pwritev") as writes:
        for layer in range(3):
            store.admit()
            store.admit()  # layers that store nothing do not count
            store.put("disk", content(PAGE_BYTES, layer))
            store.put("host", content(PAGE_BYTES, layer))
        assert store.statistics().stall_s["disk_write"] == 0
        threading.Timer(0.1, writes.open.set).start()
        store.admit()  # layer 0 is not on disk yet
        assert store.statistics().stall_s["disk_write"] > 0.05


@pytest.mark.parametrize("route", ["host", "staged", "disk"])
def test_writing_to_a_tensor_that_is_being_stored_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    with small(tmp_path, host_bytes=0 if route == "disk" else MIB) as store:
        with gate(monkeypatch, "copy", Cpu):
            tensor = content(64 * PAGE_BYTES, 0)
            stored = store.put("host" if route == "host" else "disk", tensor, label="layer 3 x")
            freed = store.put("host" if route == "host" else "disk", tensor, label="layer 4 x")
            tensor.add_(1)
            store.free(freed)  # of what is no longer wanted nobody needs to know
        with pytest.raises(OffloadFailed, match="layer 3 x was written to"):
            settled(store, stored)
            store.get(stored)


# The system fails


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, short = random.Random(0), {"pwritev": 0, "preadv": 0}

    def part_of(name: str) -> None:
        real = getattr(os, name)

        def partial_call(file: int, views: list[memoryview], offset: int) -> int:
            kind = rng.randrange(4)
            if kind == 0:
                raise InterruptedError
            whole = len(views[0])
            pages = max(whole // 2 // PAGE_BYTES, 1) * PAGE_BYTES if kind < 3 else whole
            moved = int(real(file, [views[0][:pages]], offset))
            short[name] += moved < whole
            return max(moved - rng.randrange(PAGE_BYTES), 1) if kind == 1 else moved

        monkeypatch.setattr(os, name, partial_call)

    with small(tmp_path, chunk_bytes=16 * PAGE_BYTES, checksum=True) as store:
        part_of("pwritev")
        part_of("preadv")
        for size in (1, 3 * PAGE_BYTES, 70 * PAGE_BYTES + 13, 100 * PAGE_BYTES):
            kept = content(size, size)
            stored = store.put("disk", kept.clone())
            settled(store, stored)
            assert torch.equal(store.get(stored), kept)
            store.free(stored)
    assert min(short.values()) > 5


@pytest.mark.parametrize("name", ["pwritev", "preadv"])
def test_a_disk_that_makes_no_progress_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with small(tmp_path) as store:
        monkeypatch.setattr(os, name, lambda *_: 0)
        stored = store.put("disk", content(PAGE_BYTES, 0))
        with pytest.raises(OffloadFailed, match="disk tier cannot be") as caught:
            settled(store, stored)
            store.get(stored)
        assert "no progress" in four_lines(caught.value)


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")])
def test_the_callers_next_call_says_what_the_disk_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    calls = 0

    def third_fails(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(code, os.strerror(code))
        return int(real(*arguments))

    store, real = small(tmp_path, test_seed=0), os.pwritev
    monkeypatch.setattr(os, "pwritev", third_fails)
    stored = store.put("disk", content(20 * PAGE_BYTES, 0))
    settled(store, stored)
    callers: list[Callable[[], object]] = [
        lambda: store.put("host", torch.ones(3)), lambda: store.fetch(stored), lambda: store.get(stored), store.admit,
    ]  # fmt: skip
    for caller in callers:
        with pytest.raises(OffloadFailed) as caught:
            caller()
        text = four_lines(caught.value)
        free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        assert says in text and str(tmp_path) in text and f"{2 * PAGE_BYTES} bytes wanted" in text
        assert abs(int(text.split(" bytes free")[0].split()[-1]) - free_bytes) < 2**30
        assert isinstance(caught.value.__cause__, OSError)
    store.free(stored)
    store.close()
    store.close()


def test_the_kernel_refuses_in_the_middle(tmp_path: Path) -> None:
    """A real refusal: the file size limit is lowered below the file's end after it was opened."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with small(tmp_path) as store:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 * PAGE_BYTES, old[1]))
            stored = store.put("disk", content(32 * PAGE_BYTES, 0), label="o/7")
            settled(store, stored)
            with pytest.raises(OffloadFailed, match="the disk is full") as caught:
                store.get(stored)
            assert "EFBIG" in four_lines(caught.value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_is_too_small_is_refused_at_the_start(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    wanted = (status.f_bavail + 2**20) * status.f_frsize
    with pytest.raises(DoesNotFit) as caught:
        small(tmp_path, disk_bytes=wanted)
    assert str(wanted) in four_lines(caught.value) and "bytes are free" in str(caught.value)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, old[1]))
        with pytest.raises(DoesNotFit, match="does not fit") as caught:
            small(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "File too large" in four_lines(caught.value)


def test_a_folder_that_cannot_be_written_is_refused_at_the_start() -> None:
    with pytest.raises(OffloadFailed, match="cannot be opened") as caught:
        small(Path("/proc/self/nowhere"))
    assert "/proc/self/nowhere" in four_lines(caught.value)


@pytest.mark.parametrize("checksum", [True, False])
def test_a_flipped_bit(tmp_path: Path, checksum: bool) -> None:
    kept = content(6 * PAGE_BYTES + 100, 0)
    with small(tmp_path, checksum=checksum) as store:
        stored = store.put("disk", kept.clone(), label="layer 5 o")
        settled(store, stored)
        position = stored._place[0].start + 5 * PAGE_BYTES + 17
        (path,) = offload_files()
        with open(path, "r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, position)[0]
            assert byte == kept[5 * PAGE_BYTES + 17]
            os.pwrite(file.fileno(), bytes([byte ^ 4]), position)
        if not checksum:
            assert (store.get(stored) != kept).nonzero().tolist() == [[5 * PAGE_BYTES + 17]]
            return
        with pytest.raises(Corrupted) as caught:
            store.get(stored)
        assert "layer 5 o" in four_lines(caught.value) and f"byte {4 * PAGE_BYTES} of the tensor" in str(caught.value)


def test_a_defect_of_a_worker_is_told_and_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise ZeroDivisionError("broken")

    with small(tmp_path, test_seed=0) as store:
        stored = store.put("disk", content(20 * PAGE_BYTES, 0))
        settled(store, stored)
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(OffloadFailed, match="a worker of the offload store failed") as caught:
            store.get(stored)
        assert "ZeroDivisionError: broken" in four_lines(caught.value)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not offload_threads()


def test_close_tells_what_nobody_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = small(tmp_path)
    monkeypatch.setattr(os, "pwritev", lambda *_: 1 // 0)
    settled(store, store.put("disk", content(20 * PAGE_BYTES, 0)))
    with pytest.raises(OffloadFailed, match="worker"):
        store.close()
    assert not offload_threads() and not offload_files() and store._arena._map.closed
    store.close()


def test_an_exception_of_the_caller_releases_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of everything: stores queued, being written and being fetched."""
    with pytest.raises(RuntimeError, match="backward failed"), small(tmp_path, host_bytes=512 * PAGE_BYTES) as store:
        ready = [store.put("disk", content(8 * PAGE_BYTES, i)) for i in range(4)]
        for stored in ready:
            settled(store, stored)
        with gate(monkeypatch, "pwritev") as writes:
            threading.Timer(0.05, writes.open.set).start()
            for turn in range(8):
                store.put("disk" if turn % 2 else "host", content(9 * PAGE_BYTES, turn))
            for stored in ready:
                store.fetch(stored)
            raise RuntimeError("backward failed")
    assert store._arena._map.closed and not store._live
    assert not any(store._held_bytes().values())
    with pytest.raises(AssertionError, match="closed"):
        store.put("host", torch.ones(3))


KILLED = """
import sys, torch
from pathlib import Path
from farspan.memory.tiers import Store
store = Store(host_bytes=0, disk_dir=Path(sys.argv[1]), disk_bytes=2**29)
tensor = torch.zeros(2**28, dtype=torch.uint8)
for turn in range(10**6):
    stored = store.put("disk", tensor)
    print("writing", flush=True)
    while stored._writing: pass
    store.free(stored)
"""


def test_kill_9_in_the_middle_of_a_write_leaves_nothing(tmp_path: Path) -> None:
    def free_bytes() -> int:
        return os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize

    before = free_bytes()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "infra/py"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        while process.stdout.readline() and len(list(tmp_path.iterdir())):
            pass
        assert not list(tmp_path.iterdir()), "the file has a name"
        assert free_bytes() < before - 2**28, "nothing was preallocated"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
    wait_for(lambda: free_bytes() > before - 2**28)


# Memory, accounts, fall-backs


def test_the_host_tier_is_a_hard_cap(tmp_path: Path) -> None:
    with small(tmp_path, host_bytes=4 * PAGE_BYTES, disk_bytes=4 * PAGE_BYTES) as store:
        for tier in ("host", "disk"):
            stored = store.put(tier, content(4 * PAGE_BYTES, 0))
            settled(store, stored)
            with pytest.raises(DoesNotFit, match=f"the {tier} tier is full") as caught:
                store.put(tier, content(1, 0), label="x/1")
            assert f"{PAGE_BYTES} bytes wanted, 0 of {4 * PAGE_BYTES} free" in four_lines(caught.value)
            store.free(stored)
            store.free(store.put(tier, content(4 * PAGE_BYTES, 0)))
            wait_for(lambda tier=tier: store.statistics().held_bytes[tier] == 0)  # type: ignore[misc]


def test_an_arena_the_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="cannot be reserved") as caught:
        small(tmp_path, host_bytes=2**56)
    four_lines(caught.value)


def test_the_arena_is_no_torch_allocation_and_freed_pages_are_poisoned(tmp_path: Path) -> None:
    tensor = torch.ones(5000)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        small(tmp_path, test_seed=0, prefault=True) as store,
    ):
        stored = store.put("host", tensor)
        settled(store, stored)
        (extent,) = stored._place
        lying = store._arena.tensor(extent)[:20000].view(torch.float32)
        assert torch.equal(lying, tensor)
        store.free(stored)
        assert lying.isnan().all()
        del lying
    allocated = sum(max(event.cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 20000, "only the comparison's own booleans"


def test_statistics_add_up(tmp_path: Path) -> None:
    sizes = {"host": 3 * PAGE_BYTES + 1, "disk": 10 * PAGE_BYTES + 1}
    with small(tmp_path) as store:
        stored = {tier: store.put(tier, content(size, 0), label=tier) for tier, size in sizes.items()}  # type: ignore[arg-type]
        for one in stored.values():
            settled(store, one)
            store.get(one)
        seen = store.statistics(restart=True)
        assert seen.held_bytes == {"device": 0, "host": 4 * PAGE_BYTES, "staging": 0, "disk": 11 * PAGE_BYTES}
        assert seen.peak_bytes["host"] == 15 * PAGE_BYTES and seen.peak_bytes["staging"] == 11 * PAGE_BYTES
        assert seen.moved_bytes == {
            "copy_out": sum(sizes.values()), "disk_write": sizes["disk"], "disk_read": sizes["disk"],
            "copy_in": sizes["host"],
        }  # fmt: skip
        for lane, moved in seen.moved_bytes.items():
            work = [interval for interval in seen.intervals if interval.lane == lane]
            assert sum(interval.bytes for interval in work) == moved
            assert sum(interval.end_s - interval.start_s for interval in work) == pytest.approx(seen.busy_s[lane])
        assert {interval.label for interval in seen.intervals} == {"host", "disk"}
        after = store.statistics()
        assert not after.intervals and not sum(after.moved_bytes.values())
        assert after.peak_bytes == after.held_bytes == seen.held_bytes


@pytest.mark.parametrize("at", ["switch", "first transfer"])
def test_without_o_direct_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    real_fcntl, real_write, files = fcntl.fcntl, os.pwritev, set()

    def no_switch(file: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            files.add(file)
            if at == "switch":
                raise OSError(errno.EINVAL, "no")
        return real_fcntl(file, command, argument)

    def no_write(file: int, views: list[Any], offset: int) -> int:
        if real_fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real_write(file, views, offset)

    monkeypatch.setattr(fcntl, "fcntl", no_switch)
    if at == "first transfer":
        monkeypatch.setattr(os, "pwritev", no_write)
    with small(tmp_path, checksum=True) as store:
        (file,) = files
        assert not real_fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
        (record,) = caplog.records
        assert "no O_DIRECT" in record.getMessage() and str(tmp_path) in record.getMessage()
        kept = content(9 * PAGE_BYTES + 3, 0)
        stored = store.put("disk", kept.clone())
        settled(store, stored)
        assert torch.equal(store.get(stored), kept)


@pytest.mark.parametrize("folder", ["tmp_path", "/dev/shm"])
def test_the_file_is_preallocated_on_disk_and_in_memory_file_systems(tmp_path: Path, folder: str) -> None:
    path = tmp_path / "made" if folder == "tmp_path" else Path(folder) / f"farspan-test-{os.getpid()}"
    try:
        with small(path, disk_bytes=32 * MIB) as store:
            (file,) = offload_files()
            assert Path(file).stat().st_blocks * 512 >= 32 * MIB
            assert Path(file).stat().st_nlink == 0 and not list(path.iterdir())
            kept = content(MIB, 0)
            stored = store.put("disk", kept.clone())
            settled(store, stored)
            assert torch.equal(store.get(stored), kept)
    finally:
        path.rmdir()


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """By the command a user types; its numbers are not judged here."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "infra/py")}
    out = tmp_path / "disk.json"
    command = [
        sys.executable,
        "-m",
        "farspan.jobs",
        "bench",
        "disk",
        "--toy",
        "--folder",
        str(tmp_path),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text())["cells"]
    assert cells.keys() == {"tier", "staged", "checksum"} and {"plain", "tier"} <= cells["tier"].keys()
    assert "| tier | tier |" in out.with_suffix(".md").read_text()
    for path in (out, out.with_suffix(".md")):
        path.unlink()
