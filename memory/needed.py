"""Which of the tensors that autograd saves in a decoder layer any wanted gradient needs, by trying.

Under an adapter on a frozen base most weights need no gradient, and what only their gradient would need should not be
kept (FlexLLM prunes such tensors from its graph: Miao et al., 2024). torch's own operators see to it one by one, but an
operator written by hand saves what its author thought of. So every saved tensor is replaced by NaNs once: if no
gradient of the layer's input or of a trained parameter changes, it is unneeded. At last all unneeded ones are replaced
together, since one might stand in for another.

Costs one forward and one backward for each saved tensor (some fifty): a few hundred rows say all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farspan.memory.problem import SavedTensor


@dataclass(frozen=True)
class SavedBy:
    """What the nodes of one operator keep alive, each storage counted once, where it is first saved."""

    operator: str
    """Name of the autograd node: `MmBackward0`, or of a Function's class."""
    needed_bytes: int
    unneeded_bytes: int


@dataclass(frozen=True)
class SavedTensors:
    """What one layer's forward leaves for its backward, beside parameters and what all layers are given."""

    rows: int
    by_operator: tuple[SavedBy, ...]
    """In the order of forward."""
    repeated_bytes: int
    """Of the needed ones: whose every byte another one holds as well, as casts of one tensor for several users do.
    A factor of ones makes a repeat too: measure a model whose norms have been trained."""

    @property
    def needed_bytes(self) -> int:
        return sum(saved.needed_bytes for saved in self.by_operator)

    @property
    def unneeded_bytes(self) -> int:
        return sum(saved.unneeded_bytes for saved in self.by_operator)

    @property
    def kept_bytes(self) -> int:
        return self.needed_bytes + self.unneeded_bytes

    @property
    def needed_bytes_per_row(self) -> float:
        return self.needed_bytes / self.rows

    @property
    def unneeded_bytes_per_row(self) -> float:
        return self.unneeded_bytes / self.rows


def saved_tensors(
    layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, *, wants_dx: bool = True, seed: int = 0
) -> SavedTensors:
    """Find what a layer keeps for backward, and what of it is needed.

    Args:
        layer: without an executor's node around it; its parameters have no gradients, and have none afterwards.
        call: runs it on hidden states (see `single_layers.calls_of`); a partial whose keywords all layers share.
        x: hidden states [B, rows, hidden].
        wants_dx: whether a gradient of x is wanted.
    """
    x = x.detach().clone().requires_grad_(wants_dx)
    record = _Record()
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(record.pack, record.unpack):
            y = call(x)
        dy = torch.randn_like(y)
        trained = [p for p in layer.parameters() if p.requires_grad]

        def gradients(poisoned: Iterable[int] = ()) -> list[Tensor | None]:
            record.poisoned = frozenset(poisoned)
            torch.manual_seed(seed)  # a Function may draw again in backward
            y.backward(dy, retain_graph=True)
            found = [leaf.grad for leaf in (x, *trained)]
            for leaf in (x, *trained):
                leaf.grad = None
            return found

        want = gradients()
        given = {_storage(t) for t in (*layer.parameters(), *layer.buffers(), *_tensors(getattr(call, "keywords", {})))}
        own = [index for index, tensor in enumerate(record.tensors) if _storage(tensor) not in given]
        tried = [index for index in own if _can_be_tried(record.tensors[index])]
        needed = set(own) - {index for index in tried if _same(gradients([index]), want)}
        assert _same(gradients(set(own) - needed), want), "of two unneeded tensors one is needed"
    by_operator = _by_operator(record.tensors, own, needed, record.operators(y))
    return SavedTensors(x.shape[1], tuple(by_operator), _repeated_bytes([record.tensors[index] for index in needed]))


def kept_tensors(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[SavedTensor]:
    """What a layer keeps for backward, each storage once, with the operators that ask for it; largest first.

    Args:
        layer, call: as for `saved_tensors`.
        x: hidden states [B, rows, hidden].
    """
    record, x = _Record(), x.detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(record.pack, record.unpack):
        y = call(x)
    operators = record.operators(y)
    others = {_storage(t) for t in (*layer.parameters(), *layer.buffers(), *_tensors(getattr(call, "keywords", {})))}
    by_storage: dict[int, list[int]] = {}
    for index, tensor in enumerate(record.tensors):
        if index in operators and _storage(tensor) not in others:  # what y does not depend on is gone with its node
            by_storage.setdefault(_storage(tensor), []).append(index)
    found = []
    for indices in by_storage.values():
        tensor = record.tensors[indices[0]]
        names = dict.fromkeys(operators[index].removesuffix("Backward0").removesuffix("Backward") for index in indices)
        found.append(
            SavedTensor(
                name="x" if _storage(tensor) == _storage(x) else " x ".join(map(str, tensor.shape[2:])) or "numbers",
                kept_by=tuple(names),
                bytes_per_row=tensor.untyped_storage().nbytes() / x.shape[1],
            )
        )
    return sorted(found, key=lambda tensor: -tensor.bytes_per_row)


class _Record:
    """Hooks that number saved tensors as they come, and give some of them back as NaN."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.poisoned: frozenset[int] = frozenset()
        self.asked: list[int] = []

    def pack(self, tensor: Tensor) -> int:
        self.tensors.append(tensor.detach())
        return len(self.tensors) - 1

    def unpack(self, index: int) -> Tensor:
        self.asked.append(index)
        tensor = self.tensors[index]
        return _poison(tensor) if index in self.poisoned else tensor

    def operators(self, y: Tensor) -> dict[int, str]:
        """Name of the node that saved each tensor: which one asks for it."""
        self.poisoned = frozenset()
        found: dict[int, str] = {}
        seen: set[Any] = set()
        waiting: list[Any] = [y.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
            self.asked.clear()
            for attribute in dir(node):
                if attribute.startswith("_saved_") or attribute == "saved_tensors":
                    getattr(node, attribute)
            found |= dict.fromkeys(self.asked, node.name())
        return found


def _by_operator(
    tensors: list[Tensor], own: list[int], needed: set[int], operators: dict[int, str]
) -> Iterable[SavedBy]:
    needed_storages = {_storage(tensors[index]) for index in needed}
    totals: dict[str, list[int]] = {}
    counted: set[int] = set()
    for index in own:
        storage = _storage(tensors[index])
        if storage not in counted:
            counted.add(storage)
            total = totals.setdefault(operators[index], [0, 0])
            total[storage not in needed_storages] += tensors[index].untyped_storage().nbytes()
    return (SavedBy(operator, *total) for operator, total in totals.items())


def _repeated_bytes(tensors: list[Tensor]) -> int:
    different: list[Tensor] = []
    repeated = 0
    for storage in {_storage(tensor): tensor.untyped_storage() for tensor in tensors}.values():
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if any(torch.equal(whole, other) for other in different):
            repeated += storage.nbytes()
        else:
            different.append(whole)
    return repeated


def _storage(tensor: Tensor) -> int:
    """Equal for views of the same memory."""
    return tensor.untyped_storage().data_ptr()


def _can_be_tried(tensor: Tensor) -> bool:
    """Integers are indices: wrong ones may read outside of what they index, so they count as needed."""
    return tensor.is_floating_point() or tensor.dtype == torch.bool


def _poison(tensor: Tensor) -> Tensor:
    return ~tensor if tensor.dtype == torch.bool else torch.full_like(tensor, float("nan"))


def _same(got: list[Tensor | None], want: list[Tensor | None]) -> bool:
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(got, want))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
