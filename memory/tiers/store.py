"""Takes tensors to host memory or disk and brings them back, on its own threads.

A tensor for the host is copied into the arena. One for the disk is copied into the arena too (staging) and written from
there, so that the device has its memory back at the speed of a copy; where the arena has no room for it, the tensor
itself stays until its chunks have gone through bounce buffers. Reading always goes through bounce buffers. While a
tensor is on its way out it is in memory, and whoever wants it back gets it from there without a read (SSDTrain,
https://arxiv.org/abs/2408.10013, calls it forwarding).

One lock guards all bookkeeping; data moves outside it. `free` and `close` work after any failure. The device's memory
is copied by `memory.tiers.device`; where the device runs behind the caller (CUDA), each transfer begins when the device
has come to the point where it was asked for.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from farspan.errors import DoesNotFit, FarspanError
from farspan.memory.tiers.base import Lane, OffTier, Statistics, Stored
from farspan.memory.tiers.device import Device, device_of
from farspan.memory.tiers.disk import DiskFile, chunks_of
from farspan.memory.tiers.host import Arena
from farspan.memory.tiers.lanes import Lanes
from farspan.memory.tiers.ledger import Ledger
from farspan.memory.tiers.space import PAGE_BYTES, Extent, Space, whole_pages
from farspan.memory.tiers.transfer import Transfer, flat_bytes

CHUNK_BYTES = 8 * 2**20
DISK_THREADS = 4


class Store:
    """The tiers of one process. `with` closes it.

    Args:
        host_bytes: capacity of the host tier, staging included; reserved here. Bounce buffers come on top, see
            `bounce_bytes`.
        disk_dir: folder of the disk tier's file; None for no disk tier.
        disk_bytes: capacity of the disk tier; preallocated here.
        checksum: verify what is read from disk.
        slots: layers whose stores may be under way when another layer starts, see `admit`.
        chunk_bytes: bytes per I/O call, whole pages.
        disk_threads: threads each for writing and for reading.
        prefault: touch the whole arena now and not when it is first used.
        device: where tensors come from and go back to, default the CPU. For a CUDA device host memory is page-locked.
        test_seed: for tests: delay every worker at random and fill memory with 0xFF (NaN) when it is given up.

    Raises:
        DoesNotFit: host memory cannot be reserved, or the disk has less free.
        OffloadFailed: the folder cannot be written.
    """

    def __init__(
        self,
        *,
        host_bytes: int,
        disk_dir: Path | None = None,
        disk_bytes: int = 0,
        checksum: bool = False,
        slots: int = 2,
        chunk_bytes: int = CHUNK_BYTES,
        disk_threads: int = DISK_THREADS,
        prefault: bool = False,
        device: Device | torch.device | None = None,
        test_seed: int | None = None,
    ) -> None:
        assert chunk_bytes > 0 and chunk_bytes % PAGE_BYTES == 0, chunk_bytes
        if device is None or isinstance(device, torch.device):
            device = device_of(device or torch.device("cpu"))
        self._device = device
        self._slots, self._chunk_bytes, self._testing = slots, chunk_bytes, test_seed is not None
        self.bounce_bytes = 0 if disk_dir is None else 2 * disk_threads * chunk_bytes
        """Host memory beside `host_bytes`, for good."""
        self._file = None if disk_dir is None else DiskFile(disk_dir, disk_bytes, checksum=checksum)
        try:
            self._arena = Arena(host_bytes, self.bounce_bytes, prefault=prefault, device=device)
        except FarspanError:
            if self._file is not None:
                self._file.close()
            raise
        self._transfer = Transfer(self._arena, self._file, device, chunk_bytes=chunk_bytes, poison=self._testing)
        self._ledger = Ledger()
        chaos = random.Random(test_seed) if self._testing else None
        self._lanes = Lanes(self._settle, self._ledger, device.stopwatch, disk_threads=disk_threads, chaos=chaos)
        self._lock = self._lanes.changed
        self._live: set[Stored] = set()
        self._group, self._group_size = 0, 0
        self._unfinished: dict[int, int] = {}
        """Stores under way by group; a group is what was put between two calls of `admit`."""
        self._device_bytes = self._staging_bytes = 0
        self._landed: list[Tensor] = []
        """Originals that have been copied, until the caller's thread lets them go in its next call: a layer's start, as
        a plan assumes; and the only thread whose allocations a profiler sees."""
        self._ledger.restart(self._held_bytes())

    def admit(self) -> None:
        """A layer may start: waits until all but the last `slots` layers that stored anything have done so.

        Raises:
            OffloadFailed: a worker failed.
        """
        with self._lock:
            self._enter()
            if self._group_size:
                self._group, self._group_size = self._group + 1, 0
            while min(self._unfinished, default=self._group) < self._group - self._slots:
                copying = any(job.lane == "copy_out" for stored in self._live for job in stored._writing)
                self._lanes.wait("copy_out" if copying else "disk_write")
            self._landed.clear()

    @property
    def device(self) -> torch.device:
        """Where tensors come from."""
        return self._device.torch_device

    @property
    def arena_address(self) -> int:
        """Of the host arena's first byte: a tensor's storage, but no memory of torch's allocator."""
        return self._arena.tensor(Extent(0, 0)).untyped_storage().data_ptr()

    def let_go(self) -> None:
        """Release the originals of what has been copied; every other call does so too."""
        with self._lock:
            self._landed.clear()

    def drain(self) -> None:
        """Wait until everything has been stored.

        Raises:
            OffloadFailed: a worker failed.
        """
        with self._lock:
            self._enter()
            while any(stored._writing for stored in self._live):
                self._lanes.wait("disk_write")
            self._landed.clear()

    def finish(self, stored: Stored) -> None:
        """Wait until one tensor has been stored, which is no stall but part of the plan; its original is let go.

        Raises:
            OffloadFailed: a worker failed.
        """
        with self._lock:
            self._enter()
            while stored._writing:
                self._lanes.wait(None)
            self._landed.clear()

    def put(self, tier: OffTier, tensor: Tensor, *, label: str = "") -> Stored:
        """Store a contiguous tensor; returns at once. The tensor must not be written to until it has been copied.

        Waits only when the room it needs is about to come free: staging, or what was freed while being written.

        Raises:
            DoesNotFit: the tier has not so many bytes free.
            OffloadFailed: a worker failed, now or since the last call.
        """
        assert tensor.device == self._device.torch_device, (label, tensor.device)
        assert tensor.layout == torch.strided and tensor.is_contiguous(), (label, tensor.layout, tensor.stride())
        size_bytes = tensor.numel() * tensor.element_size()
        with self._lock:
            self._enter()
            place = self._take(tier, size_bytes, label)
            stored = Stored(
                label, tier, tensor.shape, tensor.dtype, size_bytes, _group=self._group, _original=tensor.detach(),
                _version=-1 if tensor.is_inference() else tensor._version, _place=place,
                _chunks=chunks_of(size_bytes, place, self._chunk_bytes) if tier == "disk" else (),
            )  # fmt: skip
            self._live.add(stored)
            self._group_size += 1
            self._unfinished[self._group] = self._unfinished.get(self._group, 0) + 1
            self._device_bytes += size_bytes
            if size_bytes:
                made = self._device.mark()
                to_host = partial(self._transfer.copy_out, stored, place)
                run = to_host if tier == "host" else partial(self._stage, stored)
                self._lanes.submit("copy_out", stored, stored._writing, run, size_bytes, made)
            self._settle(stored)
        return stored

    def fetch(self, stored: Stored, out: Tensor | None = None, *, last: bool = False) -> None:
        """Start bringing a tensor back, into `out` (contiguous, of its shape and dtype) or memory allocated here.

        Does nothing when that was done already. What is still on its way out is not read back. With `last` its pages
        are given up when it has arrived: it can be had once more, by the next `get`.

        Raises:
            OffloadFailed: a worker failed.
        """
        with self._lock:
            self._enter()
            assert not stored._freed, stored.label
            if stored._out is not None:
                return
            assert not stored._last, f"{stored.label}: had for the last time"
            stored._last = last
            original = stored._original
            if original is not None and out is None:
                stored._out = original
                return
            into = self._empty(stored) if out is None else out.detach()
            assert into.is_contiguous() and (into.shape, into.dtype) == (stored.shape, stored.dtype), stored.label
            stored._out = into
            if original is None:
                self._bring(stored, into)
        if original is not None:
            into.copy_(original)
            if last:
                with self._lock:
                    self._settle(stored)

    def get(self, stored: Stored, out: Tensor | None = None, *, stall: bool = True) -> Tensor:
        """The tensor: waits for `fetch`, and starts it if need be. With `out` (any strides), that is where it is.

        It is the very tensor that was stored if that is still on its way out. The store keeps its copy until `free`, so
        it can be had again, unless it was fetched for the last time. With `stall=False` waiting is not counted as a
        stall: nothing was to have been fetched ahead.

        Raises:
            OffloadFailed: a worker failed.
            Corrupted: the checksum does not fit.
        """
        self.fetch(stored, out if out is not None and out.is_contiguous() else None)
        with self._lock:
            while stored._reading:
                lane: Lane = "copy_in" if stored.tier == "host" else "disk_read"
                self._lanes.wait(lane if stall else None)
            self._lanes.check()
            found, stored._out = stored._out, None
        assert found is not None, f"{stored.label}: two threads wait for one tensor"
        if out is None:
            return found
        if found.data_ptr() != out.data_ptr():
            out.detach().copy_(found)
        return out

    def free(self, stored: Stored) -> None:
        """Forget a tensor; its pages can be used again. Cancels what has not begun, and waits for a read under way,
        since that writes into memory of the caller's. Never raises a worker's error; may be called twice."""
        with self._lock:
            self._landed.clear()
            if stored._freed:
                return
            stored._freed = True
            self._lanes.cancel(stored)
            while stored._reading:
                self._lock.wait()
            self._settle(stored)

    def statistics(self, *, restart: bool = False) -> Statistics:
        """What is held, and what was done since the last restart; `restart` begins counting (and peaks) anew."""
        with self._lock:
            self._landed.clear()
            found = self._ledger.read(self._held_bytes())
            if restart:
                self._ledger.restart(self._held_bytes())
            return found

    def close(self) -> None:
        """Stop the threads, give back memory and disk. May be called twice.

        Raises:
            OffloadFailed: a worker failed and no call has said so yet. All is given back even so.
        """
        with self._lock:
            if self._lanes.closed:
                return
            self._lanes.closed = True
            self._lock.notify_all()
        self._lanes.join()
        with self._lock:
            for stored in list(self._live):
                stored._freed = True
                stored._writing.clear()
                stored._reading.clear()
                self._settle(stored)
            self._landed.clear()
        self._arena.close()
        if self._file is not None:
            self._file.close()
        if (failure := self._lanes.unheard()) is not None:
            raise failure

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _enter(self) -> None:
        """What every call begins with, with the lock held."""
        self._landed.clear()
        self._lanes.check()

    def _stage(self, stored: Stored) -> None:
        """In a worker: copy to staging if the arena has room in one piece; then, or if not, queue the writes."""
        with self._lock:
            room = self._arena.space.take(stored.bytes, split=False)
            if room is not None:
                stored._staging = room[0]
                self._staging_bytes += room[0].bytes
                self._ledger.held(self._held_bytes())
        if room is not None:
            self._transfer.copy_out(stored, room)
        with self._lock:
            if room is not None:
                self._drop_original(stored)
            if not stored._freed:
                for index, chunk in enumerate(stored._chunks):
                    run = partial(self._transfer.write, stored, index)
                    self._lanes.submit("disk_write", stored, stored._writing, run, chunk.bytes)

    def _bring(self, stored: Stored, into: Tensor) -> None:
        """Queue what fills `into`, with the lock held."""
        if self._testing:
            flat_bytes(into).fill_(0xFF)  # so that bytes nobody brought are seen
        released = self._device.mark()  # by whatever used this memory before
        if stored.tier == "host" or stored._staging is not None:
            place = stored._place if stored._staging is None else (stored._staging,)
            run = partial(self._transfer.copy_in, place, into)
            self._lanes.submit("copy_in", stored, stored._reading, run, stored.bytes, released)
            return
        for index, chunk in enumerate(stored._chunks):
            run = partial(self._transfer.read, stored, index, into)
            self._lanes.submit("disk_read", stored, stored._reading, run, chunk.bytes, released)

    def _settle(self, stored: Stored) -> None:
        """Give up what a tensor no longer needs, with the lock held."""
        if stored._writing:
            return
        self._drop_original(stored)
        if stored._group is not None:
            self._unfinished[stored._group] -= 1
            if not self._unfinished[stored._group]:
                del self._unfinished[stored._group]
            stored._group = None
        if stored._staging is not None and not stored._reading:
            self._transfer.spoil((stored._staging,))
            self._arena.space.release((stored._staging,))
            self._staging_bytes -= stored._staging.bytes
            stored._staging = None
        if (stored._freed or stored._last) and not stored._reading and stored._place:
            if stored.tier == "host":
                self._transfer.spoil(stored._place)
            self._space(stored.tier).release(stored._place)
            stored._place = ()
        if stored._freed and not stored._reading and stored in self._live:
            self._live.remove(stored)
            stored._out = None
        self._ledger.held(self._held_bytes())
        self._lock.notify_all()

    def _take(self, tier: OffTier, size_bytes: int, label: str) -> tuple[Extent, ...]:
        """Pages of a tier, waiting for those that come free without the caller's doing."""
        space = self._space(tier)
        while (place := space.take(size_bytes)) is None:
            leaving = any(stored._freed and stored.tier == tier for stored in self._live)
            if not leaving and not (tier == "host" and self._staging_bytes):
                raise DoesNotFit(
                    f"the {tier} tier is full",
                    at=label or "a tensor",
                    why=f"{whole_pages(size_bytes)} bytes wanted, {space.free_bytes} of {space.total_bytes} free",
                    try_=f"a larger {tier} budget, a shorter context, or a plan that stores less there",
                )
            self._lanes.wait("disk_write")
        return place

    def _drop_original(self, stored: Stored) -> None:
        if stored._original is not None:
            self._landed.append(stored._original)
            stored._original = None
            self._device_bytes -= stored.bytes

    def _empty(self, stored: Stored) -> Tensor:
        return torch.empty(stored.shape, dtype=stored.dtype, device=self._device.torch_device)

    def _space(self, tier: OffTier) -> Space:
        if tier == "host":
            return self._arena.space
        assert self._file is not None, "this store has no disk tier"
        return self._file.space

    def _held_bytes(self) -> dict[str, int]:
        return {
            "device": self._device_bytes,
            "host": self._arena.space.used_bytes,
            "staging": self._staging_bytes,
            "disk": 0 if self._file is None else self._file.space.used_bytes,
        }
