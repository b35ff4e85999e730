"""Host memory near a device: Linux puts a page on the NUMA node of the processor that first touches it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SYS = Path("/sys")


def pci_node(properties: Any, sys: Path = _SYS) -> int | None:
    """NUMA node of a CUDA device by its PCI address; None where the system has one node or does not say.

    Args:
        properties: with `pci_domain_id`, `pci_bus_id`, `pci_device_id`.
    """
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if any(number is None for number in numbers):
        return None
    domain, bus, device = numbers
    try:
        node = int((sys / f"bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def processors_of(node: int, sys: Path = _SYS) -> set[int]:
    """Processors of a node."""
    found: set[int] = set()
    for part in (sys / f"devices/system/node/node{node}/cpulist").read_text().strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


@contextlib.contextmanager
def on_node(node: int | None, sys: Path = _SYS) -> Iterator[None]:
    """Inside, the calling thread runs on a node's processors, as far as this process may use them."""
    allowed = os.sched_getaffinity(0)
    wanted: set[int] = set()
    if node is not None:
        with contextlib.suppress(OSError, ValueError):
            wanted = processors_of(node, sys) & allowed
    if not wanted:
        yield
        return
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
