"""The token store: what is in it, when it is made anew, and that nothing half-done is ever found."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from farspan.errors import DataError
from farspan.trainer.config import ChatData, Evaluate, RandomModel, TextData
from farspan.trainer.data import prepare as prepare_module
from farspan.trainer.data import sources
from farspan.trainer.data.packing import PackedStream, check_lengths
from farspan.trainer.data.prepare import default_cache_root, prepare
from farspan.trainer.data.store import Documents, TokenStore

MODEL = RandomModel(vocab=300)
TEXTS = [f"document {i}: " + "alpha beta gamma delta "[: i % 23] * (i % 5 + 1) for i in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return TextData(str(tmp_path / "rows.jsonl"))


@pytest.fixture
def chats(tmp_path: Path) -> ChatData:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"answer {i}"}]}
        for i in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatData(str(tmp_path / "chats.jsonl"))


def texts_of(store: TokenStore, documents: Documents) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    return [tokenizer.decode(documents.tokens(i)) for i in range(len(documents))]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "tokens").iterdir())


def test_store_holds_every_document_in_order_with_its_end(tmp_path: Path, data: TextData) -> None:
    path = prepare(data, MODEL, Evaluate(share=0.2), cache_root=tmp_path / "cache")
    store = TokenStore(path)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    ids = {text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS}
    splits = [[s.tokens(i).tolist() for i in range(len(s))] for s in (store.train, store.validation)]
    assert sorted(splits[0] + splits[1]) == sorted(ids.values())
    for split in splits:
        assert split == [ids[text] for text in TEXTS if ids[text] in split], "order of the data"
    assert 3 <= len(splits[1]) <= 24, "about a fifth of 60"
    assert store.train.lengths.tolist() == [len(tokens) for tokens in splits[0]]
    assert store.train.tokens(3, 2, 5).tolist() == splits[0][3][2:5]
    assert store.train.tokens(3, 2, 10**6).tolist() == splits[0][3][2:]
    assert store.train.trained(0).tolist() == [1] * len(splits[0][0])
    counts = Counter(token for tokens in splits[0] for token in tokens)
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert store.meta["unigram_entropy_nats"] == pytest.approx(entropy)
    assert store.meta["documents"] == 60 and store.meta["tokens"] == sum(map(len, ids.values()))
    assert store.meta["splits"]["train"] == {"documents": len(splits[0]), "tokens": total, "trained_tokens": total}
    assert store.meta["eos_id"] == tokenizer.eos_token_id and store.meta["pad_id"] == tokenizer.pad_token_id
    assert (path / "train" / "tokens.bin").stat().st_size == 2 * total
    assert not (path / "train" / "trained.bin").exists() and not (path / "parts").exists()
    assert entries(tmp_path / "cache") == [path.name]


def test_chat_store_keeps_the_mask_and_packs_follow_it(tmp_path: Path, chats: ChatData) -> None:
    store = TokenStore(prepare(chats, RandomModel(vocab=270), Evaluate(share=0.2), cache_root=tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    assert tokenizer.eos_token == "<|im_end|>"
    seen = 0
    for documents in (store.train, store.validation):
        assert documents.has_mask
        for index in range(len(documents)):
            ids, trained = documents.tokens(index), documents.trained(index)
            number = tokenizer.decode(ids).split("answer ")[1].split("<")[0]
            assert tokenizer.decode(ids[trained == 1]) == f"answer {number}<|im_end|>"
            seen += 1
    assert seen == 12
    trained = store.train.trained(0, 0)
    assert store.meta["splits"]["train"]["trained_tokens"] == sum(
        int(store.train.trained(i).sum()) for i in range(len(store.train))
    )
    pack = PackedStream(store.train, 4096, pack=False).pack(0)
    assert 0 < pack.trained_tokens < pack.tokens and trained[0] == 0
    answer = tokenizer.decode(pack.labels[pack.labels >= 0])
    assert answer.startswith("answer ") and answer.endswith("<|im_end|>")


def test_what_was_made_is_found_again_and_what_changed_is_made_anew(
    tmp_path: Path, data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    share = Evaluate(share=0.1)
    first = prepare(data, MODEL, share, cache_root=cache)

    def never(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    same = [
        data,
        data.model_copy(update={"context": 64, "on_too_long": "split", "pack": False}),
    ]
    for again in same:
        assert prepare(again, MODEL, share, cache_root=cache, map_tasks=never) == first
    assert prepare(data, MODEL.model_copy(update={"layers": 9}), share, cache_root=cache, map_tasks=never) == first
    paths = {
        first,
        prepare(data, RandomModel(vocab=301), share, cache_root=cache),
        prepare(data, MODEL, Evaluate(share=0.2), cache_root=cache),
        prepare(data.model_copy(update={"limit_documents": 7}), MODEL, share, cache_root=cache),
    }
    with open(str(data.source), "a") as file:
        file.write('{"text": "one more"}\n')
    paths.add(prepare(data, MODEL, share, cache_root=cache))
    monkeypatch.setattr(prepare_module, "CODE_VERSION", 10**6)
    paths.add(prepare(data, MODEL, share, cache_root=cache))
    assert len(paths) == 6 and entries(cache) == sorted(path.name for path in paths)


def test_tasks_may_run_anywhere_and_change_nothing(
    tmp_path: Path, data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 300)
    seen: list[int] = []

    def elsewhere(function: Callable, tasks: Any) -> list:
        seen.append(len(tasks))
        results = {
            task.index: pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(task))) for task in tasks[::-1]
        }
        return [pickle.loads(pickle.dumps(results[task.index])) for task in tasks]

    parallel = prepare(data, MODEL, Evaluate(share=0.2), cache_root=tmp_path / "a", map_tasks=elsewhere)
    plain = prepare(data, MODEL, Evaluate(share=0.2), cache_root=tmp_path / "b")
    assert seen and seen[0] > 5
    for file in (
        "train/tokens.bin",
        "train/offsets.npy",
        "validation/tokens.bin",
        "meta.json",
        "tokenizer/tokenizer.json",
    ):
        assert (parallel / file).read_bytes() == (plain / file).read_bytes()
    seen.clear()
    limited = data.model_copy(update={"limit_documents": 20})
    store = TokenStore(prepare(limited, MODEL, Evaluate(share=0), cache_root=tmp_path / "a", map_tasks=elsewhere))
    assert texts_of(store, store.train) == [f"{text}<|endoftext|>" for text in TEXTS[:20]]
    assert seen[0] == 1, "waves, the first of one task"


def test_split_by_hash_is_of_the_text_alone_and_never_empty(tmp_path: Path) -> None:
    held_out = prepare_module._held_out
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)
    assert 0.045 < held_out(hashes, 0.05).mean() < 0.055
    assert not (held_out(hashes, 0.05) & ~held_out(hashes, 0.1)).any()
    assert held_out(hashes, 0).sum() == 0 and held_out(hashes[:1], 0.99).sum() == 0
    for share in (1e-9, 1 - 1e-9):
        for count in (2, 3, 50):
            assert 0 < held_out(hashes[:count], share).sum() < count
    assert held_out(np.array([5, 5], np.uint64), 0.5).sum() == 1


def test_empty_documents_are_counted_and_an_empty_set_refused(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", " \n"), ("c", ""), ("d", "two")):
        (tmp_path / f"{name}.txt").write_text(text)
    store = TokenStore(prepare(TextData(f"{tmp_path}/*.txt"), MODEL, Evaluate(), cache_root=tmp_path / "cache"))
    assert store.meta["counts"]["empty_documents"] == 2 and len(store.train) == len(store.validation) == 1
    (tmp_path / "none.jsonl").write_text("")
    for source, why in (
        (f"{tmp_path}/[bc].txt", "2 documents were read"),
        (f"{tmp_path}/none.jsonl", "every file named is empty"),
    ):
        with pytest.raises(DataError, match=r"no document to train on") as caught:
            prepare(TextData(source), MODEL, Evaluate(), cache_root=tmp_path / "cache")
        assert why in caught.value.why
    assert len(entries(tmp_path / "cache")) == 1


def test_a_damaged_store_is_made_anew_and_a_foreign_folder_refused(tmp_path: Path, data: TextData) -> None:
    cache = tmp_path / "cache"
    path = prepare(data, MODEL, Evaluate(), cache_root=cache)
    tokens = (path / "train" / "tokens.bin").read_bytes()
    for damage in (
        lambda: (path / "train" / "tokens.bin").write_bytes(tokens[:-2]),
        lambda: (path / "train" / "tokens.bin").write_bytes(tokens + b"  "),
        lambda: (path / "train" / "offsets.npy").write_bytes(b""),
        lambda: (path / "validation" / "tokens.bin").unlink(),
    ):
        damage()
        with pytest.raises(DataError, match="damaged"):
            TokenStore(path)
        assert prepare(data, MODEL, Evaluate(), cache_root=cache) == path
        assert (path / "train" / "tokens.bin").read_bytes() == tokens
        assert entries(cache) == [path.name]
    (path / "meta.json").write_text('{"mine": 1}')
    with pytest.raises(DataError, match="is not a token store"):
        prepare(data, MODEL, Evaluate(), cache_root=cache)
    assert (path / "meta.json").read_text() == '{"mine": 1}'


def test_disk_full_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A real refusal of the kernel: files of this process may not grow over 100 000 bytes."""
    random = np.random.default_rng(0)
    (tmp_path / "big.txt").write_text("".join(map(chr, random.integers(97, 123, 150_000))))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written") as caught:
            prepare(TextData(str(tmp_path / "big.txt")), MODEL, Evaluate(), cache_root=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in caught.value.why and "GiB are free" in caught.value.why
    assert "FARSPAN_CACHE" in caught.value.try_
    assert entries(tmp_path / "cache") == []


def test_cache_that_cannot_be_made(tmp_path: Path, data: TextData) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(data, MODEL, Evaluate(), cache_root=tmp_path / "file")


def test_two_at_once_make_one_store(tmp_path: Path, data: TextData) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(prepare, data, MODEL, Evaluate(), cache_root=tmp_path / "cache") for _ in range(2)]
    first, second = (job.result() for job in jobs)
    assert first == second and entries(tmp_path / "cache") == [first.name]
    assert TokenStore(first).meta["documents"] == 60


