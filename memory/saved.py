"""What autograd saves, in host memory: each tensor is copied out when it is saved and back when its operator needs it.

Torch's `save_on_cpu` does this to whole models. Here it is done to the layers that a plan names, into the planned host
arena, and by storage: two views of one tensor are one copy, and come back with the strides they had, so that every
operator sees what it would have seen. Both copies are waited for: what is on the device at any moment is then a matter
of the program, not of timing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from farspan.memory.tiers import Store

LEAST_BYTES = 1024
"""Smaller ones stay: the arena deals in pages. Less than a layer is measured with: one number for each of its rows."""


@contextmanager
def saved_on_host(store: Store, layer: nn.Module, staying: Iterable[Any], label: str) -> Iterator[None]:
    """Inside, what autograd saves goes to the host tier of `store`, except what lives elsewhere anyway.

    Args:
        layer: its parameters and buffers stay.
        staying: other tensors that stay, in lists, tuples and dicts too: somebody else holds them.
        label: of the tensors, for errors.

    Raises:
        DoesNotFit: the host tier is full.
        OffloadFailed: a copy failed.
    """
    packing = _Packing(store, layer, staying, label)
    with saved_tensors_hooks(packing.pack, _unpack):
        yield


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, _View) else packed


class _Packing:
    """One run of one layer."""

    def __init__(self, store: Store, layer: nn.Module, staying: Iterable[Any], label: str) -> None:
        self.store, self.label = store, label
        self.weights = [*layer.parameters(), *layer.buffers()]
        self.staying = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors_in(staying)]
        self.stays = {reference.cdata for reference in self.staying}
        self.copies: dict[int, _Copy] = {}
        """By storage. The weak reference in a copy keeps the address from being given to another storage."""

    def pack(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided or tensor.device != self.store.device:
            return tensor
        storage = tensor.untyped_storage()
        address = storage._cdata
        if storage.nbytes() < LEAST_BYTES or address in self.stays:
            return tensor
        # looked up each time: under ZeRO-3 a weight has memory only while its module runs
        if any(address == weight.untyped_storage()._cdata for weight in self.weights):
            return tensor
        copy = self.copies.get(address)
        if copy is None or copy.version != tensor._version:
            copy = self.copies[address] = _Copy(self.store, storage, tensor._version, self.label)
        return _View(copy, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())


class _Copy:
    """A storage on the host, for as long as a saved tensor refers to it."""

    def __init__(self, store: Store, storage: torch.UntypedStorage, version: int, label: str) -> None:
        self.store, self.version, self.device = store, version, storage.device
        self.origin = StorageWeakRef(storage)
        self.back: StorageWeakRef | None = None
        self.stored = store.put("host", _bytes(storage), label=label)
        store.finish(self.stored)

    def storage(self) -> torch.UntypedStorage:
        """On the device again; the same one while somebody has it."""
        found = None if self.back is None else torch.UntypedStorage._new_with_weak_ptr(self.back.cdata)
        if found is None:
            out = torch.empty(self.stored.bytes, dtype=torch.uint8, device=self.device)
            found = self.store.get(self.stored, out=out, stall=False).untyped_storage()
            self.back = StorageWeakRef(found)
        return found

    def __del__(self) -> None:
        if hasattr(self, "stored"):
            self.store.free(self.stored)


@dataclass(frozen=True, slots=True)
class _View:
    """What autograd holds in the place of a saved tensor."""

    copy: _Copy
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=self.copy.device)
        return empty.set_(self.copy.storage(), self.offset, self.shape, self.stride)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
