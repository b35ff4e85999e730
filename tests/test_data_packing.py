"""Pieces and packs: every token once, nothing over the context, targets and masks equal to a plain loop."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.errors import DataError
from farspan.trainer.config import OnTooLong
from farspan.trainer.data import packing
from farspan.trainer.data.packing import (
    IGNORED_LABEL,
    Pack,
    PackedStream,
    best_fit,
    plan_pieces,
    validation_packs,
)
from farspan.trainer.data.store import Documents

MODES = st.sampled_from(["truncate", "split", "drop"])
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def make_documents(lengths: list[int], chat_seed: int | None = None) -> Documents:
    """Token values say where they are from: 1000 * document + position."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.arange(n) + 1000 * i for i, n in enumerate(lengths)] or [[]]).astype(np.uint32)
    trained = None
    if chat_seed is not None:
        trained = np.random.default_rng(chat_seed).integers(0, 2, len(tokens)).astype(np.uint8)
    return Documents(tokens, offsets, trained)


def expected_rows(documents: Documents, context: int, mode: OnTooLong) -> Counter:
    """(token, label, position) of one epoch, one row at a time."""
    rows: Counter = Counter()
    for index, length in enumerate(documents.lengths.tolist()):
        tokens, trained = documents.tokens(index).tolist(), documents.trained(index).tolist()
        if length > context and mode == "drop":
            continue
        if length > context and mode == "truncate":
            tokens, trained = tokens[:context], trained[:context]
            if documents.has_mask and not any(trained[1:]):
                continue
        for position, token in enumerate(tokens):
            last = position + 1 == len(tokens)
            label = IGNORED_LABEL if last or not trained[position + 1] else tokens[position + 1]
            rows[token, label, position % context] += 1
    return rows


def rows_of(packs: list[Pack]) -> Counter:
    return Counter(row for p in packs for row in zip(p.input_ids.tolist(), p.labels.tolist(), p.position_ids.tolist()))


def check_shape(pack: Pack, context: int) -> None:
    assert pack.tokens == len(pack.input_ids) == len(pack.labels) == len(pack.position_ids) <= context
    assert pack.input_ids.dtype == pack.labels.dtype == pack.position_ids.dtype == np.int64
    assert pack.cu_seqlens.dtype == np.int32 and pack.cu_seqlens[-1] == pack.tokens
    assert pack.pieces == len(pack.cu_seqlens) - 1
    assert pack.trained_tokens == (pack.labels != IGNORED_LABEL).sum()
    assert np.flatnonzero(pack.position_ids == 0).tolist() == pack.cu_seqlens[:-1].tolist()
    inside = np.ones(pack.tokens, bool)
    inside[pack.cu_seqlens[:-1]] = False
    assert (np.diff(pack.input_ids)[inside[1:]] == 1).all(), "a piece is one run of one document"


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    context=st.integers(2, 50),
    mode=MODES,
    pack=st.booleans(),
    seed=st.integers(0, 3),
    chat=st.one_of(st.none(), st.integers(0, 5)),
)
def test_an_epoch_holds_every_kept_token_once_with_its_target(
    lengths: list[int], context: int, mode: OnTooLong, pack: bool, seed: int, chat: int | None
) -> None:
    documents = make_documents(lengths, chat)
    expected = expected_rows(documents, context, mode)
    if not expected:
        with pytest.raises(DataError, match="nothing is left"):
            PackedStream(documents, context, mode, pack, seed)
        return
    stream = PackedStream(documents, context, mode, pack, seed)
    first = 0
    for epoch in range(3):
        count = stream.packs_in_epoch(epoch)
        packs = [stream.pack(index) for index in range(first, first + count)]
        assert [stream.epoch_of(index) for index in range(first, first + count)] == [epoch] * count
        for each in packs:
            check_shape(each, context)
            assert pack or each.pieces == 1
        assert rows_of(packs) == expected
        first += count
    assert stream.counts["tokens"] == sum(expected.values())
    assert stream.efficiency == pytest.approx(sum(expected.values()) / (stream.packs_in_epoch(0) * context))


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, context=st.integers(2, 50), mode=MODES)
def test_counts_of_what_is_too_long(lengths: list[int], context: int, mode: OnTooLong) -> None:
    pieces = plan_pieces(np.array(lengths), context, mode)
    long = [n for n in lengths if n > context]
    assert pieces.too_long == len(long)
    assert pieces.dropped_tokens == (sum(long) if mode == "drop" else 0)
    assert pieces.truncated_tokens == (sum(n - context for n in long) if mode == "truncate" else 0)
    assert pieces.split_pieces == (sum(len(range(0, n, context)) for n in long) if mode == "split" else 0)
    assert int(pieces.lengths.sum()) == sum(lengths) - pieces.dropped_tokens - pieces.truncated_tokens
    assert len(pieces) == 0 or (pieces.lengths.min() > 0 and pieces.lengths.max() <= context)


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Rooms left, by the definition: quadratic, longest first, smallest room that is large enough."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def first_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in lengths:
        for index, room in enumerate(rooms):
            if room >= length:
                rooms[index] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=60), capacity=st.integers(30, 64))
def test_best_fit_equals_its_definition(lengths: list[int], capacity: int) -> None:
    bins = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[i] for i in members) for members in bins]
    assert sorted(rooms) == naive_best_fit(lengths, capacity)
    # Johnson 1973: at most 11/9 of the optimum and 4; the optimum is at least the total over the capacity.
    assert len(bins) <= 11 / 9 * max(first_fit(lengths, capacity), 1) + 4


