"""The disk tier: one preallocated file without a name, read and written in large aligned pieces.

O_DIRECT, since the page cache would take the memory that offloading is to free; file systems that refuse it are used
through the cache, which is flushed and dropped after every call, and the log says so. The file is unlinked as soon as
it is open: whatever ends the process, the space comes back. It is preallocated: a full disk shows at the start and not
in the middle of a step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import xxhash

from farspan.errors import DoesNotFit, FarspanError
from farspan.memory.tiers.base import Chunk, Corrupted, OffloadFailed
from farspan.memory.tiers.space import PAGE_BYTES, Extent, Space, whole_pages

_log = logging.getLogger(__name__)
_REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIES = 16
"""Calls that move less than a page before a transfer is given up."""


class DiskFile:
    """A file of `capacity_bytes` in `folder` (made if missing), allocated from by `space`.

    Raises:
        DoesNotFit: the file system has not so much free.
        OffloadFailed: the folder cannot be written.
    """

    def __init__(self, folder: Path, capacity_bytes: int, *, checksum: bool = False) -> None:
        self.space = Space(capacity_bytes)
        self.folder, self.checksum = folder, checksum
        self._file = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free_bytes = self._free_bytes()
            if free_bytes < self.space.total_bytes:
                raise self._does_not_fit(f"{free_bytes} bytes are free")
            self._file, name = tempfile.mkstemp(prefix="farspan-offload-", dir=folder)
            Path(name).unlink()
            if self.space.total_bytes:
                os.posix_fallocate(self._file, 0, self.space.total_bytes)
            self.direct = self._try_direct()
        except OSError as error:
            self.close()
            if error.errno in _FULL:
                raise self._does_not_fit(f"the system says: {error.strerror}") from error
            raise self._failed("opened", error, self.space.total_bytes) from error
        except FarspanError:
            self.close()
            raise
        if not self.direct:
            _log.warning("%s: no O_DIRECT on this file system; the disk tier goes through the page cache", folder)

    def write(self, chunk: Chunk, view: memoryview) -> int | None:
        """Write a chunk; `view` holds its bytes, filled up to whole pages. Returns the checksum when there is one.

        Raises:
            OffloadFailed: the disk is full or broken.
        """
        digest = self._digest(chunk, view)
        self._move(os.pwritev, view, chunk.offset, "written")
        return digest

    def read(self, chunk: Chunk, view: memoryview, digest: int | None, label: str) -> None:
        """Read a chunk into `view`, whole pages.

        Raises:
            OffloadFailed: the disk is broken.
            Corrupted: the checksum is not the one `write` returned; the error names `label`.
        """
        self._move(os.preadv, view, chunk.offset, "read")
        found = self._digest(chunk, view)
        if found != digest:
            raise Corrupted(
                f"the disk gave back other bytes than were written of {label or 'a tensor'}",
                at=f"{self.folder} (unlinked file), offset {chunk.offset}, byte {chunk.start} of the tensor",
                why=f"the checksum of {chunk.bytes} bytes was {digest:016x} when written and is {found:016x} now",
                try_="offload to another drive, and test the memory and the drive of this machine",
            )

    def close(self) -> None:
        """Give the space back. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _digest(self, chunk: Chunk, view: memoryview) -> int | None:
        return xxhash.xxh3_64_intdigest(view[: chunk.bytes]) if self.checksum else None

    def _move(self, call: Callable[..., int], view: memoryview, offset: int, verb: str) -> None:
        """Short transfers go on from the last whole page: O_DIRECT takes no other offset."""
        done, idle = 0, 0
        try:
            while done < len(view):
                with contextlib.suppress(InterruptedError):
                    moved = call(self._file, [view[done:]], offset + done) // PAGE_BYTES * PAGE_BYTES
                    done, idle = done + moved, 0 if moved else idle + 1
                if idle == _TRIES:
                    raise OSError(errno.EIO, f"no progress at byte {offset + done}")
            if not self.direct:
                if verb == "written":
                    os.fdatasync(self._file)  # only clean pages can be dropped
                os.posix_fadvise(self._file, offset, len(view), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._failed(verb, error, len(view) - done) from error

    def _try_direct(self) -> bool:
        """Switch to O_DIRECT. Some file systems refuse at the switch, some at the first transfer."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        page = mmap.mmap(-1, PAGE_BYTES)
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_DIRECT)
            if self.space.total_bytes:
                os.pwritev(self._file, [page], 0)
                os.preadv(self._file, [page], 0)
        except OSError as error:
            if error.errno not in _REFUSES_DIRECT:
                raise
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags)
            return False
        finally:
            page.close()
        return True

    def _free_bytes(self) -> int:
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def _does_not_fit(self, why: str) -> DoesNotFit:
        return DoesNotFit(
            "the disk tier does not fit on the disk",
            at=str(self.folder),
            why=f"{self.space.total_bytes} bytes wanted, {why}",
            try_="a smaller disk budget, a folder on a larger file system, or free space there",
        )

    def _failed(self, verb: str, error: OSError, wanted_bytes: int) -> OffloadFailed:
        free = "unknown"
        with contextlib.suppress(OSError):
            free = str(self._free_bytes())
        full, code = error.errno in _FULL, errno.errorcode.get(error.errno or 0)
        return OffloadFailed(
            f"the disk tier cannot be {verb}: {'the disk is full' if full else error.strerror}",
            at=f"{self.folder} (unlinked file)",
            why=f"{wanted_bytes} bytes wanted, {free} bytes free; {code}: {error.strerror}",
            try_="free space there, or a smaller disk budget" if full else "another folder or drive; look at dmesg",
        )


def chunks_of(size_bytes: int, place: tuple[Extent, ...], chunk_bytes: int) -> tuple[Chunk, ...]:
    """A tensor of `size_bytes` on the pages `place` of a file, cut into pieces of at most `chunk_bytes`."""
    assert chunk_bytes % PAGE_BYTES == 0 and whole_pages(size_bytes) == sum(extent.bytes for extent in place)
    chunks, start = [], 0
    for extent in place:
        for offset in range(extent.start, extent.end, chunk_bytes):
            take = min(chunk_bytes, extent.end - offset, size_bytes - start)
            chunks.append(Chunk(start, take, offset))
            start += take
    return tuple(chunks)
