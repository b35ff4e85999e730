"""The token store: the tokenised data of a job as flat files, memory-mapped by every rank.

    <store>/meta.json
            tokenizer/                         a transformers folder
            train/       tokens.bin            uint16 or uint32, documents end to end
                         offsets.npy           int64 [documents + 1], where each begins in tokens.bin
                         trained.bin           uint8, 1 where the loss is taken; chats only
            validation/  the same

Two bytes a token (four above 65 536 entries) and eight a document are all it costs; any document is one slice away, so
a rank keeps nothing in memory but offsets and what the page cache holds. Sizes are checked against `meta.json` when a
store is opened: a file cut short is found then, and not as noise in a loss.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from farspan.errors import DataError

FORMAT = "farspan-tokens"
SPLITS = ("train", "validation")
_COPY_TOKENS = 4 * 2**20


class StoreDamaged(DataError):
    """A folder that is a token store, but not a whole one."""


class Documents:
    """Token sequences of one split; every read is a view of the mapped file.

    Args:
        tokens: uint16 or uint32 [tokens].
        offsets: int64 [documents + 1].
        trained: uint8 [tokens], or None when every token is trained on.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, trained: np.ndarray | None = None) -> None:
        assert offsets[0] == 0 and offsets[-1] == len(tokens) and (trained is None or len(trained) == len(tokens))
        self._tokens, self._offsets, self._trained = tokens, offsets, trained
        self.lengths: np.ndarray = np.diff(offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def has_mask(self) -> bool:
        """Whether some tokens are not trained on (chats)."""
        return self._trained is not None

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids [stop - start] of one document, in the dtype of the file; bounds are clipped as in a slice."""
        return self._tokens[self._slice(index, start, stop)]

    def trained(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """uint8 [stop - start]: 1 where the loss on predicting this token is taken."""
        part = self._slice(index, start, stop)
        return np.ones(part.stop - part.start, np.uint8) if self._trained is None else self._trained[part]

    def _slice(self, index: int, start: int, stop: int | None) -> slice:
        begin, length = int(self._offsets[index]), int(self.lengths[index])
        stop = length if stop is None else min(stop, length)
        return slice(begin + min(start, stop), begin + stop)


class TokenStore:
    """A token store, opened for reading.

    Attributes:
        meta: `meta.json`: `key`, `kind`, `documents`, `tokens`, `splits` (documents, tokens and trained_tokens of
            each), `vocab_size`, `rows`, `eos_id`, `pad_id`, `unigram_entropy_nats`, `counts`.
        train, validation: `Documents`.

    Raises:
        DataError: not a token store, or (`StoreDamaged`) files whose sizes are not those written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        self.tokenizer_dir = self.path / "tokenizer"
        if not self.tokenizer_dir.is_dir():
            raise _damaged(self.path, "the folder tokenizer/ is gone")
        self.train = self._open("train")
        self.validation = self._open("validation")

    def _open(self, split: str) -> Documents:
        folder, sizes, dtype = self.path / split, self.meta["splits"][split], np.dtype(self.meta["dtype"])
        try:
            tokens = _map(folder / "tokens.bin", dtype, sizes["tokens"])
            trained = _map(folder / "trained.bin", np.dtype(np.uint8), sizes["tokens"]) if self._is_chat else None
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(folder, str(error)) from error
        if len(offsets) != sizes["documents"] + 1 or offsets[-1] != sizes["tokens"]:
            raise _damaged(
                folder,
                f"offsets.npy tells of {len(offsets) - 1} documents and {offsets[-1:]} tokens, "
                f"meta.json of {sizes['documents']} and {sizes['tokens']}",
            )
        return Documents(tokens, offsets, trained)

    @property
    def _is_chat(self) -> bool:
        return self.meta["kind"] == "chat"


@dataclass(frozen=True)
class Part:
    """Documents of one shard, encoded, on disk; what a tokenisation task hands back."""

    index: int
    folder: str
    documents: int
    tokens: int
    empty: int
    """Documents left out because they hold no text."""

    def path(self, kind: str) -> Path:
        """`tokens`, `trained`, or `index` (uint64 [2, documents]: lengths, hashes of the text)."""
        return Path(self.folder) / f"part_{self.index:06d}.{kind}"


def merge_parts(
    store: Path,
    parts: Sequence[Part],
    split_of: np.ndarray,
    lengths: np.ndarray,
    *,
    vocab_size: int,
    dtype: np.dtype,
    chat: bool,
) -> tuple[dict[str, dict[str, int]], np.ndarray]:
    """Write `train/` and `validation/` of `store` from `parts`, documents in their order.

    Args:
        split_of: int8 [documents], over all parts: index into `SPLITS`, or -1 for a document left out.
        lengths: int64 [documents].

    Returns:
        sizes of both splits for `meta.json`, and int64 [vocab_size]: how often each token is trained on in `train`.
    """
    sizes = {}
    counts = np.zeros(vocab_size, np.int64)
    for index, split in enumerate(SPLITS):
        chosen = split_of == index
        folder = store / split
        trained_tokens = 0
        with writing(folder), contextlib.ExitStack() as stack:
            folder.mkdir()
            np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64))
            tokens_file = stack.enter_context(open(folder / "tokens.bin", "wb"))
            trained_file = stack.enter_context(open(folder / "trained.bin", "wb")) if chat else None
            for tokens, trained in _chosen_pieces(parts, chosen, lengths, dtype, chat):
                tokens_file.write(tokens.data)
                if trained_file is not None and trained is not None:
                    trained_file.write(trained.data)
                    tokens = tokens[trained == 1]
                trained_tokens += len(tokens)
                if split == "train":
                    seen = np.bincount(tokens)
                    counts[: len(seen)] += seen
        sizes[split] = {
            "documents": int(chosen.sum()),
            "tokens": int(lengths[chosen].sum()),
            "trained_tokens": trained_tokens,
        }
    return sizes, counts