def test_packs_are_nearly_full_and_never_more_than_first_fit_needs() -> None:
    random = np.random.default_rng(0)
    skewed = np.minimum(random.lognormal(5, 1.2, 9_000).astype(int) + 1, 2048)
    for lengths in (random.integers(1, 1000, 12_000), skewed):
        documents = Documents(np.zeros(lengths.sum(), np.uint16), np.concatenate([[0], np.cumsum(lengths)]))
        stream = PackedStream(documents, 2048, "error")
        least = -(-int(lengths.sum()) // 2048)
        assert stream.packs_in_epoch(0) <= 1.01 * least
        assert stream.packs_in_epoch(0) <= first_fit(lengths[:3000].tolist(), 2048) * len(lengths) / 3000 * 1.05
        assert stream.efficiency > 0.99


def test_same_number_same_pack_whatever_was_read_before() -> None:
    documents = make_documents(np.random.default_rng(1).integers(1, 90, 200).tolist())
    straight = PackedStream(documents, 64, "split", seed=3)
    count = sum(straight.packs_in_epoch(epoch) for epoch in range(3))
    read = [straight.pack(index) for index in range(count)]
    resumed = PackedStream(documents, 64, "split", seed=3)
    for index in [count - 1, 0, *np.random.default_rng(2).permutation(count).tolist()]:
        assert (resumed.pack(index).input_ids == read[index].input_ids).all()
    other = PackedStream(documents, 64, "split", seed=4)
    assert any((other.pack(i).input_ids[:1] != read[i].input_ids[:1]).any() for i in range(5))
    first_of_epochs = [read[straight.packs_in_epoch(0) * e].input_ids.tolist() for e in range(2)]
    assert first_of_epochs[0] != first_of_epochs[1]


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, context=st.integers(2, 50), pack=st.booleans(), seed=st.integers(0, 3))
def test_the_longest_pack_comes_first_and_all_others_stay(
    lengths: list[int], context: int, pack: bool, seed: int
) -> None:
    """So that a job runs out of memory in its first step, or not in this epoch."""
    documents = make_documents(lengths)
    stream = PackedStream(documents, context, "split", pack, seed)
    count = stream.packs_in_epoch(0)
    got = [stream.pack(index).input_ids.tolist() for index in range(count)]
    assert len(got[0]) == max(map(len, got))
    plan = packing._plan(stream._lengths, context, pack, (seed, 0))
    stream._planned = 0, plan  # the order of the shuffle alone
    shuffled = [stream.pack(index).input_ids.tolist() for index in range(count)]
    longest = max(range(count), key=lambda index: (len(shuffled[index]), -index))
    shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
    assert got == shuffled
    assert stream.epoch_of(count) == 1
    next_epoch = stream.pack(count).input_ids.tolist()
    stream._planned = 1, packing._plan(stream._lengths, context, pack, (seed, 1))
    assert stream.pack(count).input_ids.tolist() == next_epoch, "later epochs are as they are shuffled"


def test_the_pack_after_an_interruption_is_the_next_one() -> None:
    """2n packs in one go are n packs and, from a new stream, n more; on two dp groups every pack is seen once."""
    documents = make_documents(np.random.default_rng(5).integers(1, 90, 120).tolist())
    count = 2 * PackedStream(documents, 64, "split").packs_in_epoch(0)
    whole = PackedStream(documents, 64, "split")
    straight = [whole.pack(index).input_ids.tolist() for index in range(2 * count)]
    halves = [PackedStream(documents, 64, "split") for _ in range(2)]
    resumed = [halves[index // count].pack(index).input_ids.tolist() for index in range(2 * count)]
    assert resumed == straight
    steps = [straight[first : first + 4] for first in range(0, 2 * count, 4)]  # dp 2, accumulation 2
    groups = [[step[dp_index::2] for step in steps] for dp_index in range(2)]
    assert Counter(map(tuple, straight)) == Counter(tuple(p) for group in groups for step in group for p in step)
    assert len(groups[0][0][0]) == max(map(len, straight[: whole.packs_in_epoch(0)]))


def test_order_is_pinned() -> None:
    """A change of this order breaks the resuming of every run that is under way."""
    stream = PackedStream(make_documents([5, 3, 9, 2, 7, 4, 1]), 10, "error", seed=0)
    packs = [[n // 1000 for n in stream.pack(i).input_ids.tolist() if n % 1000 == 0] for i in range(4)]
    assert packs == PINNED


PINNED = [[4, 1], [2, 6], [3], [0, 5]]


def test_too_long_is_an_error_with_the_arithmetic() -> None:
    with pytest.raises(DataError) as caught:
        PackedStream(make_documents([5, 100, 30, 3]), 20, "error")
    text = str(caught.value)
    assert "2 of 4 documents" in text and "100 tokens, 80 more than the context of 20" in text
    assert "data.context=100" in text and "on_too_long=split" in text


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=40), context=st.integers(2, 50), limit=st.integers(1, 2000))
def test_validation_packs(lengths: list[int], context: int, limit: int) -> None:
    documents = make_documents(lengths)
    packs = validation_packs(documents, context, limit)
    for pack in packs:
        check_shape(pack, context)
    everything = expected_rows(documents, context, "split")
    got = rows_of(packs)
    assert got <= everything
    if sum(lengths) <= limit:
        assert got == everything
    elif lengths:
        assert 0 < got.total() <= max(limit, context)
    again = validation_packs(documents, context, limit)
    assert [p.input_ids.tolist() for p in packs] == [p.input_ids.tolist() for p in again]
