"""Tiers of a device that runs behind its caller, as CUDA does, and host memory near it.

The device is a simulated one: a thread that carries out what is queued, late and at random, on CPU tensors. What on
CUDA would go wrong at times (reading before a kernel has written, writing while it still reads) is wrong bytes here.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executor_models import LAYERS, Model, differing
from test_tiers import MIB, content
from torch import Tensor

from farspan.errors import DoesNotFit
from farspan.memory.executor import Executor
from farspan.memory.plan import LayerPlan, Placement, Rows
from farspan.memory.tiers import OffTier, Store, Stored
from farspan.memory.tiers.device import Copies, Cpu, Stop
from farspan.memory.tiers.numa import on_node, pci_node, processors_of
from farspan.memory.tiers.space import PAGE_BYTES


class Behind:
    """A device whose work is done later than it is queued, in order, by one thread."""

    torch_device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.pinned: dict[int, int] = {}
        self.failed: list[BaseException] = []
        self._random = random.Random(seed)
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device")
        self._thread.start()

    def queue(self, kernel: Callable[[], object]) -> None:
        self._queue.put(kernel)

    def _run(self) -> None:
        while (kernel := self._queue.get()) is not None:
            time.sleep(self._random.random() * 1e-3)
            try:
                kernel()
            except BaseException as error:
                self.failed.append(error)

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()
        assert not self.failed, self.failed

    def mark(self) -> Any:
        reached = threading.Event()
        self.queue(reached.set)
        return reached

    def stopwatch(self) -> Stop:
        times: list[float] = []
        self.queue(lambda: times.append(time.perf_counter()))

        def stop() -> Callable[[], float]:
            reached = threading.Event()
            self.queue(lambda: (times.append(time.perf_counter()), reached.set()))

            def read() -> float:
                assert reached.wait(10)
                return times[1] - times[0]

            return read

        return stop

    def copy(self, copies: Copies) -> None:
        for into, source in copies:
            assert any(self._in_arena(side) for side in (into, source)), "one side is host memory that is pinned"
        Cpu().copy(copies)

    def _in_arena(self, tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + size for start, size in self.pinned.items())

    def near(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pin(self, address: int, size_bytes: int) -> None:
        self.pinned[address] = size_bytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]


@pytest.fixture
def device() -> Iterator[Behind]:
    made = Behind(seed=0)
    yield made
    made.finish()
    assert not made.pinned, "unpinned when the arena goes"


def write(tensor: Tensor, values: Tensor) -> None:
    """As a kernel does: no version counter sees it."""
    tensor.numpy()[...] = values.numpy()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_is_put_before_it_is_computed(tmp_path: Path, device: Behind, tier: OffTier) -> None:
    with Store(host_bytes=MIB, disk_dir=tmp_path, disk_bytes=MIB, device=device, test_seed=1) as store:
        values = [content(5 * PAGE_BYTES + 3, seed) for seed in range(20)]
        held = []
        for turn, kept in enumerate(values):
            made = torch.full_like(kept, 0xFF)
            device.queue(lambda made=made, kept=kept: write(made, kept))
            held.append(store.put(tier, made, label=f"layer {turn}"))
            store.admit()
        store.drain()
        for stored, kept in zip(held, values):
            assert torch.equal(store.get(stored), kept)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_memory_that_is_still_read_is_not_written(tmp_path: Path, device: Behind, tier: OffTier) -> None:
    kept = content(40 * PAGE_BYTES, 0)
    out, old = torch.empty_like(kept), content(40 * PAGE_BYTES, 1)
    with Store(host_bytes=MIB, disk_dir=tmp_path, disk_bytes=MIB, device=device) as store:
        stored = store.put(tier, kept.clone())
        store.drain()
        for _ in range(5):
            write(out, old)
            for _ in range(3):
                device.queue(lambda: check(out, old))  # queued before: the memory is theirs until then
            store.fetch(stored, out)
            assert torch.equal(store.get(stored, out), kept)


def check(tensor: Tensor, values: Tensor) -> None:
    assert torch.equal(tensor, values)


@pytest.mark.parametrize("seed", range(3))
def test_storm(tmp_path: Path, seed: int) -> None:
    """Kernels that write what is put and read what came back, the store in test mode, both tiers nearly full."""
    device, rng = Behind(seed), random.Random(seed)
    held: list[tuple[Stored, Tensor]] = []
    sizes = {"host_bytes": 60 * PAGE_BYTES, "disk_bytes": 60 * PAGE_BYTES}
    with Store(disk_dir=tmp_path, chunk_bytes=2 * PAGE_BYTES, device=device, test_seed=seed, **sizes) as store:
        for turn in range(150):
            action = rng.choice(["put", "put", "fetch", "get", "free", "admit"])
            if action == "put":
                kept = content(rng.randrange(1, 9 * PAGE_BYTES), turn)
                made = torch.full_like(kept, 0xFF)
                device.queue(lambda made=made, kept=kept: write(made, kept))
                try:
                    held.append((store.put(rng.choice(["host", "disk"]), made, label=f"t{turn}"), kept))
                except DoesNotFit:
                    action = "free"
            if action == "admit":
                store.admit()
            elif held and action != "put":
                stored, kept = held[rng.randrange(len(held))]
                if action == "fetch":
                    store.fetch(stored)
                elif action == "get":
                    back = store.get(stored)
                    device.queue(lambda back=back, kept=kept: check(back, kept))
                else:
                    store.free(stored)
                    held.remove((stored, kept))
        for stored, kept in held:
            back = store.get(stored)
            device.queue(lambda back=back, kept=kept: check(back, kept))
    device.finish()


@pytest.mark.parametrize("busy", [True, False])
def test_waiting_is_a_stall_only_if_the_device_has_nothing_to_do(
    device: Behind, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller waits 0.2 s for a copy either way."""
    kept = content(PAGE_BYTES, 0)
    with Store(host_bytes=MIB, device=device) as store:
        stored = store.put("host", kept.clone())
        store.drain()
        copy = device.copy
        monkeypatch.setattr(device, "copy", lambda copies: (time.sleep(0.2), copy(copies)))
        store.fetch(stored)
        if busy:
            device.queue(lambda: time.sleep(0.5))
        store.statistics(restart=True)
        assert torch.equal(store.get(stored), kept)
        stalled_s = store.statistics().stall_s["copy_in"]
    assert stalled_s < 0.1 if busy else stalled_s > 0.1


