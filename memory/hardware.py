"""What a machine offers a rank: bytes on each tier and rates, each with where it comes from.

A file per machine lies in `infra/hardware` and inside the installed package, so that a plan needs no machine. A file
may extend another and name only what differs. Rates say `assumed` (data sheet times a usual efficiency, or a paper) or
`measured`; a calibration on the machine itself writes the latter.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from farspan.errors import JobError
from farspan.memory.problem import Budgets, Links
from farspan.memory.profile import Source
from farspan.memory.shape import Precision
from farspan.schema import Bytes, Schema


class AttentionRate(Schema):
    """FLOP/s of the attention kernel, half of the square counted for a causal mask, seen at some number of rows."""

    rows: int = Field(ge=1)
    forward_flop_per_s: float = Field(gt=0)
    backward_flop_per_s: float = Field(gt=0)


class Hardware(Schema):
    """One device and its share of the machine around it."""

    name: str
    title: str
    device_type: Literal["cuda", "cpu"]
    device_bytes: Bytes = Field(ge=0)
    """Usable on the device, context included."""
    host_bytes: Bytes = Field(ge=0)
    """Host memory a rank may use."""
    disk_bytes: Bytes = Field(ge=0)
    """Disk space a rank may use."""
    context_bytes: Bytes = Field(ge=0)
    """Taken on the device before the first tensor: context, library workspaces, what the allocator loses."""
    collective_bytes: Bytes = Field(default=0, ge=0)
    """Buffers of the communication library on the device, as soon as there is more than one rank."""

    matmul_flop_per_s: dict[Precision, float]
    attention: dict[Precision, tuple[AttentionRate, ...]]
    """By precision; several entries make a table over rows, ascending."""
    memory_bytes_per_s: float = Field(gt=0)
    """Device memory, read and written by elementwise work."""
    host_memory_bytes_per_s: float = Field(gt=0)
    """Host memory, for an optimizer that runs there."""
    copy_out_bytes_per_s: float = Field(gt=0)
    copy_in_bytes_per_s: float = Field(gt=0)
    disk_write_bytes_per_s: float = Field(gt=0)
    disk_read_bytes_per_s: float = Field(gt=0)
    all_to_all_bytes_per_s: float = Field(gt=0)
    """What a rank sends per second while all send at once."""

    sources: dict[str, Source]
    """Of every number above, by field."""

    def budgets(self) -> Budgets:
        """All of it."""
        return Budgets(device_bytes=self.device_bytes, host_bytes=self.host_bytes, disk_bytes=self.disk_bytes)

    def links(self) -> Links:
        return Links(
            copy_out_bytes_per_s=self.copy_out_bytes_per_s,
            copy_in_bytes_per_s=self.copy_in_bytes_per_s,
            disk_write_bytes_per_s=self.disk_write_bytes_per_s,
            disk_read_bytes_per_s=self.disk_read_bytes_per_s,
        )

    def source(self, *fields: str) -> Source:
        """Of several numbers together: measured only if all are."""
        found = [self.sources[field] for field in fields]
        how: Literal["measured", "assumed"] = "assumed" if any(s.how == "assumed" for s in found) else "measured"
        return Source(how=how, what="; ".join(dict.fromkeys(s.what for s in found)))


def hardware_names() -> list[str]:
    """Machines that come with the package."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json"))


def load_hardware(name_or_path: str) -> Hardware:
    """A machine by name (`h200`), or by the path of a JSON file.

    Raises:
        JobError: no such name or file, or the file is not a description of a machine.
    """
    try:
        return Hardware.model_validate(_read(name_or_path))
    except ValidationError as problem:
        first = problem.errors()[0]
        raise JobError(
            f"{name_or_path} does not describe a machine",
            at=f"memory.hardware, {'.'.join(str(part) for part in first['loc'])}",
            why=f"{first['msg']} ({problem.error_count()} problems in all)",
            try_='start from a known machine: {"extends": "h200", "name": ..., and what differs}',
        ) from None


def _folder() -> Any:
    return resources.files("farspan").joinpath("hardware")


def _read(name_or_path: str) -> Any:
    is_path = name_or_path.endswith(".json") or "/" in name_or_path
    if not is_path and name_or_path not in hardware_names():
        raise _unknown(name_or_path)
    file = Path(name_or_path).expanduser() if is_path else _folder().joinpath(f"{name_or_path}.json")
    try:
        own: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise JobError(
            f"the hardware file {name_or_path} cannot be read",
            at="memory.hardware",
            why=str(problem),
            try_=f"one of {', '.join(hardware_names())}, or the path of a JSON file like them",
        ) from None
    if not isinstance(own, dict) or "extends" not in own:
        return own
    base = own.pop("extends")
    if base not in hardware_names():
        raise _unknown(base)
    known = _read(base)
    return {**known, **own, "sources": {**known["sources"], **own.get("sources", {})}}


def _unknown(name: Any) -> JobError:
    names = hardware_names()
    near = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.3)
    return JobError(
        f"no hardware called {name}",
        at="memory.hardware",
        why=f"known are {', '.join(names)}",
        try_=" or ".join(f"--set memory.hardware={found}" for found in near) or "give the path of a JSON file",
    )
