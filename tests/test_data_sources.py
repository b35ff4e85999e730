"""Which documents a data definition names, and what every kind of bad input says."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sysconfig
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.errors import DataError
from farspan.trainer.config import ChatData, TextData
from farspan.trainer.data import sources
from farspan.trainer.data.reading import read_shard
from farspan.trainer.data.sources import Shard, enumerate_inputs, stdlib_files


def documents(data: TextData | ChatData) -> list:
    return [document for shard in enumerate_inputs(data).shards for _, document in read_shard(shard, data)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_files_and_globs_are_read_in_sorted_order_without_repeats(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", ".hidden.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name}\r\né".encode())
    data = TextData((f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt", f"{tmp_path}/deep/d.md"))
    assert documents(data) == [f"{name}\r\né" for name in ("a.txt", "b.txt", "deep/er/c.txt", "deep/d.md")]


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents(TextData("a.txt")) == documents(TextData("~/*.txt")) == ["one"]


def test_stdlib_is_this_pythons_own_source_without_tests() -> None:
    files = stdlib_files()
    root = Path(sysconfig.get_path("stdlib"))
    assert files == sorted(files) and len(files) > 300
    assert {str(root / "argparse.py"), str(root / "json" / "decoder.py")} <= set(files)
    assert not [f for f in files if {"site-packages", "test"} & set(Path(f).relative_to(root).parts)]
    assert (
        documents(TextData("stdlib", limit_documents=3))
        == [text for text in (Path(f).read_bytes().decode() for f in files) if text][:3]
    )


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.one_of(st.just(""), st.text(max_size=12).map(lambda text: json.dumps({"text": text})))),
    cuts=st.lists(st.integers(1, 300), max_size=6),
    last_newline=st.booleans(),
)
def test_cutting_a_jsonl_file_anywhere_loses_and_repeats_nothing(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int], last_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    path.write_text("\n".join(lines) + ("\n" if last_newline else ""))
    edges = sorted({0, path.stat().st_size, *(cut for cut in cuts if cut < path.stat().st_size)})
    data = TextData(str(path))
    found = [
        (str(place), text)
        for start, stop in pairwise(edges)
        for place, text in read_shard(Shard("jsonl", (str(path),), start, stop), data)
    ]
    expected = [(f"{path}:{n}", json.loads(line)["text"]) for n, line in enumerate(lines, 1) if line]
    assert found == expected


def test_large_jsonl_is_cut_into_shards_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 100)
    texts = [f"text {i} " * (i % 7) for i in range(200)]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    assert len(enumerate_inputs(TextData(str(path))).shards) > 20
    assert documents(TextData(str(path))) == texts


def test_gzip_and_another_text_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"body": "one"}\n\n{"body": "two"}'))
    assert documents(TextData(str(path), text_field="body")) == ["one", "two"]


def test_parquet_row_groups_become_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 2000)
    texts = [f"row {i} " * 20 for i in range(300)]
    pq.write_table(pa.table({"id": list(range(300)), "text": texts}), tmp_path / "rows.parquet", row_group_size=10)
    data = TextData(str(tmp_path / "rows.parquet"))
    shards = enumerate_inputs(data).shards
    assert len(shards) > 3
    assert documents(data) == texts
    assert str(next(read_shard(shards[1], data))[0]).endswith(f", row {10 * shards[1].start + 1}")


def test_chat_rows_from_parquet_lose_the_nulls_arrow_adds(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "x"}]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "chat.parquet")
    assert documents(ChatData(str(tmp_path / "chat.parquet"))) == [messages]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    """No hub here: `datasets` itself reads local json under the name of a hub id."""
    import datasets

    texts = [f"text {i}" for i in range(50)]
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t} for t in texts[n::2]])) for n in (0, 1)]
    options = {"data_files": {"train": files}, "cache_dir": str(tmp_path / "cache")}
    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder("json", **options))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **rest: load("json", **options, **rest))
    monkeypatch.setattr(sources, "SHARD_ROWS", 20)
    data = TextData("owner/name", streaming=streaming)
    assert documents(data) == texts[0::2] + texts[1::2]
    assert len(enumerate_inputs(data).shards) == (2 if streaming else 3)
    first = enumerate_inputs(data).fingerprint
    files.append(str(write_jsonl(tmp_path / "2.jsonl", [{"text": "new"}])))
    assert enumerate_inputs(data).fingerprint != first
    with pytest.raises(DataError, match="neither a file nor a `datasets` id"):
        enumerate_inputs(TextData("owner/name", split="nowhere"))


def test_shards_survive_pickling(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    shards = enumerate_inputs(TextData(str(path))).shards
    assert pickle.loads(pickle.dumps(shards)) == shards


def test_fingerprint_follows_content_not_place_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    digest = enumerate_inputs(TextData(str(first))).fingerprint
    assert enumerate_inputs(TextData(str(second))).fingerprint == digest
    second.write_text("sane")
    assert enumerate_inputs(TextData(str(second))).fingerprint != digest
    monkeypatch.setattr(sources, "HASHED_BYTES", 0)
    large = enumerate_inputs(TextData(str(first))).fingerprint
    assert enumerate_inputs(TextData(str(first))).fingerprint == large
    stat = first.stat()
    first.write_text("lame")
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and mtime as before
    assert enumerate_inputs(TextData(str(first))).fingerprint != large


CHAT_OK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BAD_ROWS = {
    "not json": (TextData, b'{"text": "a"}\n{"text": \n', "not a JSON object", "rows.jsonl:2"),
    "not an object": (TextData, b'\n\n["a"]\n', "not a JSON object", "rows.jsonl:3"),
    "not utf-8": (TextData, b'{"text": "\xff"}\n', "not a JSON object", "rows.jsonl:1"),
    "nested without end": (TextData, b"[" * 100_000 + b"\n", "not a JSON object", "rows.jsonl:1"),
    "absurd number": (TextData, b'{"text": ' + b"9" * 5000 + b"}\n", "not a JSON object", "rows.jsonl:1"),
    "missing field": (TextData, b'{"body": "a", "id": 1}\n', "no field 'text'", "body, id"),
    "null text": (TextData, b'{"text": null}\n', "null, not text", "rows.jsonl:1"),
    "number": (TextData, b'{"text": 7}\n', "int, not text", "rows.jsonl:1"),
    "lone surrogate": (TextData, b'{"text": "ab\\ud800"}\n', "UTF-8", "character 2"),
    "no messages": (ChatData, b'{"messages": []}\n', "not a conversation", "at least one message"),
    "message is text": (ChatData, b'{"messages": ["hi"]}\n', "not a conversation", "message 0 has no role"),
    "no content": (ChatData, b'{"messages": [{"role": "user"}]}\n', "not a conversation", "neither content"),
    "conversation": (ChatData, b'{"conversation": []}\n', "no field 'messages'", "conversation"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, case: str) -> None:
    kind, content, what, detail = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        documents(kind(str(path)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and what in lines[0] and detail in str(caught.value), str(caught.value)
    assert caught.value.exit_code == 2


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "plain.txt").write_text("plain")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    whole = gzip.compress(b'{"text": "one"}\n' * 50)
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": pa.array(["a", None])}), tmp_path / "null.parquet")
    cases = [
        (TextData(f"{tmp_path}/nothing.txt"), "there is no file"),
        (TextData("nowhere"), "there is no file"),
        (TextData(f"{tmp_path}/*.none"), "matches no file"),
        (TextData(str(tmp_path)), "is a folder"),
        (TextData(()), "there is no document to train on"),
        (TextData(f"{tmp_path}/latin.txt"), "not UTF-8"),
        (TextData(f"{tmp_path}/bad.parquet"), "not a readable parquet"),
        (TextData(f"{tmp_path}/torn.jsonl.gz"), "not a whole gzip"),
        (TextData(f"{tmp_path}/other.parquet"), "no field 'text'"),
        (TextData(f"{tmp_path}/null.parquet"), "null, not text"),
        (ChatData(f"{tmp_path}/plain.txt"), "cannot hold conversations"),
    ]
    for data, what in cases:
        with pytest.raises(DataError, match=what) as caught:
            documents(data)
        assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(DataError) as caught:
        documents(TextData(f"{tmp_path}/latin.txt"))
    assert caught.value.at.endswith("latin.txt, byte 3")
    with pytest.raises(DataError) as caught:
        documents(TextData(f"{tmp_path}/other.parquet"))
    assert "body, id" in caught.value.why
