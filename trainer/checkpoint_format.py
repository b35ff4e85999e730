"""The checkpoint folder: its manifest, its checksums, and the rules that make a half-written one invisible.

    checkpoints/.step_<n>.tmp-<token>/   while it is written or deleted; never looked at, removed at the next start
    checkpoints/step_<n>/state/          fp32 masters and the optimizer's state, written by torch.distributed.checkpoint
    checkpoints/step_<n>/export/         HF or PEFT folder, when the job asks for it
    checkpoints/step_<n>/manifest.json   step, progress, parameter table, every file with size and CRC-32, the job

The manifest is the last file written into the temporary folder, which is flushed and then renamed, so a folder called
`step_<n>` is complete or it is damaged; it is never unfinished. CRC-32 (zlib) finds flipped bits and torn files, which
is what disks do; it is no defence against a forger. It costs a third of a second per GiB and core (SHA-256: 0.8 s),
taken while bytes are written, and again when a checkpoint is read. No torch here: the command line looks at
checkpoints too.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from farspan.errors import CheckpointError
from farspan.trainer.run_folder import RunFolder, write_json

FORMAT = 1
STATE = "state"
EXPORT = "export"
MANIFEST = "manifest.json"
_READ_BYTES = 1 << 22


class DamagedCheckpoint(CheckpointError):
    """A file of a complete checkpoint is missing, cut short or changed."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint folder, with forward slashes."""
    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class ParameterEntry:
    """One row of the parameter table."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Of the saved state: `float32`."""


@dataclass(frozen=True)
class StateEntry:
    """One state tensor that is unlike its parameter."""

    name: str
    """Of the parameter."""
    kind: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """All that can be known of a checkpoint without reading tensors."""

    step: int
    progress: dict[str, Any]
    """What the loop asked to remember: step, pack cursor, tokens seen, ..."""
    written_with: dict[str, Any]
    """World size, mesh, ZeRO stage and versions; a reader may differ in all of them."""
    kinds: tuple[str, ...]
    """State that every parameter has, in fp32 and its own shape."""
    parameters: tuple[ParameterEntry, ...]
    files: tuple[FileEntry, ...]
    job: dict[str, Any]
    """The `TrainSpec`, for `farspan.trainer.resume_rules`."""
    others: tuple[StateEntry, ...] = ()
    """All other state."""
    format: int = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a checkpoint.

    Raises:
        DamagedCheckpoint: it is missing or cannot be read.
        CheckpointError: it was written by a newer format.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format"]
        if version == FORMAT:
            raw["kinds"] = tuple(raw["kinds"])
            raw["parameters"] = tuple(
                ParameterEntry(p["name"], tuple(p["shape"]), p["dtype"]) for p in raw["parameters"]
            )
            raw["others"] = tuple(
                StateEntry(o["name"], o["kind"], tuple(o["shape"]), o["dtype"]) for o in raw.get("others", ())
            )
            raw["files"] = tuple(FileEntry(**entry) for entry in raw["files"])
            return Manifest(**raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            "the manifest of a checkpoint cannot be read",
            at=str(path),
            why=f"{type(error).__name__}: {error}",
            try_="give an older checkpoint, or a folder called step_<n> that has a manifest.json",
        ) from error
    raise CheckpointError(
        "the checkpoint has a format this version does not know",
        at=str(path),
        why=f"format {version}, this version reads {FORMAT}",
        try_="use the version of farspan that wrote it",
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, asdict(manifest))


def file_entry(folder: Path, path: Path, *, flush: bool = False) -> FileEntry:
    """Size and CRC-32 of a file; `flush` makes sure that it is on the disk."""
    crc = size_bytes = 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            crc = zlib.crc32(block, crc)
            size_bytes += len(block)
        if flush:
            os.fsync(file.fileno())
    return FileEntry(path.relative_to(folder).as_posix(), size_bytes, crc)


def damage(folder: Path, entries: list[FileEntry]) -> str | None:
    """What is wrong with the first damaged file of `entries`, or None."""
    for entry in entries:
        path = folder / entry.path
        try:
            size_bytes = path.stat().st_size
            if size_bytes != entry.size_bytes:
                return f"{entry.path} has {size_bytes} bytes, the manifest says {entry.size_bytes}"
            found = file_entry(folder, path)
        except OSError as error:
            return f"{entry.path}: {error.strerror}"
        if found.crc32 != entry.crc32:
            return f"{entry.path} has CRC-32 {found.crc32:08x}, the manifest says {entry.crc32:08x}"
    return None