def test_an_exception_in_mid_backward_leaves_nothing(tmp_path: Path, device: Behind) -> None:
    rows = Rows(host=300, disk=300)
    plan = LayerPlan(x=rows, o=rows)
    placement = Placement(rows=600, attention_rows=600, layers=(plan,) * LAYERS, prefetch=2, slots=1)
    kept = Model().gradients([600], micro_batches=1)
    with Store(host_bytes=16 * MIB, disk_dir=tmp_path, disk_bytes=16 * MIB, device=device, test_seed=2) as store:
        made = Model()
        executor = Executor(made.layers, placement, store)

        def breaks(_: Tensor) -> None:
            raise RuntimeError("mid-backward")

        loss = made.forward([600], 0)
        hook = made.layers[1].mlp.down_proj.weight.register_hook(breaks)
        with pytest.raises(RuntimeError, match="mid-backward"):
            loss.backward()
        hook.remove()
        del loss
        assert not any(store.statistics().held_bytes.values())
        assert executor.ledger.bytes == 0
        assert differing(made.gradients([600], micro_batches=1), kept) == [], "and the next step is right"


def test_numa_node_of_a_device(tmp_path: Path) -> None:
    card = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x4F, pci_device_id=0)
    folder = tmp_path / "bus/pci/devices/0000:4f:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    assert pci_node(card, tmp_path) == 1
    (folder / "numa_node").write_text("-1\n")
    assert pci_node(card, tmp_path) is None, "a machine with one node"
    assert pci_node(SimpleNamespace(pci_domain_id=0, pci_bus_id=1, pci_device_id=0), tmp_path) is None
    assert pci_node(SimpleNamespace(), tmp_path) is None, "a torch that does not say"


def test_a_thread_runs_on_the_processors_of_a_node(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    nodes = tmp_path / "devices/system/node/node3"
    nodes.mkdir(parents=True)
    (nodes / "cpulist").write_text(f"{one},100000-100002\n")
    assert processors_of(3, tmp_path) == {one, 100000, 100001, 100002}
    with on_node(3, tmp_path):
        assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == allowed
    with on_node(4, tmp_path):  # it says nothing of its processors
        assert os.sched_getaffinity(0) == allowed
    with on_node(None):
        assert os.sched_getaffinity(0) == allowed
