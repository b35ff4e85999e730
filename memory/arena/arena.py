"""Python's side of the planned allocator."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from farspan.errors import JobError
from farspan.memory.addresses import Block, Piece, TwoLevels, pack_in_pieces

SOURCE = Path(__file__).with_name("arena.cpp")
ALIGN = 512


class ArenaStatistics(NamedTuple):
    """Bytes now and at most since the last restart; requests of steps since then."""

    live_bytes: int
    peak_live_bytes: int
    reserved_bytes: int
    peak_reserved_bytes: int
    arena_bytes: int
    """Of what is reserved, for planned addresses."""
    on_plan: int
    off_plan: int
    """Requests that were not the planned one."""
    occupied: int
    """Requests whose planned place was taken still."""


@dataclass(frozen=True)
class Trace:
    """What one step asked for."""

    blocks: tuple[Block, ...]
    """In order; moments are indices of events."""
    pieces: tuple[Piece, ...]
    """Stretches between two cuts."""


def build(folder: Path) -> Path:
    """Compile the allocator once for this version of it; returns the library.

    Raises:
        JobError: there is no C++ compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"farspan-arena-{digest}.so"
    if library.exists():
        return library
    if compiler is None:
        raise _unbuilt("there is no C++ compiler on this machine's path")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f".{library.name}.{os.getpid()}"
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", str(SOURCE), "-o", str(made), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise _unbuilt(" ".join(done.stderr.split())[:600])
    made.replace(library)  # several ranks may build at once
    return library


def _unbuilt(why: str) -> JobError:
    return JobError(
        "the allocator for planned addresses cannot be built",
        at="memory.addresses",
        why=why,
        try_="install g++, or --set memory.addresses=torch",
    )


class Arena:
    """The allocator of this process, loaded from a library that `build` made.

    Args:
        library: made by `build`.
        cuda: take the place of torch's allocator for CUDA, which must not have been used yet; otherwise stand on malloc
            and serve `malloc` and `free` below, for tests.
    """

    def __init__(self, library: Path, *, cuda: bool) -> None:
        self._calls = ctypes.CDLL(str(library))
        self._declare()
        self._calls.farspan_start(int(cuda))
        self.trace: Trace | None = None
        self.layout: TwoLevels | None = None
        if cuda:
            self._take_over(library)

    @contextmanager
    def record(self, stream: int = 0) -> Iterator[None]:
        """Write down what a step asks for on a stream (address of the CUDA stream; 0: the default one)."""
        self._calls.farspan_record(1, stream)
        try:
            yield
        finally:
            self._calls.farspan_record(0, stream)
            count = self._calls.farspan_events(None, 0)
            events = (ctypes.c_int64 * count)()
            self._calls.farspan_events(events, count)
            self.trace = trace_of(list(events))

    def cut(self) -> None:
        """A piece of work begins, a layer say: blocks that live within one piece are packed by themselves first."""
        self._calls.farspan_cut()

    def plan(self) -> TwoLevels:
        """Pack what was recorded and reserve the memory for it. Call it between steps.

        Raises:
            JobError: the memory for it is not there.
        """
        assert self.trace is not None, "nothing was recorded"
        blocks = self.trace.blocks
        self.layout = pack_in_pieces(blocks, self.trace.pieces, align=ALIGN)
        sizes = (ctypes.c_int64 * len(blocks))(*(block.bytes for block in blocks))
        offsets = (ctypes.c_int64 * len(blocks))(*self.layout.offsets)
        failed = self._calls.farspan_plan(sizes, offsets, len(blocks), self.layout.peak_bytes)
        assert failed != 1, "blocks of a planned step are still alive"
        if failed:
            raise JobError(
                "planned addresses do not fit beside what is in memory",
                at="memory.addresses",
                why=f"{self.layout.peak_bytes} bytes wanted in one piece",
                try_="--set memory.addresses=torch",
            )
        return self.layout

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, requests get their planned addresses."""
        self._calls.farspan_step(1)
        try:
            yield
        finally:
            self._calls.farspan_step(0)

    def statistics(self, *, restart: bool = False) -> ArenaStatistics:
        values = (ctypes.c_int64 * len(ArenaStatistics._fields))()
        self._calls.farspan_statistics(values, int(restart))
        return ArenaStatistics(*values)

    def malloc(self, size_bytes: int, stream: int = 0) -> int | None:
        """As torch calls it; None when memory is out."""
        address: int | None = self._calls.farspan_try_malloc(size_bytes, stream)
        return address

    def free(self, address: int) -> None:
        self._calls.farspan_free(address, 0, 0, None)

    def record_stream(self, address: int, stream: int) -> None:
        self._calls.farspan_record_stream(address, stream)

    def give_up(self) -> None:
        """Give segments in which nothing lives back to the device."""
        self._calls.farspan_give_up()

    def _declare(self) -> None:
        size, pointer, number = ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_int
        numbers = ctypes.POINTER(ctypes.c_int64)
        for name, result, arguments in (
            ("start", None, [number]),
            ("try_malloc", pointer, [size, pointer]),
            ("free", None, [pointer, size, number, pointer]),
            ("record_stream", None, [pointer, pointer]),
            ("record", None, [number, pointer]),
            ("cut", None, []),
            ("events", ctypes.c_size_t, [numbers, ctypes.c_size_t]),
            ("plan", number, [numbers, numbers, ctypes.c_size_t, ctypes.c_size_t]),
            ("step", None, [number]),
            ("give_up", None, []),
            ("statistics", None, [numbers, number]),
        ):
            function: Any = getattr(self._calls, f"farspan_{name}")
            function.restype, function.argtypes = result, arguments

    def _take_over(self, library: Path) -> None:
        import torch

        allocator = torch.cuda.memory.CUDAPluggableAllocator(str(library), "farspan_malloc", "farspan_free")
        told: Any = self._calls.farspan_record_stream
        address = ctypes.cast(told, ctypes.c_void_p).value
        allocator.allocator().set_record_stream_fn(address)
        torch.cuda.memory.change_current_allocator(allocator)


def trace_of(events: list[int]) -> Trace:
    """Of the allocator's record: a positive number is a block of so many bytes, -1 - n the release of the n-th block,
    0 a cut."""
    blocks: list[Block] = []
    cuts: list[int] = []
    for moment, event in enumerate(events):
        if event > 0:
            blocks.append(Block(moment, len(events), event))
        elif event == 0:
            cuts.append(moment)
        else:
            blocks[-1 - event] = blocks[-1 - event]._replace(end=moment)
    bounds = [*cuts, len(events)]
    return Trace(tuple(blocks), tuple(Piece(start, end) for start, end in pairwise(bounds)))