def verify(folder: Path, *, share: tuple[int, int] = (0, 1)) -> Manifest:
    """Check size and CRC-32 of every file, or of every n-th one when n ranks share the work.

    Args:
        folder: a checkpoint.
        share: (index, count): this caller takes files index, index + count, ...

    Raises:
        DamagedCheckpoint: names the first damaged file.
    """
    manifest = read_manifest(folder)
    index, count = share
    problem = damage(folder, list(manifest.files[index::count]))
    if problem is not None:
        raise damaged(folder, problem)
    return manifest


def damaged(folder: Path, problem: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"checkpoint {folder.name} is damaged",
        at=str(folder),
        why=problem,
        try_="resume from the previous checkpoint: move this folder out of checkpoints/ and resume again",
    )


def latest(folder: RunFolder) -> Path | None:
    """The newest complete checkpoint of a run, not yet verified; None when there is none."""
    complete = folder.complete_checkpoints()
    return complete[-1] if complete else None


def temporary(folder: RunFolder, step: int, token: str) -> Path:
    return folder.checkpoints / f".step_{step}.tmp-{token}"


def remove_leftovers(folder: RunFolder) -> list[Path]:
    """Delete what crashed saves and interrupted deletions left behind; returns what was found."""
    found = sorted(folder.checkpoints.glob(".step_*.tmp-*"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def publish(folder: RunFolder, written: Path, step: int, token: str) -> Path:
    """Give a finished temporary folder its name. An older checkpoint of the same step makes room first."""
    target = folder.checkpoint(step)
    for path in (written / STATE, written / EXPORT, written):
        if path.is_dir():
            _sync_folder(path)
    if target.exists():
        discard(target, token)
    written.rename(target)
    _sync_folder(folder.checkpoints)
    return target


def discard(path: Path, token: str) -> None:
    """Delete a checkpoint. It loses its name first, so that a crash never leaves a complete-looking half."""
    hidden = path.with_name(f".{path.name}.tmp-{token}-old")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def retain(folder: RunFolder, keep: int, token: str) -> list[Path]:
    """Delete all complete checkpoints but the newest `keep`; returns what was deleted."""
    gone = folder.complete_checkpoints()[:-keep]
    for path in gone:
        discard(path, token)
    return gone


def require_space(folder: RunFolder, *, step: int, parts_bytes: dict[str, int], free_bytes: int) -> None:
    """Refuse a save that cannot fit on the disk.

    Raises:
        CheckpointError: with the arithmetic.
    """
    needed_bytes = sum(parts_bytes.values())
    if needed_bytes <= free_bytes:
        return
    parts = " + ".join(f"{name} {gib(size_bytes)}" for name, size_bytes in parts_bytes.items())
    older = len(folder.complete_checkpoints())
    raise CheckpointError(
        f"the disk is too full for the checkpoint of step {step}",
        at=str(folder.checkpoints),
        why=f"needed {gib(needed_bytes)} = {parts}; free {gib(free_bytes)}; {older} older checkpoint(s) lie there",
        try_="free space, set output_dir to a larger disk, or lower checkpoint.keep or switch checkpoint.export off",
    )


def save_failed(folder: RunFolder, step: int, cause: BaseException, *, needed_bytes: int) -> CheckpointError:
    """The four lines for a save that failed while it was written."""
    code = cause.errno if isinstance(cause, OSError) else None
    reason = f"{type(cause).__name__}: {cause}".split("\n", maxsplit=1)[0]
    try_ = "read the log of this rank; the older checkpoints are untouched"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = gib(shutil.disk_usage(folder.checkpoints).free)
        reason = f"{os.strerror(code)}; the checkpoint needs {gib(needed_bytes)}, free now {free}"
        try_ = "free space, lower checkpoint.keep, or set output_dir to a larger disk; then run again with --resume"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        try_ = f"make {folder.checkpoints} writable for this user on every node; then run again with --resume"
    return CheckpointError(
        f"the checkpoint of step {step} could not be written", at=str(folder.checkpoints), why=reason, try_=try_
    )


def gib(size_bytes: int) -> str:
    """1610612736 -> `1.50 GiB`; small sizes in MiB."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.2f} MiB"


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