def unigram_entropy_nats(counts: np.ndarray) -> float:
    """Entropy of the token frequencies: the loss of a model that knows them and nothing else."""
    seen = counts[counts > 0]
    share = seen / max(int(seen.sum()), 1)
    return float(-(share * np.log(share)).sum())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` (disk full, quota, permissions) into a DataError that says how much is free."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            free_bytes = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
            error.add_note(f"{free_bytes / 2**30:.2f} GiB are free there")
        raise DataError(
            "the token store cannot be written",
            at=str(path),
            why="; ".join([error.strerror or str(error), *getattr(error, "__notes__", [])]),
            try_="free space there, or set FARSPAN_CACHE to a folder on a larger disk; nothing was left behind",
        ) from error


def _chosen_pieces(
    parts: Sequence[Part], chosen: np.ndarray, lengths: np.ndarray, dtype: np.dtype, chat: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Runs of neighbouring chosen documents, cut to at most 4 Mi tokens: few copies, little memory."""
    first = 0
    for part in parts:
        mine = chosen[first : first + part.documents]
        offsets = np.concatenate([[0], np.cumsum(lengths[first : first + part.documents])])
        first += part.documents
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mine.astype(np.int8), [0]])))
        if len(edges) == 0:
            continue
        tokens = _map(part.path("tokens"), dtype, part.tokens)
        trained = _map(part.path("trained"), np.dtype(np.uint8), part.tokens) if chat else None
        for begin, end in offsets[edges.reshape(-1, 2)]:
            for start in range(int(begin), int(end), _COPY_TOKENS):
                piece = slice(start, min(start + _COPY_TOKENS, int(end)))
                yield tokens[piece], None if trained is None else trained[piece]


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size_bytes = path.stat().st_size
    if size_bytes != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {size_bytes} bytes, {count} x {dtype.itemsize} were written")
    if count == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(count,))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        why = "meta.json is not of a token store"
    except (OSError, ValueError) as error:
        meta, why = None, f"meta.json: {error}"
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(
            f"{path} is not a token store",
            at=str(path),
            why=why,
            try_="remove the folder if nothing else needs it, or set FARSPAN_CACHE to another place",
        )
    return meta


def _damaged(path: Path, why: str) -> StoreDamaged:
    return StoreDamaged(
        "a token store is damaged",
        at=str(path),
        why=why,
        try_="run `farspan data JOB`: it writes the store anew",
    )