def test_what_a_killed_preparer_left_is_swept_by_the_next(tmp_path: Path, data: TextData) -> None:
    cache = tmp_path / "cache"
    program = (
        "import os, signal, sys\n"
        "from farspan.trainer.config import Evaluate, RandomModel, TextData\n"
        "from farspan.trainer.data.prepare import prepare\n"
        "kill = lambda line: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(TextData(sys.argv[1]), RandomModel(vocab=300), Evaluate(), cache_root=sys.argv[2], progress=kill)\n"
    )
    root = Path(__file__).parent.parent / "infra" / "py"
    command = [sys.executable, "-c", program, str(data.source), str(cache)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}).returncode == -9
    assert len(entries(cache)) == 2, "a folder and its lock"
    path = prepare(data, MODEL, Evaluate(), cache_root=cache)
    assert entries(cache) == [path.name]


def test_a_bad_document_in_a_task_is_named_and_nothing_is_left(tmp_path: Path, chats: ChatData) -> None:
    with open(str(chats.source), "a") as file:
        file.write('{"messages": [{"role": "user", "content": "nobody answers"}]}\n')
    with pytest.raises(DataError, match="without assistant turn") as caught:
        prepare(chats, MODEL, Evaluate(), cache_root=tmp_path / "cache")
    assert caught.value.at == f"{chats.source}:13"
    assert entries(tmp_path / "cache") == []


def test_check_lengths_looks_at_both_splits(tmp_path: Path, data: TextData) -> None:
    store = TokenStore(prepare(data, MODEL, Evaluate(share=0.2), cache_root=tmp_path / "cache"))
    longest = int(max(store.train.lengths.max(), store.validation.lengths.max()))
    check_lengths(store, data.model_copy(update={"context": longest}))
    check_lengths(store, data.model_copy(update={"context": 16, "on_too_long": "drop"}))
    with pytest.raises(DataError, match="longer than the context"):
        check_lengths(store, data.model_copy(update={"context": longest - 1}))


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("FARSPAN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_root() == Path("/home/somebody/.cache/farspan")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_root() == Path("/x/farspan")
    monkeypatch.setenv("FARSPAN_CACHE", "/f")
    assert default_cache_root() == Path("/f")
