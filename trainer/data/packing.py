"""Put documents into packs of at most `context` tokens, and hand out any pack by its number.

A document longer than the context is refused, cut, split into pieces, or dropped; what fits is packed best-fit
decreasing: the longest piece first, each into the fullest pack that still has room. Best-fit leaves less than a percent
unused on ordinary data and never cuts a document to fill a pack. The pieces of an epoch are shuffled and packed in
windows of 4096, so the sort costs O(n log n) on small lists and long documents are not gathered at the start.

Packs are numbered over all epochs. The number alone decides the content, whatever the mesh: ranks of one sequence ask
for the same number, a resumed run asks for the next one, and no state has to be saved. The first pack of all is the
first epoch's longest: a job that runs out of memory does so in its first step and not after hours. (A later epoch may
hold a pack that is longer by what best-fit leaves unused, never longer than the context.) Shuffles come from raw PCG64
output, which numpy promises to keep, so a run may resume under another version of numpy.

Sources: Johnson 1973 (best-fit decreasing); Krell et al. 2021, Ding et al. 2024 (packing without truncation).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, replace

import numpy as np

from farspan.errors import DataError
from farspan.trainer.config import DataSource, OnTooLong
from farspan.trainer.data.store import Documents, TokenStore

IGNORED_LABEL = -100
WINDOW_PIECES = 4096
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class Pieces:
    """Document ranges that fit the context, ordered by document; three arrays [pieces], and what it took.

    Attributes:
        documents, starts, stops: int64; piece i is tokens `starts[i]:stops[i]` of document `documents[i]`.
        too_long: documents longer than the context.
        dropped_tokens, truncated_tokens: tokens left out with whole documents, and cut from the end of others.
        split_pieces: pieces that long documents were split into.
    """

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    too_long: int
    dropped_tokens: int
    truncated_tokens: int
    split_pieces: int

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts


def plan_pieces(lengths: np.ndarray, context: int, on_too_long: OnTooLong) -> Pieces:
    """Cut documents of `lengths` (int64 [documents]) to pieces of at most `context` tokens.

    Raises:
        DataError: a document is longer and `on_too_long` is "error".
    """
    documents = np.arange(len(lengths), dtype=np.int64)
    long = lengths > context
    too_long = int(long.sum())
    dropped = truncated = split = 0
    stops = lengths.astype(np.int64)
    starts = np.zeros_like(stops)
    if too_long and on_too_long == "error":
        raise _too_long(lengths, context)
    if on_too_long == "drop":
        dropped = int(lengths[long].sum())
        documents, starts, stops = documents[~long], starts[~long], stops[~long]
    elif on_too_long == "truncate":
        truncated = int((lengths[long] - context).sum())
        stops = np.minimum(stops, context)
    elif on_too_long == "split":
        counts = -(-lengths // context)
        split = int(counts[long].sum())
        documents = np.repeat(documents, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        starts = (np.arange(len(documents)) - first) * context
        stops = np.minimum(starts + context, lengths[documents])
    return Pieces(documents, starts, stops, too_long, dropped, truncated, split)


def check_lengths(store: TokenStore, data: DataSource) -> None:
    """Refuse documents, of either split, that are longer than the context when `on_too_long` is "error"."""
    if data.on_too_long == "error":
        lengths = np.concatenate([store.train.lengths, store.validation.lengths])
        if len(lengths) and int(lengths.max()) > data.context:
            raise _too_long(lengths, data.context)


def _too_long(lengths: np.ndarray, context: int) -> DataError:
    longest = int(lengths.max())
    count = int((lengths > context).sum())
    return DataError(
        f"{count} of {len(lengths)} documents are longer than the context",
        at=f"data.context = {context}, data.on_too_long = 'error'",
        why=f"the longest has {longest} tokens, {longest - context} more than the context of {context}",
        try_=f"--set data.context={longest}, or --set data.on_too_long=split, truncate or drop (chats are never split)",
    )


@dataclass(frozen=True)
class _Plan:
    """Which pieces make up which pack: pack i is `order[bounds[i]:bounds[i + 1]]`."""

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices into `lengths` in bins of at most `capacity`: longest first, into the fullest bin with room.

    O(n log n) comparisons; the open bins are one sorted list of `room * n + bin`.
    """
    size = max(len(lengths), 1)
    bins: list[list[int]] = []
    rooms: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        assert 0 < length <= capacity
        found = bisect_left(rooms, length * size)
        if found < len(rooms):
            room, target = divmod(rooms.pop(found), size)
        else:
            room, target = capacity, len(bins)
            bins.append([])
        bins[target].append(index)
        if room > length:
            insort(rooms, (room - length) * size + target)
    return bins


