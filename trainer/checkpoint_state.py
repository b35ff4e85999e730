"""Optimizer state as torch.distributed.checkpoint (DCP) tensors that know nothing of meshes or ZeRO stages.

Every state tensor is one logical 1-D tensor called `<kind>/<parameter>`, in its own dtype: masters and AdamW's
moments fp32 and as long as the flattened parameter, codes and scales of other optimizers as they are in memory. Each
rank writes the pieces it owns as chunks addressed by their offset; a reader asks for whatever pieces it owns and gets
them from the chunks that overlap, so the writer's split never binds the reader's. Chunks are at most `CHUNK_NUMEL`
long: a reader loads a chunk whole, so this bounds its extra memory to 64 MiB.

DCP's default planners write tensors, DTensors and ShardedTensors; flat ZeRO fragments are none of these, hence the two
planners here. The storage layer, the metadata and the file format are DCP's own.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint_format import STATE, FileEntry, damaged
from farspan.trainer.engine import Fragment

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_NUMEL = 1 << 24


class Piece(NamedTuple):
    """Where a fragment lies; what ranks tell one another about their state."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    dtype: torch.dtype = torch.float32

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


def piece_of(fragment: Fragment) -> Piece:
    tensor = fragment.tensor
    return Piece(fragment.name, fragment.kind, tuple(fragment.shape), fragment.offset, tensor.numel(), tensor.dtype)


def require_cover(pieces: Iterable[Piece]) -> None:
    """Check that the pieces of all ranks hold every element of every tensor exactly once.

    Raises:
        CheckpointError: pieces overlap, or leave a gap.
    """
    ends: dict[tuple[str, tuple[int, ...]], int] = {}
    for piece in sorted(pieces, key=lambda p: (p.key, p.offset, p.numel)):
        end = ends.get((piece.key, piece.shape), 0)
        if piece.offset != end:
            raise _bad_cover(piece.key, f"a piece starts at {piece.offset}, the one before it ends at {end}")
        ends[piece.key, piece.shape] = end + piece.numel
    for (key, shape), end in ends.items():
        if end != (numel := torch.Size(shape).numel()):
            raise _bad_cover(key, f"pieces end at {end}, but shape {list(shape)} has {numel} elements")


def _bad_cover(key: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the engine does not hold the state {key} exactly once",
        at="Engine.fragments()",
        why=problem,
        try_="report this: it is a bug in the engine",
    )


class _Crc32Stream(io.RawIOBase):
    """Passes writes on and keeps their CRC-32; DCP writes its files front to back."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self.crc32, self.size_bytes = raw, 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._raw.write(view)
        except OSError as error:
            self.error = self.error or error  # torch's zip writer turns it into a RuntimeError without a number
            raise
        self.crc32 = zlib.crc32(view, self.crc32)
        self.size_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    def tell(self) -> int:
        return self.size_bytes

    def fileno(self) -> int:
        return self._raw.fileno()

    def writable(self) -> bool:
        return True


class _Crc32FileSystem(FileSystem):
    """DCP's file system, which also remembers size and CRC-32 of what it wrote."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, int]] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        try:
            with open(path, mode) as raw:
                if mode != "wb":
                    yield cast("io.IOBase", raw)
                    return
                stream = _Crc32Stream(cast("IO[bytes]", raw))
                try:
                    yield stream
                finally:
                    self.error = self.error or stream.error
                raw.flush()
                os.fsync(raw.fileno())
                self.written[Path(path).name] = (stream.size_bytes, stream.crc32)
        except OSError as error:
            self.error = self.error or error
            raise

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _FragmentSavePlanner(SavePlanner):
    """One chunk of at most CHUNK_NUMEL elements for each write; the layout was agreed on before."""

    def __init__(self, tensors: Mapping[Piece, Tensor]) -> None:
        self._chunks: dict[tuple[str, int], Tensor] = {}
        self._items: list[WriteItem] = []
        for piece, tensor in tensors.items():
            for start in range(0, piece.numel, CHUNK_NUMEL):
                chunk = tensor[start : start + CHUNK_NUMEL]
                offset = piece.offset + start
                self._chunks[piece.key, offset] = chunk
                self._items.append(_write_item(piece, offset, chunk))

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        del state_dict, storage_meta, is_coordinator  # the fragments came with the constructor

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        offset = write_item.index.offset
        assert offset is not None
        return self._chunks[write_item.index.fqn, offset[0]]


