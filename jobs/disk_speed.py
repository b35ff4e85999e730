"""How fast the disk under a folder is, sequentially, in about two seconds.

O_DIRECT goes around the page cache, which would otherwise answer for the disk; it needs blocks aligned to the
device's sectors, hence an anonymous mmap as buffer (aligned to a page). File systems that refuse it (tmpfs, some
overlays and network shares) are measured through the page cache, flushed before the clock stops and dropped before
reading, and the result says so.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 8 * 2**20
FILE_BYTES = 256 * 2**20
LIMIT_S = 1.5
"""A slow disk is given up after this long each way; the rate is of what was done until then."""


@dataclass(frozen=True)
class DiskSpeed:
    """Measured rates and how they were got."""

    write_bytes_per_s: float
    read_bytes_per_s: float
    how: str


def measure_disk(folder: Path, *, file_bytes: int = FILE_BYTES) -> DiskSpeed:
    """Write and read a file of up to `file_bytes` in `folder`, which must exist; the file is removed again.

    Raises:
        OSError: the folder cannot be written, or has no space left.
    """
    path = folder / f".farspan-doctor-{os.getpid()}"
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(2**16) * (BLOCK_BYTES // 2**16))  # a disk that compresses must not gain from zeros
    try:
        return _direct(path, block, file_bytes) or _buffered(path, block, file_bytes)
    finally:
        path.unlink(missing_ok=True)
        block.close()


def _direct(path: Path, block: mmap.mmap, file_bytes: int) -> DiskSpeed | None:
    """None where O_DIRECT is refused: at open (tmpfs) or at the first transfer."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | flag, 0o600)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    try:
        write_rate, done = _timed(lambda at: os.pwritev(file, [block], at), file_bytes, after=lambda: os.fsync(file))
        read_rate, _ = _timed(lambda at: os.preadv(file, [block], at), done)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    finally:
        os.close(file)
    return DiskSpeed(write_rate, read_rate, "O_DIRECT, one thread")


def _buffered(path: Path, block: mmap.mmap, file_bytes: int) -> DiskSpeed:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        write_rate, done = _timed(lambda at: os.pwritev(file, [block], at), file_bytes, after=lambda: os.fsync(file))
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        read_rate, _ = _timed(lambda at: os.preadv(file, [block], at), done)
    finally:
        os.close(file)
    return DiskSpeed(write_rate, read_rate, "through the page cache (no O_DIRECT here): reads may be flattered")


def _timed(
    transfer: Callable[[int], int], total_bytes: int, after: Callable[[], None] = lambda: None
) -> tuple[float, int]:
    """Transfer block after block until the end or the limit; (bytes per second, bytes)."""
    began, done = time.perf_counter(), 0
    while done < total_bytes and time.perf_counter() - began < LIMIT_S:
        moved = transfer(done)
        if moved == 0:
            break
        done += moved
    after()
    return done / (time.perf_counter() - began), done