def _plan(lengths: np.ndarray, context: int, pack: bool, entropy: tuple[int, ...]) -> _Plan:
    """Shuffle pieces, pack them window by window, shuffle the packs."""
    random = np.random.PCG64(np.random.SeedSequence(entropy))
    shuffled = np.argsort(random.random_raw(len(lengths)), kind="stable")
    if not pack:
        return _Plan(shuffled, np.arange(len(lengths) + 1))
    bins: list[np.ndarray] = []
    for start in range(0, len(shuffled), WINDOW_PIECES):
        window = shuffled[start : start + WINDOW_PIECES]
        bins += [window[members] for members in best_fit(lengths[window], context)]
    packs = [bins[i] for i in np.argsort(random.random_raw(len(bins)), kind="stable").tolist()]
    bounds = np.cumsum([0, *map(len, packs)])
    return _Plan(np.concatenate(packs) if packs else shuffled, bounds)


def _longest_first(plan: _Plan, lengths: np.ndarray) -> _Plan:
    """The same packs, the one with the most rows (the earliest of equals) and the first one in each other's place."""
    longest = int(np.add.reduceat(lengths[plan.order], plan.bounds[:-1]).argmax())
    first, start, stop = int(plan.bounds[1]), int(plan.bounds[longest]), int(plan.bounds[longest + 1])
    if longest == 0:
        return plan
    order = plan.order
    sizes = np.diff(plan.bounds)
    sizes[[0, longest]] = sizes[[longest, 0]]
    swapped = np.concatenate([order[start:stop], order[first:start], order[:first], order[stop:]])
    return _Plan(swapped, np.concatenate([[0], np.cumsum(sizes)]))


@dataclass(frozen=True)
class Pack:
    """One sequence for the model: whole pieces, end to end, not padded. T <= context.

    Attributes:
        input_ids: int64 [T].
        labels: int64 [T]; the next token of the same document, or -100 where no loss is taken.
        position_ids: int64 [T]; from 0 in every piece.
        cu_seqlens: int32 [pieces + 1]; where pieces begin, as varlen attention takes it.
        tokens: T.
        trained_tokens: labels that are not -100.
        pieces: how many pieces.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    tokens: int
    trained_tokens: int
    pieces: int


class PackedStream:
    """Packs of a split, numbered from 0 over all epochs.

    Args:
        documents: the split.
        context: longest pack.
        on_too_long: what happens to a document longer than `context`.
        pack: False: one piece a pack.
        seed: of the order; each epoch has its own.

    Raises:
        DataError: a document is too long and that is an error, or nothing is left to train on.
    """

    def __init__(
        self, documents: Documents, context: int, on_too_long: OnTooLong = "error", pack: bool = True, seed: int = 0
    ) -> None:
        self.context, self._pack, self._seed = context, pack, seed
        self._documents = documents
        self._cut = on_too_long == "truncate"
        self._pieces, self._untrained = _trainable_pieces(documents, context, on_too_long)
        if len(self._pieces) == 0:
            raise DataError(
                "nothing is left to train on",
                at=f"data.context = {context}, data.on_too_long = {on_too_long!r}",
                why=f"of {len(documents)} documents {self._pieces.too_long} are longer than the context, and "
                f"{self._untrained} have nothing trained within it",
                try_="raise data.context, or choose another data.on_too_long",
            )
        self._lengths = self._pieces.lengths
        self._edges = [0]
        """First pack of each epoch planned so far, and of the next."""
        self._planned: tuple[int, _Plan] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Of one epoch: documents, pieces, tokens, and what happened to documents that are too long."""
        pieces = self._pieces
        return {
            "documents": len(np.unique(pieces.documents)),
            "pieces": len(pieces),
            "tokens": int(self._lengths.sum()),
            "too_long": pieces.too_long,
            "dropped_tokens": pieces.dropped_tokens,
            "truncated_tokens": pieces.truncated_tokens,
            "split_pieces": pieces.split_pieces,
            "untrained_documents": self._untrained,
        }

    @property
    def efficiency(self) -> float:
        """Tokens of the first epoch over the rows its packs could hold."""
        return int(self._lengths.sum()) / (self.packs_in_epoch(0) * self.context)

    def packs_in_epoch(self, epoch: int) -> int:
        """Differs by a little from one epoch to the next, since the shuffle decides what meets in a window."""
        while len(self._edges) <= epoch + 1:
            self._edges.append(self._edges[-1] + len(self._epoch_plan(len(self._edges) - 1)))
        return self._edges[epoch + 1] - self._edges[epoch]

    def epoch_of(self, index: int) -> int:
        """Epoch that pack `index` belongs to. Reaching epoch n the first time plans all before it."""
        assert index >= 0
        while self._edges[-1] <= index:
            self.packs_in_epoch(len(self._edges) - 1)
        return bisect_right(self._edges, index) - 1

    def pack(self, index: int) -> Pack:
        """Pack number `index` of the endless stream."""
        epoch = self.epoch_of(index)
        plan = self._epoch_plan(epoch)
        place = index - self._edges[epoch]
        members = plan.order[plan.bounds[place] : plan.bounds[place + 1]]
        return _assemble(self._documents, self._pieces, members, cut=self._cut)

    def _epoch_plan(self, epoch: int) -> _Plan:
        if self._planned is None or self._planned[0] != epoch:
            plan = _plan(self._lengths, self.context, self._pack, (self._seed, epoch))
            self._planned = epoch, plan if epoch else _longest_first(plan, self._lengths)
        return self._planned[1]


