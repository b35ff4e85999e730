"""Which tensors live when: a ledger in which a piece of work books what it makes, holds, saves and lets go.

A tensor lives as long as Python code or an autograd node holds it, so both are booked apart. What autograd stores and
where the peak lies is then read off for any shape, instead of being fitted. Where saved tensors wait on the host, nodes
hold none on the device: one that the code has let go is away until a node needs it.
"""

from __future__ import annotations

from typing import NamedTuple

from farspan.memory.profile import Amount, Moment, Peak


class Size(NamedTuple):
    """Bytes: a constant, so many per row, so many per row of a tile."""

    constant: float = 0.0
    per_row: float = 0.0
    per_tile_row: float = 0.0

    def plus(self, other: Size, sign: int = 1) -> Size:
        return Size(*(a + sign * b for a, b in zip(self, other)))

    def amount(self, tile_rows: int) -> Amount:
        tiled = tile_rows if self.per_tile_row else 0
        return Amount(constant=self.constant, per_row=self.per_row, per_tile_row=self.per_tile_row, tile_rows=tiled)


class Ledger:
    """Tensors alive, who holds them, and the total at every allocation."""

    def __init__(self, *, saves_on_host: bool = False) -> None:
        self.saves_on_host = saves_on_host
        self.away: set[str] = set()
        """Saved, and on the host alone."""
        self.host, self.fetched = Size(), Size()
        """Copied to the host, and back."""
        self.sizes: dict[str, Size] = {}
        self.code: set[str] = set()
        self.saves: dict[str, int] = {}
        self.total = Size()
        self.moments: list[tuple[str, Size]] = []
        self.traffic = 0.0
        """Bytes per row read and written by what is neither matmul nor attention."""
        self.doing = ""
        self.in_tile = False

    def make(self, name: str, per_row: float, *, reads: float | None = None, constant: float = 0.0) -> str:
        """A new tensor, held by the code. `reads`: bytes per row read for it; None: by a matmul or attention."""
        assert name not in self.sizes, name
        size = Size(constant, 0.0, per_row) if self.in_tile else Size(constant, per_row)
        self.sizes[name] = size
        self.code.add(name)
        self.total = self.total.plus(size)
        self.moments.append((self.doing, self.total))
        if reads is not None:
            self.traffic += per_row + reads
        return name

    def given(self, name: str) -> str:
        """A tensor of somebody else's, which costs nothing here."""
        self.sizes[name] = Size()
        self.code.add(name)
        return name

    def save(self, *names: str) -> None:
        """An autograd node keeps these."""
        for name in names:
            assert name in self.sizes, name
            if self.saves_on_host and name not in self.saves:
                self.host = self.host.plus(self.sizes[name])
            self.saves[name] = self.saves.get(name, 0) + 1

    def hand_over(self, name: str, size: Size) -> None:
        """Somebody else's tensor, which a node has saved, is ours from now on."""
        self.code.discard(name)
        if name in self.saves and self.saves_on_host:
            self.sizes[name] = size
            self.host = self.host.plus(size)
            self.away.add(name)

    def need(self, *names: str) -> None:
        """A node that kept these is about to run."""
        for name in dict.fromkeys(names):
            if name in self.away:
                self.away.remove(name)
                self.total = self.total.plus(self.sizes[name])
                self.fetched = self.fetched.plus(self.sizes[name])
                self.moments.append((self.doing, self.total))

    def drop(self, *names: str) -> None:
        """The code lets go."""
        for name in names:
            self.code.discard(name)
            self._release(name)

    def used(self, *names: str) -> None:
        """A node that kept these has run."""
        for name in names:
            assert name not in self.away, f"{name} was not said to be needed"
        for name in names:
            self.saves[name] -= 1
            if not self.saves[name]:
                del self.saves[name]
            self._release(name)

    def saved(self) -> Size:
        """All that autograd keeps."""
        total = Size()
        for name in self.saves:
            total = total.plus(self.sizes[name])
        return total

    def _release(self, name: str) -> None:
        if name in self.code:
            return
        if name not in self.saves:
            self.total = self.total.plus(self.sizes.pop(name), -1)
        elif self.saves_on_host and name not in self.away:
            self.total = self.total.plus(self.sizes[name], -1)
            self.away.add(name)


def peak(moments: list[tuple[str, Size]], beyond: Size, tile_rows: int) -> Peak:
    """The moments that can be the highest at some number of rows."""
    kept: list[tuple[str, Size]] = []
    for what, total in moments:
        size = total.plus(beyond, -1)
        if any(all(a <= b for a, b in zip(size, other)) for _, other in kept):
            continue
        kept = [(w, o) for w, o in kept if not all(a <= b for a, b in zip(o, size))]
        kept.append((what, size))
    return Peak(moments=tuple(Moment(what=what, bytes=size.amount(tile_rows)) for what, size in kept))
