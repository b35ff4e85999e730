"""From a data definition to a token store, once: what was tokenised is found again by what it was made from.

The key of a store covers the data, the tokenizer with its chat template, the options that change the result, and the
versions of this code and the libraries; not context, packing or `on_too_long`, which are decided at reading, so that
another context costs nothing. A store is written beside its place and renamed into it when whole: a crash leaves no
half store, and of two processes that prepare the same, the first to finish wins and the other takes its result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from farspan.errors import DataError
from farspan.trainer.config import ChatData, DataSource, Evaluate, ModelSource, RandomModel
from farspan.trainer.data.encode import EncodeTask, encode_shard
from farspan.trainer.data.sources import Inputs, enumerate_inputs
from farspan.trainer.data.store import (
    FORMAT,
    Part,
    StoreDamaged,
    TokenStore,
    merge_parts,
    unigram_entropy_nats,
    writing,
)
from farspan.trainer.data.tokenizer import tokenizer_fingerprint, write_tokenizer
from farspan.trainer.run_folder import default_cache_root, write_json

CODE_VERSION = 1
"""Raised whenever the same inputs would give other tokens, masks or splits."""

MapTasks = Callable[[Callable[[EncodeTask], Part], Sequence[EncodeTask]], Sequence[Part]]


def prepare(
    data: DataSource,
    model: ModelSource,
    evaluate: Evaluate,
    *,
    cache_root: str | Path | None = None,
    map_tasks: MapTasks | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Tokenise `data` for `model`, or find that it was done before.

    Args:
        cache_root: default `$FARSPAN_CACHE`, `$XDG_CACHE_HOME/farspan` or `~/.cache/farspan`. Tasks write below it, so
            with `map_tasks` on several machines it lies on storage they share.
        map_tasks: runs a picklable function over tasks and returns the results in order; default: here, one by one.
        progress: called with one line of text now and then.

    Returns:
        the folder of the token store, for `TokenStore`.

    Raises:
        DataError: the data, the tokenizer or the disk; nothing is left behind.
    """
    tell = progress or (lambda line: None)
    root = Path(cache_root).expanduser() if cache_root is not None else default_cache_root()
    inputs = enumerate_inputs(data)
    key = _key(inputs, data, model, evaluate)
    stores = root / "tokens"
    final = stores / key
    if _is_usable(final):
        tell(f"tokens found in {final}")
        return final
    with writing(stores):
        stores.mkdir(parents=True, exist_ok=True)
    _sweep(stores)
    with _staging(stores, key) as folder:
        _build(folder, key, inputs, data, model, evaluate, map_tasks or _map_here, tell)
        _publish(folder, final)
    tell(f"tokens written to {final}")
    return final


def _key(inputs: Inputs, data: DataSource, model: ModelSource, evaluate: Evaluate) -> str:
    import tokenizers

    made_from: dict[str, Any] = {
        "code": CODE_VERSION,
        "tokenizers": tokenizers.__version__,
        "inputs": inputs.fingerprint,
        "data": data.model_dump(exclude={"source", "context", "on_too_long", "pack"}),
        "tokenizer": tokenizer_fingerprint(model),
        "share": evaluate.share,
    }
    if isinstance(data, ChatData):
        from importlib.metadata import version

        made_from["transformers"] = version("transformers")  # it renders the template
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def _build(
    folder: Path,
    key: str,
    inputs: Inputs,
    data: DataSource,
    model: ModelSource,
    evaluate: Evaluate,
    map_tasks: MapTasks,
    tell: Callable[[str], None],
) -> None:
    if isinstance(model, RandomModel):
        tell(f"training a byte-level BPE of at most {model.vocab} entries")
    info = write_tokenizer(model, data, inputs.shards, folder / "tokenizer")
    parts_folder = folder / "parts"
    with writing(folder):
        parts_folder.mkdir()
    dtype = np.dtype(np.uint16 if info.vocab_size <= 2**16 else np.uint32)
    tasks = [
        EncodeTask(index, shard, data, str(folder / "tokenizer"), str(parts_folder), dtype.name, info.rows, info.eos_id)
        for index, shard in enumerate(inputs.shards)
    ]
    size = f"{inputs.size_bytes / 2**20:.1f} MiB in {inputs.files} files" if inputs.files else str(data.source)
    tell(f"tokenizing {size}, {len(tasks)} tasks")
    parts = _run(tasks, data.limit_documents, map_tasks)
    lengths, hashes = _indices(parts)
    empty = sum(part.empty for part in parts)
    if len(lengths) == 0:
        raise DataError(
            "there is no document to train on",
            at=f"data.source = {data.source!r}",
            why=f"{empty} documents were read and all are empty" if empty else "0 documents were found in it",
            try_="name files that hold text",
        )
    chat = isinstance(data, ChatData)
    split_of = np.full(len(lengths), -1, np.int8)
    split_of[: data.limit_documents] = _held_out(hashes[: data.limit_documents], evaluate.share)
    sizes, counts = merge_parts(folder, parts, split_of, lengths, vocab_size=info.vocab_size, dtype=dtype, chat=chat)
    meta = {
        "format": FORMAT,
        "version": CODE_VERSION,
        "key": key,
        "kind": data.type,
        "source": data.source,
        "dtype": dtype.name,
        "vocab_size": info.vocab_size,
        "rows": info.rows,
        "eos_id": info.eos_id,
        "pad_id": info.pad_id,
        "documents": sum(split["documents"] for split in sizes.values()),
        "tokens": sum(split["tokens"] for split in sizes.values()),
        "splits": sizes,
        "unigram_entropy_nats": unigram_entropy_nats(counts),
        "counts": {"empty_documents": empty},
    }
    with writing(folder):
        shutil.rmtree(parts_folder)
        write_json(folder / "meta.json", meta)


