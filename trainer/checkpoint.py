"""Asynchronous checkpoints: a snapshot on the critical path, everything else in a background thread.

`Checkpointer.save` tells the other ranks which pieces of the optimizer state this one holds, refuses what cannot fit on
the disk, and copies the pieces into a host buffer; then training goes on. A thread writes the buffer through
torch.distributed.checkpoint, rank 0 exports, seals the folder with its manifest and gives it its name, and only then
deletes older checkpoints. A second save waits for the first.

What it costs: host memory for 12 bytes per parameter the rank writes (a buffer kept between saves; pinned when the
state is on a GPU, where torch rounds it up to a power of two), and on the critical path one exchange of the layout
(about 60 bytes per parameter and rank) and one copy. Ranks talk over a gloo group of their own, so nothing here meets
the collectives of training.

Failure is agreed on: whatever goes wrong on one rank is raised on every rank, at once by `save` when it can be known
before writing, otherwise by the next `save`, `wait` or `close`. A rank that dies breaks the group's connections, so the
others raise instead of waiting; the group's timeout bounds the rest.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from farspan.errors import CheckpointError
from farspan.trainer import checkpoint_format as layout
from farspan.trainer.checkpoint_format import (
    DamagedCheckpoint,
    FileEntry,
    Manifest,
    ParameterEntry,
    StateEntry,
    latest,
)
from farspan.trainer.checkpoint_ranks import Ranks, checkpoint_group
from farspan.trainer.checkpoint_state import Piece, StateReader, StateWriter, piece_of, predicted_bytes, require_cover
from farspan.trainer.config import Adapter, RandomModel, Reversible, TrainSpec
from farspan.trainer.engine import STATE_KINDS, Fragment
from farspan.trainer.export_process import ExportRequest, export_in_process
from farspan.trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ALIGN_BYTES = 16
"""Every tensor of a snapshot starts at a multiple of this, whatever its dtype."""

__all__ = ["Checkpointer", "DamagedCheckpoint", "Restored", "Saved", "checkpoint_group", "latest"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that became complete."""

    path: Path
    step: int
    size_bytes: int
    snapshot_s: float
    """Seconds training stood still for it on rank 0."""
    write_s: float
    export_s: float
    removed: tuple[Path, ...]
    """Older checkpoints that were deleted after it."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read into the fragments."""

    path: Path
    manifest: Manifest
    skipped: tuple[str, ...] = ()
    """Damaged checkpoints that were passed over because the caller asked for it, with what was wrong with each."""

    @property
    def progress(self) -> dict[str, Any]:
        return self.manifest.progress


@dataclass
class _Save:
    """One save on its way from `save` to its end."""

    step: int
    token: str
    folder: Path
    pieces: list[Piece]
    """Of all ranks."""
    progress: dict[str, Any]
    finalize: Callable[[Path], None] | None
    needed_bytes: int
    tensors: dict[Piece, Tensor] = field(default_factory=dict)
    error: CheckpointError | None = None
    snapshot_s: float = 0.0


