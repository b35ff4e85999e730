"""Where documents come from: a `TextData` or `ChatData` becomes a list of shards and a fingerprint.

A shard is a small picklable description (files, a byte range of a jsonl file, row groups of a parquet file, rows of a
`datasets` split), so that tokenisation runs as parallel tasks anywhere the paths can be read. Shards and the documents
inside them have one fixed order, sorted paths first to last, whatever the number of tasks.

The fingerprint says whether the data is still the same. Up to 256 MiB every byte is hashed: exact, and the same on any
machine. Above that, reading everything would cost minutes at every start, so path, size, mtime and ctime are taken;
ctime changes with every write and cannot be set back, so a copy that keeps the mtime is still seen.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from farspan.errors import DataError
from farspan.trainer.config import ChatData, TextData

SHARDS_WISHED = 64
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 2 * 2**20, 64 * 2**20
SHARD_ROWS = 20_000
HASHED_BYTES = 256 * 2**20

_DATASET_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Shard:
    """What one task reads. `start` and `stop` count bytes (jsonl), row groups (parquet), rows or shards (dataset)."""

    kind: Literal["text", "jsonl", "parquet", "dataset"]
    paths: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    split: str = ""
    streaming: bool = False


@dataclass(frozen=True)
class Inputs:
    """Everything a job reads, in order. `size_bytes` is 0 for `datasets` ids, whose size is not known beforehand."""

    shards: tuple[Shard, ...]
    fingerprint: str
    files: int
    size_bytes: int


def enumerate_inputs(data: TextData | ChatData) -> Inputs:
    """Resolve `data.source` to shards and a fingerprint. Reads no document, but hashes small inputs.

    Raises:
        DataError: a path that does not exist, a glob that matches nothing, a folder, a kind of file that cannot hold
            conversations, a parquet file or `datasets` id that cannot be opened.
    """
    sources = (data.source,) if isinstance(data.source, str) else data.source
    shards: list[Shard] = []
    files: list[str] = []
    versions: list[Any] = []
    for source in sources:
        if source == "stdlib" and isinstance(data, TextData):
            files += stdlib_files()
        elif _is_dataset_id(source):
            found, version = _dataset_shards(source, data)
            shards += found
            versions.append(version)
        else:
            files += _expand(source)
    files = list(dict.fromkeys(files))
    if isinstance(data, ChatData):
        _refuse_plain_files(files)
    elif data.limit_documents is not None:
        files = _first_plain_files(files, data.limit_documents)
    shards = [*file_shards(files), *shards]
    if not shards:
        raise DataError(
            "there is no document to train on",
            at=f"data.source = {data.source!r}",
            why=f"every file named is empty ({len(files)} of {len(files)})" if files else "the sources name 0 files",
            try_="name at least one file with text, glob or `datasets` id in data.source",
        )
    digest, size_bytes = _files_fingerprint(files)
    fingerprint = hashlib.sha256(json.dumps([digest, versions]).encode()).hexdigest()
    return Inputs(tuple(shards), fingerprint, len(files), size_bytes)


def stdlib_files() -> list[str]:
    """Sources of the running Python's standard library, sorted; without tests, which not every system installs."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]  # noqa: PTH118
    if not found:
        raise DataError(
            "the standard library has no source files",
            at=f"data.source = 'stdlib' ({root})",
            why="this Python carries its library without .py files",
            try_="run with a Python that has its sources, or set data.source to files of your own",
        )
    return sorted(found)


def file_kind(path: str) -> Literal["text", "jsonl", "parquet"]:
    """By suffix: `.jsonl`, `.jsonl.gz` and `.parquet` hold rows, any other file is one plain-text document."""
    if path.endswith(_JSONL_SUFFIXES):
        return "jsonl"
    return "parquet" if path.endswith(".parquet") else "text"