def _run(tasks: Sequence[EncodeTask], limit: int | None, map_tasks: MapTasks) -> list[Part]:
    """All tasks at once; under `limit_documents` in growing waves, since the first few may hold enough."""
    parts: list[Part] = []
    width = len(tasks) if limit is None else 1
    while len(parts) < len(tasks) and (limit is None or sum(part.documents for part in parts) < limit):
        parts += map_tasks(encode_shard, tasks[len(parts) : len(parts) + width])
        width *= 2
    return parts


def _map_here(function: Callable[[EncodeTask], Part], tasks: Sequence[EncodeTask]) -> list[Part]:
    return [function(task) for task in tasks]


def _indices(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """int64 lengths and uint64 hashes of all documents."""
    both = np.concatenate([np.zeros((2, 0), np.uint64), *(np.load(part.path("index")) for part in parts)], axis=1)
    return both[0].astype(np.int64), both[1]


def _held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool [documents]: hashes below `share` of their range; with two documents or more neither split is empty."""
    held_out = hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))
    if share > 0 and len(hashes) >= 2:
        if not held_out.any():
            held_out = hashes == hashes.min()  # equal texts stay together
        if held_out.all():
            held_out[np.argmax(hashes)] = False
    elif len(hashes) == 1:
        held_out[:] = False
    return held_out


def _is_usable(final: Path) -> bool:
    """Whether a whole store lies there; a damaged one is moved out of the way.

    Raises:
        DataError: something else lies there.
    """
    if not os.path.lexists(final):
        return False
    try:
        TokenStore(final)
    except StoreDamaged:
        doomed = final.with_name(f".{final.name}.damaged.{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            final.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return False
    return True


def _publish(folder: Path, final: Path) -> None:
    with writing(final):
        for path in (*folder.rglob("*"), folder):  # a rename may reach the disk before the bytes it names
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        try:
            folder.rename(final)
        except OSError:
            if not _is_usable(final):
                folder.rename(final)


@contextlib.contextmanager
def _staging(stores: Path, key: str) -> Iterator[Path]:
    """A new hidden folder, locked while its owner lives, gone afterwards unless it was renamed."""
    folder = stores / f".{key}.{uuid.uuid4().hex[:8]}"
    with writing(stores):
        lock = open(_lock_path(folder), "w")  # noqa: SIM115  held over the whole block
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then nobody sweeps either
            fcntl.flock(lock, fcntl.LOCK_EX)
        with writing(stores):
            folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_path(folder).unlink(missing_ok=True)
        lock.close()


def _sweep(stores: Path) -> None:
    """Remove what killed preparers left: folders whose lock the kernel has released."""
    for path in stores.glob(".*.lock"):
        with contextlib.suppress(OSError), open(path, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