def _write_item(piece: Piece, offset: int, chunk: Tensor) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(piece.key, (offset,)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size([offset]), chunk.shape),
            properties=TensorProperties(dtype=chunk.dtype),
            size=torch.Size([torch.Size(piece.shape).numel()]),
        ),
    )


@dataclass
class StateWriter:
    """Writes one rank's pieces into `<folder>/state` and knows their checksums."""

    folder: Path
    group: ProcessGroup | None

    def __post_init__(self) -> None:
        self._file_system = _Crc32FileSystem()

    @property
    def error(self) -> OSError | None:
        """The operating system's first refusal on this rank; torch's own exceptions lose its number."""
        return self._file_system.error

    def write(self, tensors: Mapping[Piece, Tensor]) -> list[FileEntry]:
        """Collective over the group. `tensors`: [numel] on the CPU. Returns the files this rank wrote."""
        from torch.distributed import checkpoint as dcp

        # DCP copies a chunk that is a view before it writes it: 64 MiB at most at one time, since it copies none ahead
        writer = FileSystemWriter(self.folder / STATE, sync_files=False, per_thread_copy_ahead=0)
        writer.fs = self._file_system
        dcp.save(
            {},
            storage_writer=writer,
            planner=_FragmentSavePlanner(tensors),
            process_group=self.group,
            no_dist=self.group is None,
        )
        return [FileEntry(f"{STATE}/{name}", *facts) for name, facts in sorted(self._file_system.written.items())]


class _FragmentLoadPlanner(LoadPlanner):
    """Reads the parts of stored chunks that overlap the fragments, straight into the fragments."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._targets = {(piece_of(f).key, f.offset): f.tensor for f in fragments if f.tensor.numel() > 0}
        self._items: list[ReadItem] = []

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        del state_dict, is_coordinator
        assert metadata is not None
        wanted: dict[str, list[ChunkStorageMetadata]] = {}
        for (key, offset), tensor in self._targets.items():
            wanted.setdefault(key, []).append(ChunkStorageMetadata(torch.Size([offset]), tensor.shape))
        for key, chunks in wanted.items():
            stored = metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata), key
            items = create_read_items_for_chunk_list(key, stored, chunks)
            found_numel = sum(item.lengths[0] for item in items)
            assert found_numel == sum(chunk.sizes[0] for chunk in chunks), f"{key}: stored chunks do not cover it"
            self._items += items

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn}: state holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offset = read_item.dest_index.offset
        assert offset is not None
        target = self._targets[read_item.dest_index.fqn, offset[0]]
        return target.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor was a view of the fragment."""


class StateReader:
    """Reads any pieces of a checkpoint's state, without a process group."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._reader = FileSystemReader(checkpoint / STATE)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise damaged(checkpoint, f"{STATE}/.metadata: {type(error).__name__}: {error}") from error

    def read(self, fragments: Sequence[Fragment]) -> None:
        """Overwrite the fragments' tensors with what was saved. Names and shapes were checked against the manifest."""
        planner = _FragmentLoadPlanner(fragments)
        planner.set_up_planner({}, self._metadata)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, RuntimeError, EOFError) as error:
            raise damaged(self._checkpoint, f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]) from error

    def parameters(self) -> dict[str, int]:
        """Elements of every saved parameter, by name."""
        sizes = {key: stored.size for key, stored in self._metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
        return {key.removeprefix("master/"): size[0] for key, size in sizes.items() if key.startswith("master/")}

    def tensor(self, name: str, shape: tuple[int, ...], *, kind: str = "master") -> Tensor:
        """One whole state tensor: fp32 `shape` on the CPU."""
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        self.read([Fragment(name=name, kind=kind, shape=shape, offset=0, tensor=flat)])
        return flat.view(shape)


def predicted_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes the pieces take on disk: their elements, and 4 KiB for each chunk's zip container and metadata."""
    chunks = sum(-(-piece.numel // CHUNK_NUMEL) for piece in pieces)
    return sum(piece.dtype.itemsize * piece.numel for piece in pieces) + 4096 * chunks + 2**20
