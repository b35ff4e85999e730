"""Read the documents of one shard, one at a time, so that memory holds a line, a file or a batch of rows, not the data.

Everything a row can do wrong ends here, in an error that names the file and the line or row: what passes is a text
that UTF-8 can encode, or a list of messages with roles.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from farspan.errors import DataError
from farspan.trainer.config import ChatData, TextData
from farspan.trainer.data.sources import Shard, unreadable

PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True)
class Place:
    """Where a document is. The line number of a jsonl range is counted only when somebody prints it."""

    path: str
    unit: str = ""
    """`line` or `row`; empty for a plain file."""
    number: int = 0
    """Counted from 1 at `start_byte`."""
    start_byte: int = 0

    def __str__(self) -> str:
        if not self.unit:
            return self.path
        before = _lines_before(self.path, self.start_byte) if self.start_byte else 0
        separator = ":" if self.unit == "line" else f", {self.unit} "
        return f"{self.path}{separator}{before + self.number}"


def read_shard(shard: Shard, data: TextData | ChatData) -> Iterator[tuple[Place, Any]]:
    """Documents of `shard` in order: `(place, text)` of a `TextData`, `(place, messages)` of a `ChatData`.

    Raises:
        DataError: undecodable bytes, a line that is not a JSON object, a missing field, a value of the wrong type.
    """
    if shard.kind == "text":
        for path in shard.paths:
            place = Place(path)
            yield place, _checked_text(_read_text(path), place, "the file")
        return
    field = data.text_field if isinstance(data, TextData) else data.messages_field
    rows = {"jsonl": _jsonl_rows, "parquet": _parquet_rows, "dataset": _dataset_rows}[shard.kind]
    for place, row in rows(shard, field):
        if field not in row:
            raise _missing_field(field, sorted(map(str, row)), str(place), data)
        if isinstance(data, TextData):
            yield place, _checked_text(row[field], place, field)
        else:
            yield place, _checked_messages(row[field], place, field)


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text",
            at=f"{path}, byte {error.start}",
            why=f"byte 0x{error.object[error.start]:02x} cannot be decoded: {error.reason}",
            try_=f"convert it (iconv -f latin1 -t utf8 {path}), or leave it out of data.source",
        ) from error


def _jsonl_rows(shard: Shard, field: str) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Lines that begin in [start, stop), so that neighbouring shards share no line and leave none out."""
    path = shard.paths[0]
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            position = shard.start
            if position > 0:
                file.seek(position - 1)
                position += len(file.readline()) - 1
            number = 0 if position == shard.start else 1
            while shard.stop is None or position < shard.stop:
                line = file.readline()
                if not line:
                    return
                position += len(line)
                number += 1
                if line.strip():
                    place = Place(path, "line", number, shard.start)
                    yield place, _parse_object(line, place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is not a whole gzip file",
            at=path,
            why=str(error),
            try_="write the file again, or leave it out of data.source",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _parse_object(line: bytes, place: Place) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
        why = f"the line holds a JSON {type(row).__name__}, not an object with fields"
    except (ValueError, RecursionError) as error:
        row, why = None, f"{error} (the line begins {line[:60]!r})"
    if not isinstance(row, dict):
        raise DataError(
            "a line of jsonl is not a JSON object",
            at=str(place),
            why=why,
            try_="correct or remove that line; each line is one object in UTF-8",
        )
    return row


def _parquet_rows(shard: Shard, field: str) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    from pyarrow import ArrowException, parquet

    path = shard.paths[0]
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                # One row without the field: the caller reports the columns that are there.
                yield Place(path), dict.fromkeys(names)
                return
            stop = file.num_row_groups if shard.stop is None else shard.stop
            number = sum(file.metadata.row_group(group).num_rows for group in range(shard.start))
            groups = list(range(shard.start, stop))
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield Place(path, "row", number), {field: value}
    except ArrowException as error:
        raise DataError(
            f"{path} is not a readable parquet file",
            at=path,
            why=str(error),
            try_="write the file again, or leave it out of data.source",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _dataset_rows(shard: Shard, field: str) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    import datasets

    name = shard.paths[0]
    where, first = f"{name}[{shard.split}]", shard.start
    try:
        rows = datasets.load_dataset(name, split=shard.split, streaming=shard.streaming)
        if shard.streaming:
            where, first = f"{where} shard {shard.start} of {shard.stop}", 0
            rows = rows.shard(num_shards=shard.stop, index=shard.start)
        else:
            rows = rows.select(range(shard.start, shard.stop or len(rows)))
        for number, row in enumerate(rows, first + 1):
            yield Place(where, "row", number), row
    except Exception as error:  # network, decoding and loading errors share no base class
        raise DataError(
            f"the `datasets` id {name!r} stopped in the middle",
            at=where,
            why=f"{type(error).__name__}: {str(error)[:400]}",
            try_="start again; without data.streaming it is downloaded first, and a download resumes",
        ) from error


def _missing_field(field: str, found: list[str], at: str, data: TextData | ChatData) -> DataError:
    option = "text_field" if isinstance(data, TextData) else "messages_field"
    return DataError(
        f"a row has no field {field!r}",
        at=at,
        why=f"its fields are {', '.join(found) if found else 'none'}",
        try_=f"set data.{option} to one of them",
    )


def _checked_text(value: Any, place: Place, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{field} of a row is {'null' if value is None else type(value).__name__}, not text",
            at=str(place),
            why=f"its value is {value!r:.80}",
            try_="correct or remove that row, or set data.text_field to the field that holds the text",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field} of a row cannot be written as UTF-8",
            at=str(place),
            why=f"character {error.start} is the lone surrogate {value[error.start]!r}",
            try_="correct or remove that row",
        ) from error
    return value


def _checked_messages(value: Any, place: Place, field: str) -> list[dict[str, Any]]:
    def refuse(why: str) -> DataError:
        return DataError(
            f"{field} of a row is not a conversation",
            at=str(place),
            why=why,
            try_='write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], '
            "or set data.messages_field",
        )

    if not isinstance(value, list) or not value:
        raise refuse(f"a list with at least one message is needed, this is {value!r:.80}")
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise refuse(f"message {number} has no role: {message!r:.80}")
        if message.get("content") is None and message.get("tool_calls") is None:
            raise refuse(f"message {number} ({message['role']}) has neither content nor tool_calls")
        if isinstance(message.get("content"), str):
            _checked_text(message["content"], place, f"message {number}")
    # Arrow gives every struct field to every message, null where there was none; a template must not see those.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _lines_before(path: str, start_byte: int) -> int:
    lines, left = 0, start_byte
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
