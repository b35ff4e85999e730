"""Run-folder discipline: a name is used once, unless the user says `--resume` or `--clean`.

A folder is checked before anything is started and taken only when the job is known to be sound, so that a bad job
with `--clean` loses nothing. While a driver runs it holds a lock on `driver.lock`; the kernel drops the lock when the
process dies, so there is no stale lock to remove by hand.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from types import TracebackType
from typing import IO

from farspan.errors import JobError
from farspan.trainer.run_folder import RunFolder

LOCK = "driver.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Claim:
    """The right to write into one run folder, from `take` until the end of the `with` block.

    Args:
        folder: the run folder.
        resume: it must exist, and is continued.
        clean: if it exists it is deleted first.

    Raises:
        JobError: the name is in use, there is nothing to resume, the folder is not ours to delete, another process
            writes into it, or it cannot be made. Nothing has been changed then.
    """

    def __init__(self, folder: RunFolder, *, resume: bool, clean: bool) -> None:
        self.folder, self.resume, self.clean = folder, resume, clean
        self._lock: IO[str] | None = None
        if resume and clean:
            raise self._error(
                "--resume and --clean together", "one continues the run, the other deletes it", "one of them"
            )
        if self._exists():
            self._check_existing()
        elif resume:
            raise self._error(
                f"no run {folder.root.name} to resume",
                "there is no such folder",
                "leave --resume out, or check the name",
            )
        else:
            self._check_writable()

    def take(self) -> None:
        """Make the folder, after deleting the old one when `clean` was given, and lock it."""
        if self._exists() and not self.resume:
            self._check_existing()  # it may have appeared since; passes only with `clean`
            self._delete()
        try:
            self.folder.root.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise self._cannot_make(str(problem)) from problem
        self._lock = self._locked()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _exists(self) -> bool:
        root = self.folder.root
        return root.is_symlink() or root.is_file() or (root.is_dir() and any(root.iterdir()))

    def _check_existing(self) -> None:
        root = self.folder.root
        marks = (self.folder.job, self.folder.resolved, root / LOCK)
        if root.is_symlink() or not any(mark.is_file() for mark in marks):
            raise self._error(
                f"{root} exists and is not a run folder",
                "it is a link or has no job.json, so it is not touched",
                "another name with --set name=..., or move it away",
            )
        if not self.resume and not self.clean:
            done = self.folder.complete_checkpoints()
            state = f"with checkpoint {done[-1].name}" if done else "without a complete checkpoint"
            raise self._error(
                f"the output folder of run {root.name} is in use",
                f"it holds a run {state}, and is not overwritten unasked",
                "--resume to go on, --clean to delete it, or another name with --set name=...",
            )
        self._locked().close()

    def _delete(self) -> None:
        held = self._locked()
        try:
            shutil.rmtree(self.folder.root)
        except OSError as problem:
            raise self._error("the old run cannot be deleted", str(problem), "another name") from problem
        finally:
            held.close()

    def _locked(self) -> IO[str]:
        file = open(self.folder.root / LOCK, "a", encoding="utf-8")  # noqa: SIM115  held for the whole run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise self._error(
                f"run {self.folder.root.name} is running",
                "another process holds its driver.lock",
                "wait until it ends, or end it, or choose another name",
            ) from None
        except OSError as problem:
            # Storage without locks: two drivers of one name cannot be told apart there; the check by name still holds.
            if problem.errno not in _NO_LOCKS:
                file.close()
                raise
        return file

    def _check_writable(self) -> None:
        above = next(path for path in self.folder.root.parents if path.exists())
        if not above.is_dir():
            raise self._cannot_make(f"{above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise self._cannot_make(f"no permission to write in {above}")

    def _cannot_make(self, why: str) -> JobError:
        return self._error("the run folder cannot be made", why, "--set output_dir= a folder you can write to")

    def _error(self, what: str, why: str, try_: str) -> JobError:
        return JobError(what, at=str(self.folder.root), why=why, try_=try_)
