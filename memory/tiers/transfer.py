"""How the bytes of a tensor get from one place to another: what workers run, without the store's lock and the GIL.

A tensor is only 64-byte aligned and O_DIRECT wants pages, so one copy between tensor and file is unavoidable: through a
bounce buffer of one chunk per disk thread (one thread copies while the other writes), or through staging when the whole
tensor found room in the arena.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator

import torch
from torch import Tensor

from farspan.memory.tiers.base import Chunk, OffloadFailed, Stored
from farspan.memory.tiers.device import Device
from farspan.memory.tiers.disk import DiskFile
from farspan.memory.tiers.host import Arena
from farspan.memory.tiers.space import Extent, whole_pages


class Transfer:
    """Copies of one store. The arena's extra bytes are its bounce buffers.

    Args:
        poison: fill what is freed with 0xFF, NaN in every floating type.
    """

    def __init__(self, arena: Arena, file: DiskFile | None, device: Device, *, chunk_bytes: int, poison: bool) -> None:
        self._arena, self._file, self._device, self._poison = arena, file, device, poison
        self._bounces: queue.SimpleQueue[Extent] = queue.SimpleQueue()
        for start in range(arena.extra.start, arena.extra.end, chunk_bytes):
            self._bounces.put(Extent(start, start + chunk_bytes))

    def copy_out(self, stored: Stored, place: tuple[Extent, ...]) -> None:
        """Tensor to arena.

        Raises:
            OffloadFailed: the tensor was written to meanwhile.
        """
        self._device.copy([(there, part) for part, there in self._parts(flat_bytes(_there(stored._original)), place)])
        _unchanged(stored)

    def copy_in(self, place: tuple[Extent, ...], into: Tensor) -> None:
        """Arena to tensor."""
        self._device.copy(self._parts(flat_bytes(into), place))

    def write(self, stored: Stored, index: int) -> None:
        """A chunk to disk, from staging or from the tensor.

        Raises:
            OffloadFailed: the disk is full or broken, or the tensor was written to meanwhile.
        """
        assert self._file is not None
        chunk = stored._chunks[index]
        if stored._staging is not None:
            start = stored._staging.start + chunk.start
            digest = self._file.write(chunk, self._arena.view(Extent(start, start + whole_pages(chunk.bytes))))
        else:
            with self._bounce(chunk) as bounce:
                part = _part(_there(stored._original), chunk)
                self._device.copy([(self._arena.tensor(bounce)[: chunk.bytes], part)])
                _unchanged(stored)
                digest = self._file.write(chunk, self._arena.view(bounce))
        if digest is not None:
            stored._digests[index] = digest

    def read(self, stored: Stored, index: int, into: Tensor) -> None:
        """A chunk from disk to tensor.

        Raises:
            OffloadFailed: the disk is broken.
            Corrupted: the checksum does not fit.
        """
        assert self._file is not None
        chunk = stored._chunks[index]
        with self._bounce(chunk) as bounce:
            self._file.read(chunk, self._arena.view(bounce), stored._digests.get(index), stored.label)
            self._device.copy([(_part(into, chunk), self._arena.tensor(bounce)[: chunk.bytes])])

    def spoil(self, place: tuple[Extent, ...]) -> None:
        """In test mode, fill pages that are given up."""
        if self._poison:
            for extent in place:
                self._arena.tensor(extent).fill_(0xFF)

    def _parts(self, flat: Tensor, place: tuple[Extent, ...]) -> list[tuple[Tensor, Tensor]]:
        """(bytes of a tensor, where in the arena they belong)"""
        found, done = [], 0
        for extent in place:
            part = flat[done : done + extent.bytes]
            found.append((part, self._arena.tensor(extent)[: len(part)]))
            done += len(part)
        return found

    @contextlib.contextmanager
    def _bounce(self, chunk: Chunk) -> Iterator[Extent]:
        """Whole pages for a chunk. There are as many buffers as disk threads, so nobody waits."""
        whole = self._bounces.get()
        try:
            yield Extent(whole.start, whole.start + whole_pages(chunk.bytes))
        finally:
            self.spoil((whole,))
            self._bounces.put(whole)


def flat_bytes(tensor: Tensor) -> Tensor:
    """uint8 [bytes], a view of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8)


def _part(tensor: Tensor, chunk: Chunk) -> Tensor:
    return flat_bytes(tensor)[chunk.start : chunk.start + chunk.bytes]


def _there(original: Tensor | None) -> Tensor:
    assert original is not None
    return original


def _unchanged(stored: Stored) -> None:
    """After a copy: the original was not written to meanwhile. What is freed may be."""
    original = stored._original
    if original is None or stored._freed or original.is_inference() or original._version == stored._version:
        return
    raise OffloadFailed(
        f"{stored.label or 'a tensor'} was written to while it was being stored",
        at=f"{stored.tier} tier",
        why=f"its version was {stored._version} when it was handed over and is {original._version} now",
        try_="a model whose layers do not change their inputs in place, or a plan that keeps this layer",
    )