def validation_packs(
    documents: Documents, context: int, max_tokens: int, on_too_long: OnTooLong = "split"
) -> list[Pack]:
    """The same packs at every evaluation: a fixed sample of pieces of at most `max_tokens` tokens, at least one piece.

    The sample is drawn in an order that depends on nothing but the number of pieces, so that a part of the split is
    not its first folder. An empty split gives no packs.
    """
    pieces, _ = _trainable_pieces(documents, context, on_too_long)
    order = np.argsort(np.random.PCG64(_VALIDATION_SEED).random_raw(len(pieces)), kind="stable")
    within = np.cumsum(pieces.lengths[order]) <= max_tokens
    chosen = np.sort(order[: max(int(within.sum()), 1)])
    cut = on_too_long == "truncate"
    packs = []
    for start in range(0, len(chosen), WINDOW_PIECES):
        window = chosen[start : start + WINDOW_PIECES]
        for members in best_fit(pieces.lengths[window], context):
            packs.append(_assemble(documents, pieces, window[members], cut=cut))
    return packs


def _trainable_pieces(documents: Documents, context: int, on_too_long: OnTooLong) -> tuple[Pieces, int]:
    """The planned pieces without truncated chats in which no target is left, and how many those are."""
    pieces = plan_pieces(documents.lengths, context, on_too_long)
    if not documents.has_mask or on_too_long != "truncate":
        return pieces, 0
    keep = np.ones(len(pieces), bool)
    for index in np.flatnonzero(documents.lengths > context).tolist():
        keep[index] = documents.trained(index, 1, context).any()
    kept = replace(pieces, documents=pieces.documents[keep], starts=pieces.starts[keep], stops=pieces.stops[keep])
    return kept, int((~keep).sum())


def _assemble(documents: Documents, pieces: Pieces, members: np.ndarray, *, cut: bool) -> Pack:
    """Read the pieces of one pack. `cut`: a document ends where its piece does (truncation)."""
    lengths = pieces.lengths[members]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    total = int(bounds[-1])
    input_ids = np.empty(total, np.int64)
    labels = np.full(total, IGNORED_LABEL, np.int64)
    for begin, member in zip(bounds.tolist(), members.tolist()):
        document, start, stop = (int(a[member]) for a in (pieces.documents, pieces.starts, pieces.stops))
        # One token more than the piece: the target of its last row, where the document goes on.
        ahead = min(stop + (not cut), int(documents.lengths[document]))
        tokens = documents.tokens(document, start, ahead).astype(np.int64)
        input_ids[begin : begin + stop - start] = tokens[: stop - start]
        targets = tokens[1:]
        if documents.has_mask:
            targets = np.where(documents.trained(document, start + 1, ahead) == 1, targets, IGNORED_LABEL)
        labels[begin : begin + len(targets)] = targets
    return Pack(
        input_ids=input_ids,
        labels=labels,
        position_ids=np.arange(total) - np.repeat(bounds[:-1], lengths),
        cu_seqlens=bounds.astype(np.int32),
        tokens=total,
        trained_tokens=int((labels != IGNORED_LABEL).sum()),
        pieces=len(members),
    )