def file_shards(files: list[str]) -> Iterator[Shard]:
    """Shards of 2 to 64 MiB, in the order of `files`: neighbouring plain files share one, large row files are cut."""
    sizes_bytes = [_stat(path).st_size for path in files]
    shard_bytes = min(max(sum(sizes_bytes) // SHARDS_WISHED, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    group: list[str] = []
    group_bytes = 0
    for path, size_bytes in zip(files, sizes_bytes):
        kind = file_kind(path)
        if group and (kind != "text" or group_bytes + size_bytes > shard_bytes):
            yield Shard("text", tuple(group))
            group, group_bytes = [], 0
        if kind == "text":
            group.append(path)
            group_bytes += size_bytes
        elif kind == "parquet":
            yield from _parquet_shards(path, shard_bytes)
        elif path.endswith(".gz"):
            yield Shard("jsonl", (path,))
        else:
            for start in range(0, size_bytes, shard_bytes):
                yield Shard("jsonl", (path,), start, min(start + shard_bytes, size_bytes))
    if group:
        yield Shard("text", tuple(group))


def _parquet_shards(path: str, shard_bytes: int) -> Iterator[Shard]:
    from pyarrow import ArrowException, parquet

    try:
        metadata = parquet.read_metadata(path)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file",
            at=path,
            why=str(error),
            try_="write the file again, or leave it out of data.source",
        ) from error
    start, held_bytes = 0, 0
    for group in range(metadata.num_row_groups):
        group_bytes = metadata.row_group(group).total_byte_size
        if group > start and held_bytes + group_bytes > shard_bytes:
            yield Shard("parquet", (path,), start, group)
            start, held_bytes = group, 0
        held_bytes += group_bytes
    if start < metadata.num_row_groups:
        yield Shard("parquet", (path,), start, metadata.num_row_groups)


def _is_dataset_id(source: str) -> bool:
    """`owner/name`, unless such a path exists or the name ends like a file's."""
    return bool(_DATASET_ID.match(source)) and not _FILE_SUFFIX.search(source) and not os.path.lexists(source)


def _dataset_shards(name: str, data: TextData | ChatData) -> tuple[list[Shard], list[Any]]:
    """Shards of one split, and what `datasets` itself uses to tell versions of it apart."""
    try:
        import datasets

        builder = datasets.load_dataset_builder(name)
        version = [name, data.split, str(builder.config_id), str(builder.hash)]
        if data.streaming:
            count = datasets.load_dataset(name, split=data.split, streaming=True).num_shards
            return [Shard("dataset", (name,), i, count, data.split, True) for i in range(count)], version
        rows = len(datasets.load_dataset(name, split=data.split))
    except Exception as error:  # `datasets` has no common base class for what a loading script or the hub may raise
        raise DataError(
            f"{name!r} is neither a file nor a `datasets` id that loads",
            at=f"data.source = {name!r}, data.split = {data.split!r}",
            why=f"there is no such path, and datasets says {type(error).__name__}: {str(error)[:400]}",
            try_="check the spelling of data.source and data.split, or the network and HF_TOKEN for the hub",
        ) from error
    starts = range(0, rows, SHARD_ROWS)
    return [Shard("dataset", (name,), i, min(i + SHARD_ROWS, rows), data.split) for i in starts], version


def _expand(source: str) -> list[str]:
    """Absolute paths of the files a path or a glob names, sorted."""
    path = Path(source).expanduser().absolute()
    pattern = str(path)
    if path.is_file():
        return [pattern]
    if path.is_dir():
        raise DataError(
            f"{source!r} is a folder",
            at=f"data.source = {source!r}",
            why="which files in it are documents is not said",
            try_=f"write a glob such as '{source.rstrip('/')}/**/*.txt'",
        )
    if not glob.has_magic(pattern):
        raise DataError(
            f"there is no file {source!r}",
            at=f"data.source = {source!r} ({pattern})",
            why="the path does not exist; a `datasets` id would read owner/name",
            try_="correct data.source; relative paths start at the folder the command runs in",
        )
    # glob.glob leaves hidden files out, Path.glob does not.
    found = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise DataError(
            f"the glob {source!r} matches no file",
            at=f"data.source = {source!r} ({pattern})",
            why="0 files match; ** stands for any depth of folders, and hidden files are left out",
            try_="correct data.source; relative globs start at the folder the command runs in",
        )
    return found


def _refuse_plain_files(files: list[str]) -> None:
    plain = [path for path in files if file_kind(path) == "text"]
    if plain:
        raise DataError(
            f"{plain[0]} cannot hold conversations",
            at="data.source",
            why=f"{len(plain)} of {len(files)} files are neither .jsonl, .jsonl.gz nor .parquet",
            try_="give ChatData rows with a list of messages, or use TextData for plain text",
        )


def _first_plain_files(files: list[str], limit: int) -> list[str]:
    """Leave out plain files that `limit_documents` can never reach, so that they are neither hashed nor read."""
    kept, documents = [], 0
    for path in files:
        if file_kind(path) == "text":
            if documents == limit:
                continue
            documents += _stat(path).st_size > 0
        kept.append(path)
    return kept


def _files_fingerprint(files: list[str]) -> tuple[str, int]:
    """Digest and total bytes of `files`; how is told at the top of this module."""
    stats = [_stat(path) for path in files]
    size_bytes = sum(stat.st_size for stat in stats)
    digest = hashlib.sha256()
    for path, stat in zip(files, stats):
        if size_bytes > HASHED_BYTES:
            digest.update(json.dumps([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]).encode())
            continue
        try:
            with open(path, "rb") as file:
                digest.update(file_kind(path).encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unreadable(path, error) from error
    return digest.hexdigest(), size_bytes


def _stat(path: str) -> os.stat_result:
    try:
        return Path(path).stat()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> DataError:
    """The error for a file the operating system refuses to open or read."""
    return DataError(
        f"{path} cannot be read",
        at=path,
        why=error.strerror or str(error),
        try_="check its permissions and that every node sees the path, or leave it out of data.source",
    )