class Checkpointer:
    """Saves and restores one run's optimizer state. Every method is collective over the group.

    Args:
        folder: the run folder, on storage every rank reaches.
        spec: what is trained; `spec.checkpoint` says how many stay and whether each is exported.
        group: gloo, used by nothing else while a save is under way (see `checkpoint_group`); None for one rank.
        rank, world_size: of this process in the group.
        tokenizer_dir: folder of the tokenizer the export shall carry; None: the base model's own.
        export_timeout_s: an export that takes longer fails the save.
    """

    def __init__(
        self,
        folder: RunFolder,
        spec: TrainSpec,
        *,
        group: ProcessGroup | None = None,
        rank: int = 0,
        world_size: int = 1,
        tokenizer_dir: Path | None = None,
        export_timeout_s: float = 1500.0,
    ) -> None:
        self._folder, self._spec = folder, spec
        self._tokenizer_dir, self._export_timeout_s = tokenizer_dir, export_timeout_s
        self._ranks = Ranks(group, rank, world_size)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Saved | None = None
        self._buffer: Tensor | None = None
        # DCP warns when it runs without a process group, which is what one rank means
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        if self._ranks.rank == 0:
            layout.remove_leftovers(folder)

    def save(
        self,
        step: int,
        fragments: Sequence[Fragment],
        progress: dict[str, Any],
        finalize: Callable[[Path], None] | None = None,
    ) -> None:
        """Snapshot the state after optimizer step `step` and write it in the background.

        Args:
            step: optimizer steps done; names the folder.
            fragments: this rank's state; over all ranks every element exactly once.
            progress: small JSON: step, pack cursor, tokens seen. Rank 0's is kept.
            finalize: called on rank 0 in the background with the unfinished folder, after the export and before the
                manifest; what it writes there belongs to the checkpoint.

        Raises:
            CheckpointError: the disk is too full, or the previous save failed.
        """
        self.wait()
        started = time.monotonic()
        job = self._plan(step, fragments, progress, finalize)
        try:
            job.tensors = self._snapshot(fragments)
        except (RuntimeError, MemoryError) as error:  # raised by all ranks once the thread has exchanged it
            job.error = layout.save_failed(self._folder, step, error, needed_bytes=job.needed_bytes)
        job.snapshot_s = time.monotonic() - started
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> Saved | None:
        """Wait for the save under way. Returns the last complete save of this process.

        Raises:
            CheckpointError: the save failed; the same on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._saved

    def close(self) -> Saved | None:
        """`wait`, and give the host buffer back."""
        try:
            return self.wait()
        finally:
            self._buffer = None

    def load(self, path: Path, fragments: Sequence[Fragment]) -> dict[str, Any]:
        """Verify a checkpoint and read it into the fragments, whatever mesh and ZeRO stage wrote it.

        Returns:
            what `save` was given as progress.

        Raises:
            DamagedCheckpoint: a file is missing, cut short or changed. Nothing was overwritten.
            CheckpointError: the parameters are not the ones that were saved.
        """
        return self._load(path, fragments).progress

    def load_latest(self, fragments: Sequence[Fragment], *, fall_back: bool = False) -> Restored | None:
        """Load the newest complete checkpoint; None when there is none.

        Args:
            fragments: as in `load`.
            fall_back: pass over damaged checkpoints. They are renamed to `damaged_step_<n>` and listed in `skipped`,
                which the caller must report.
        """
        skipped: list[str] = []
        while (path := self._ranks.gather(latest(self._folder))[0]) is not None:
            try:
                return Restored(path, self._load(path, fragments), tuple(skipped))
            except DamagedCheckpoint as error:
                if not fall_back:
                    raise
                skipped.append(f"{path.name}: {error.why}")
                if self._ranks.rank == 0:
                    path.rename(path.with_name(f"damaged_{path.name}"))
                self._ranks.gather(None)  # nobody looks for the next one before this one is out of the way
        return None

    def _load(self, path: Path, fragments: Sequence[Fragment]) -> Manifest:
        ranks, manifest, error = self._ranks, None, None
        try:
            manifest = layout.verify(path, share=(ranks.rank, ranks.count))
        except CheckpointError as met:
            error = met
        ranks.raise_first(error)
        assert manifest is not None
        held = ranks.gather({(f.kind, f.name): tuple(f.shape) for f in fragments})
        _require_same_parameters(path, manifest, {key: shape for part in held for key, shape in part.items()})
        try:
            StateReader(path).read(fragments)
        except CheckpointError as met:
            error = met
        ranks.raise_first(error)
        return manifest

    def _plan(
        self,
        step: int,
        fragments: Sequence[Fragment],
        progress: dict[str, Any],
        finalize: Callable[[Path], None] | None,
    ) -> _Save:
        """Agree on what is written and whether it fits. Every rank computes the same from the same facts."""
        free_bytes, error = 0, None
        if self._ranks.rank == 0:
            try:
                self._folder.checkpoints.mkdir(parents=True, exist_ok=True)
                free_bytes = shutil.disk_usage(self._folder.checkpoints).free
            except OSError as met:
                error = layout.save_failed(self._folder, step, met, needed_bytes=0)
        facts = self._ranks.gather(([piece_of(f) for f in fragments], uuid.uuid4().hex[:8], free_bytes, error))
        _, token, free_bytes, error = facts[0]
        if error is not None:
            raise error
        pieces = [piece for of_rank, *_ in facts for piece in of_rank]
        require_cover(pieces)
        parts_bytes = {"state": predicted_bytes(pieces)}
        if self._spec.checkpoint.export:
            numel = sum(piece.numel for piece in pieces if piece.kind == "master")
            parts_bytes["export"] = numel * (2 if self._spec.precision == "bf16" else 4)
        layout.require_space(self._folder, step=step, parts_bytes=parts_bytes, free_bytes=free_bytes)
        return _Save(
            step=step,
            token=token,
            folder=layout.temporary(self._folder, step, token),
            pieces=pieces,
            progress=dict(progress),
            finalize=finalize,
            needed_bytes=sum(parts_bytes.values()),
        )

    def _snapshot(self, fragments: Sequence[Fragment]) -> dict[Piece, Tensor]:
        """Copy this rank's state into the host buffer; the state may change as soon as this returns."""
        live = {piece_of(f): f.tensor.detach() for f in fragments if f.tensor.numel() > 0}
        on_gpu = any(tensor.is_cuda for tensor in live.values())
        places = {piece: -(-tensor.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES for piece, tensor in live.items()}
        if self._buffer is None or self._buffer.numel() != sum(places.values()):
            self._buffer = None  # freed before the next one is allocated
            self._buffer = torch.empty(sum(places.values()), dtype=torch.uint8, pin_memory=on_gpu)
        copies: dict[Piece, Tensor] = {}
        start = 0
        for piece, tensor in live.items():
            copies[piece] = self._buffer[start : start + tensor.nbytes].view(tensor.dtype)
            copies[piece].copy_(tensor, non_blocking=on_gpu)
            start += places[piece]
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _run(self, job: _Save) -> None:
        """The background thread. Whatever happens is kept for the next call on the training thread."""
        try:
            self._saved = self._write(job)
        except BaseException as error:
            self._error = error
            if self._ranks.rank == 0:
                shutil.rmtree(job.folder, ignore_errors=True)

    def _write(self, job: _Save) -> Saved:
        started = time.monotonic()
        self._ranks.raise_first(job.error)
        files, error = self._write_state(job)
        met = self._ranks.gather((files, error))
        # the rank whose disk refused knows why; the others only know that it failed
        errors = sorted((error for _, error in met if error is not None), key=lambda e: e[0])
        if errors:
            raise errors[0][1]
        write_s = time.monotonic() - started
        saved: Saved | None = None
        failure: CheckpointError | None = None
        if self._ranks.rank == 0:
            try:
                saved = self._finish(job, [entry for files, _ in met for entry in files], write_s)
            except CheckpointError as error_:
                failure = error_
            except Exception as error_:
                failure = layout.save_failed(self._folder, job.step, error_, needed_bytes=job.needed_bytes)
            if failure is not None:
                shutil.rmtree(job.folder, ignore_errors=True)
        saved, failure = self._ranks.gather((saved, failure))[0]
        if failure is not None:
            raise failure
        assert saved is not None
        return saved

    def _write_state(self, job: _Save) -> tuple[list[FileEntry], tuple[int, CheckpointError] | None]:
        """Files this rank wrote, or (how little it knows, error)."""
        writer = StateWriter(job.folder, self._ranks.group)
        try:
            return writer.write(job.tensors), None
        except (Exception, CheckpointException) as error:
            cause = writer.error or _root(error)
            failed = layout.save_failed(self._folder, job.step, cause, needed_bytes=job.needed_bytes)
            return [], (0 if writer.error is not None else 1, failed)

    def _finish(self, job: _Save, files: list[FileEntry], write_s: float) -> Saved:
        """Rank 0, after all ranks have written: export, manifest, name, retention."""
        started = time.monotonic()
        if self._spec.checkpoint.export:
            export_in_process(self._export_request(job.folder, job.progress), timeout_s=self._export_timeout_s)
        export_s = time.monotonic() - started
        if job.finalize is not None:
            job.finalize(job.folder)
        known = {entry.path for entry in files}
        others = (path for path in sorted(job.folder.rglob("*")) if path.is_file())
        files = files + [
            layout.file_entry(job.folder, path, flush=True)
            for path in others
            if path.relative_to(job.folder).as_posix() not in known
        ]
        layout.write_manifest(job.folder, self._manifest(job, files))
        path = layout.publish(self._folder, job.folder, job.step, job.token)
        removed = layout.retain(self._folder, self._spec.checkpoint.keep, job.token)
        return Saved(
            path=path,
            step=job.step,
            size_bytes=sum(entry.size_bytes for entry in files),
            snapshot_s=job.snapshot_s,
            write_s=write_s,
            export_s=export_s,
            removed=tuple(removed),
        )

    def _manifest(self, job: _Save, files: list[FileEntry]) -> Manifest:
        shapes = {piece.name: piece.shape for piece in job.pieces if piece.kind == "master"}
        states = {(piece.kind, piece.name): (piece.shape, piece.dtype) for piece in job.pieces}
        kinds = [
            kind
            for kind in STATE_KINDS
            if all(states.get((kind, name)) == (shape, torch.float32) for name, shape in shapes.items())
        ]
        return Manifest(
            step=job.step,
            progress=job.progress,
            written_with={
                "world_size": self._ranks.count,
                "mesh": self._spec.mesh.model_dump(),
                "zero": self._spec.zero,
                "torch": torch.__version__,
            },
            kinds=tuple(kinds),
            parameters=tuple(ParameterEntry(name, shape, "float32") for name, shape in sorted(shapes.items())),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            job=self._spec.model_dump(mode="json"),
            others=tuple(
                StateEntry(name, kind, shape, str(dtype).removeprefix("torch."))
                for (kind, name), (shape, dtype) in sorted(states.items(), key=lambda item: item[0])
                if kind not in kinds
            ),
        )

    def _export_request(self, folder: Path, progress: dict[str, Any]) -> ExportRequest:
        spec = self._spec
        return ExportRequest(
            checkpoint_dir=folder,
            out_dir=folder / layout.EXPORT,
            model=spec.model,
            adapter=with_range(spec.adapter, progress),
            base_model_dir=self._folder.base_model if isinstance(spec.model, RandomModel) else None,
            tokenizer_dir=self._tokenizer_dir,
            dtype=spec.precision,
            seed=spec.optim.seed,
            stored=spec.base,
            start=self._folder.adapter_start,
            prepared=spec.prepared_base,
        )


def with_range(adapter: Adapter, progress: dict[str, Any]) -> Adapter:
    """An adapter as it was trained: reversible streams have the range, or the anchors, that the run found."""
    if not isinstance(adapter, Reversible):
        return adapter
    if adapter.form == "float":
        return adapter.model_copy(update={"anchor_every": progress["anchor_every"]})
    return adapter.model_copy(update={"fraction_bits": progress["fraction_bits"]})


def _require_same_parameters(path: Path, manifest: Manifest, held: dict[tuple[str, str], tuple[int, ...]]) -> None:
    saved = {(kind, entry.name): entry.shape for entry in manifest.parameters for kind in manifest.kinds}
    saved |= {(entry.kind, entry.name): entry.shape for entry in manifest.others}
    differences = [
        f"{kind}/{name} is {_shape(held, kind, name)} here, {_shape(saved, kind, name)} in the checkpoint"
        for kind, name in sorted(saved.keys() | held.keys(), key=lambda key: (key[1], key[0]))
        if saved.get((kind, name)) != held.get((kind, name))
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {path.name} belongs to another model or adapter",
            at=str(path),
            why=f"{len(differences)} of {len(saved)} states differ: {'; '.join(differences[:3])}",
            try_="resume with the model and adapter that wrote it, or start a new run under another name",
        )


def _shape(table: dict[tuple[str, str], tuple[int, ...]], kind: str, name: str) -> str:
    shape = table.get((kind, name))
    return "absent" if shape is None else str(list(shape))


def _root(error: BaseException) -> BaseException:
    """DCP wraps what ranks met; the first failing rank's own exception says more."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error
