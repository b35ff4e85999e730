"""Tokenise one shard, the unit of parallel work: read it, write a part beside the others, return counts.

Tasks share nothing but the tokenizer folder and the folder parts go to, so the caller may run them in this process, in
a pool, or as Ray tasks on any node that sees both. Memory stays at a batch of about a million characters, or the
longest document where that is longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from farspan.trainer.config import ChatData, TextData
from farspan.trainer.data.chat import check_chat_tokenizer, encode_chat
from farspan.trainer.data.reading import Place, read_shard
from farspan.trainer.data.sources import Shard
from farspan.trainer.data.store import Part, writing
from farspan.trainer.data.tokenizer import load_encoder, load_tokenizer, vocabulary_mismatch

BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class EncodeTask:
    """One shard to tokenise, and where its part goes."""

    index: int
    shard: Shard
    data: TextData | ChatData
    tokenizer_folder: str
    out_folder: str
    dtype: str
    rows: int
    eos_id: int


@dataclass(frozen=True)
class _Encoded:
    place: Place
    ids: np.ndarray
    trained: np.ndarray | None
    text_hash: int


def encode_shard(task: EncodeTask) -> Part:
    """Tokenise `task.shard`, at most `limit_documents` of it.

    Raises:
        DataError: a bad document (named by file and line), an id without embedding row, a disk that is full.
    """
    skipped: list[Place] = []
    documents = islice(_documents(task, skipped), task.data.limit_documents)
    encoded = _encode_text(task, documents) if isinstance(task.data, TextData) else _encode_chats(task, documents)
    part = Part(task.index, task.out_folder, 0, 0, 0)
    lengths, hashes = [], []
    # `writing` surrounds the files, whose last bytes go out when they are closed.
    with (
        writing(Path(task.out_folder)),
        open(part.path("tokens"), "wb") as tokens_file,
        open(part.path("trained"), "wb") as trained_file,
        open(part.path("index"), "wb") as index_file,
    ):
        for document in encoded:
            largest = int(document.ids.max())
            if largest >= task.rows:
                raise vocabulary_mismatch(largest, task.rows, str(document.place))
            tokens_file.write(document.ids.astype(task.dtype).data)
            if document.trained is not None:
                trained_file.write(document.trained.data)
            lengths.append(len(document.ids))
            hashes.append(document.text_hash)
        np.save(index_file, np.array([lengths, hashes], np.uint64))
    return Part(task.index, task.out_folder, len(lengths), sum(lengths), len(skipped))


def _documents(task: EncodeTask, skipped: list[Place]) -> Iterator[tuple[Place, Any]]:
    """Documents of the shard without empty texts, which are put into `skipped`."""
    for place, document in read_shard(task.shard, task.data):
        if isinstance(document, str) and not document.strip():
            skipped.append(place)
        else:
            yield place, document


def _encode_text(task: EncodeTask, documents: Iterator[tuple[Place, str]]) -> Iterator[_Encoded]:
    encode = load_encoder(Path(task.tokenizer_folder))
    for batch in _batches(documents):
        for (place, text), ids in zip(batch, encode([text for _, text in batch])):
            if not ids or ids[-1] != task.eos_id:
                ids.append(task.eos_id)
            yield _Encoded(place, np.array(ids, np.int64), None, _hash(text))


def _encode_chats(task: EncodeTask, documents: Iterator[tuple[Place, Any]]) -> Iterator[_Encoded]:
    tokenizer = load_tokenizer(task.tokenizer_folder)
    check_chat_tokenizer(tokenizer, task.tokenizer_folder)
    # The context is ours to enforce, by on_too_long; the tokenizer's own limit only prints a warning.
    tokenizer.model_max_length = int(1e30)
    for place, messages in documents:
        ids, trained = encode_chat(tokenizer, messages, place)
        text_hash = _hash(json.dumps(messages, sort_keys=True, default=str))
        yield _Encoded(place, np.array(ids, np.int64), trained, text_hash)


def _batches(documents: Iterator[tuple[Place, str]]) -> Iterator[list[tuple[Place, str]]]:
    batch: list[tuple[Place, str]] = []
    characters = 0
    for place, text in documents:
        batch.append((place, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _hash(text: str) -> int:
    """64 bits that depend on the text alone, so that a document is held out or not wherever it lies."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
