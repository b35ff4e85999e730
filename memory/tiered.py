"""Rows of a tensor on several tiers, put down after forward and taken up again in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farspan.memory.plan import Rows

if TYPE_CHECKING:
    from farspan.memory.coded_rows import RowCodec
    from farspan.memory.tiers import Store, Stored


class DeviceLedger:
    """Bytes the tape holds on the device."""

    def __init__(self) -> None:
        self.bytes = self.peak_bytes = 0

    def add(self, size_bytes: int) -> None:
        self.bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)


class TieredRows:
    """The last rows of a tensor, each span on its tier.

    Args:
        tensor: [B, rows, ...]; a whole tensor that stays on the device is held as it is, not copied.
        rows: how many rows go where; more than the tensor has are cut, the disk's first.
        store: host and disk; needed where `rows` names them.
        label: what it is, for errors and traces.
        codec: what rows on host and disk are written in; None: they are stored as they are.
    """

    def __init__(
        self,
        tensor: Tensor,
        rows: Rows,
        store: Store | None,
        ledger: DeviceLedger,
        label: str = "",
        codec: RowCodec | None = None,
    ) -> None:
        count = tensor.shape[1]
        spans = rows.fit(count).spans(count)
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.first = min((first for first, _ in spans.values()), default=count)
        self._ledger, self._store, self._codec = ledger, store, codec
        self._kept: Tensor | None = None
        self._fetched: Tensor | None = None
        self._kept_span = spans.get("device", (count, count))
        self._away: list[tuple[tuple[int, int], Stored]] = []
        for tier, (first, end) in spans.items():
            if tier == "device":
                # a slice would pin the storage of the whole
                self._kept = tensor if end - first == count else tensor[:, first:end].clone()
                ledger.add(self._kept_bytes())
            else:
                assert store is not None, "a plan that offloads needs a store"
                rows_there = tensor[:, first:end]
                rows_there = rows_there.contiguous() if codec is None else codec.encode(rows_there, first)
                self._away.append(((first, end), store.put(tier, rows_there, label=label)))

    def fetch(self) -> None:
        """Start bringing back what is away, into memory for just those rows, or their codes: it may be long before they
        are taken."""
        if self._codec is not None:
            for _, stored in self._away:
                assert self._store is not None
                self._store.fetch(stored, last=True)
        elif self._away and self._fetched is None:
            self._fetched = self._empty(self._kept_span[0] - self.first)
            for target, stored in self._targets(self._fetched):
                if target.is_contiguous():
                    assert self._store is not None
                    self._store.fetch(stored, out=target, last=True)

    def take(self) -> Tensor:
        """The tensor with the stored rows in place; rows before `first` are not initialised. Releases what was held.

        The result may be the very tensor that was put down.
        """
        if self._kept is not None and self._kept.shape == self.shape:
            whole = self._kept
        else:
            self.fetch()
            fetched = self._fetched
            if self._codec is not None and self._away:
                return self._decoded()
            for target, stored in self._targets(fetched) if fetched is not None else ():
                assert self._store is not None
                self._store.get(stored, out=target)
            if fetched is not None and fetched.shape == self.shape:
                whole = fetched
            else:
                whole = self._empty(self.shape[1])
                if fetched is not None:
                    whole[:, self.first : self._kept_span[0]] = fetched
                if self._kept is not None:
                    whole[:, self._kept_span[0] : self._kept_span[1]] = self._kept
        self.free()
        return whole

    def _decoded(self) -> Tensor:
        """As `take`, of codes; each span's are let go once its rows are there."""
        assert self._codec is not None and self._store is not None
        whole = self._empty(self.shape[1])
        if self._kept is not None:
            whole[:, self._kept_span[0] : self._kept_span[1]] = self._kept
        while self._away:
            (first, end), stored = self._away[-1]
            self._codec.decode(self._store.get(stored), whole[:, first:end])
            self._away.pop()
            self._store.free(stored)
        self.free()
        return whole

    def free(self) -> None:
        """Release every tier."""
        if self._kept is not None:
            self._ledger.add(-self._kept_bytes())
            self._kept = None
        for _, stored in self._away:
            assert self._store is not None
            self._store.free(stored)
        self._away.clear()
        self._fetched = None

    def _empty(self, rows: int) -> Tensor:
        return torch.empty((self.shape[0], rows, *self.shape[2:]), dtype=self.dtype, device=self.device)

    def _targets(self, fetched: Tensor) -> list[tuple[Tensor, Stored]]:
        """Where in `fetched`, whose first row is `first`, each part belongs."""
        return [(fetched[:, first - self.first : end - self.first], stored) for (first, end), stored in self._away]

    def _kept_bytes(self) -> int:
        assert self._kept is not None
        return self._kept.untyped_storage().nbytes()
