"""What went wrong in a gang: from everything the ranks show, the one rank and the one reason to name.

When a rank dies, the others fail too: a peer closed the connection, a collective timed out. Those are symptoms, and
printing all of them hides the cause. Causes are ranked: an error of ours, then a process that is gone, an ordinary
exception, a rank that answers nothing, one that stays too long in a phase, and last an exception about the
connection to another rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from farspan.errors import ClusterNotReady, FarspanError, OutOfMemory, PeerLost, RunFailed

TAIL_LINES = 20
TAIL_BYTES = 65536

_ABOUT_A_PEER = re.compile(
    r"connection (closed|reset|refused|was closed)|closed by peer|reset by peer|broken pipe|socket (timeout|closed)"
    r"|DistBackendError|DistNetworkError|DistStoreError|ncclRemoteError|ncclSystemError|unhandled system error"
    r"|timed out (waiting|after)|wait timeout|recvBytes|sendBytes|store.*(timeout|timed out)|gloo.*(timeout|timed out)",
    re.IGNORECASE,
)

_ON_THE_DEVICE = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
_OF_MEMORY = re.compile(
    rf"{_ON_THE_DEVICE}|^(\w+\.)*OutOfMemoryError\b|^(\w+\.)*\w*MemoryError\b|^bad_alloc|std::bad_alloc"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory|node ran low on memory"
)


class Kind(IntEnum):
    """How a rank failed; the smaller, the nearer to the cause."""

    OURS = 0
    """Raised a `FarspanError`: it says itself what is wrong."""
    GONE = 1
    """The process ended: killed, out of memory, crashed in native code."""
    RAISED = 2
    """Raised any other exception."""
    SILENT = 3
    """Answered no heartbeat for `heartbeat_s`: stopped, or its machine cannot be reached."""
    OVERSTAYED = 4
    """Answers, but is in one phase for more than max(heartbeat_s, 3 x planned)."""
    SYMPTOM = 5
    """Raised an exception about the connection to another rank."""


@dataclass(frozen=True)
class RankFailure:
    """One rank's failure, with all that is known about it."""

    rank: int
    kind: Kind
    phase: str
    step: int
    """Last finished step; 0 before the first."""
    detail: str
    """The reason, one line."""
    log: Path
    pid: int | None = None
    node_ip: str | None = None
    error: FarspanError | None = None
    phases_entered: int = 0
    """Of two ranks that stay too long, the one behind is the one waited for."""
    since_s: float = 0.0

    def headline(self) -> str:
        """`rank 1 died in backward after step 11`."""
        verb = {
            Kind.OURS: "failed",
            Kind.GONE: "died",
            Kind.RAISED: "failed",
            Kind.SILENT: "fell silent",
            Kind.OVERSTAYED: "hangs",
            Kind.SYMPTOM: "lost its peers",
        }[self.kind]
        when = f"after step {self.step}" if self.step > 0 else "before step 1 was finished"
        return f"rank {self.rank} {verb} in {self.phase} {when}"

    def sentence(self) -> str:
        """`rank 1 died in backward after step 11: process 123 ended without a word, ...`."""
        return f"{self.headline()}: {self.detail}"

    @property
    def deterministic(self) -> bool:
        """True when doing the same again must end the same way."""
        return self.error is not None and type(self.error) not in (RunFailed, ClusterNotReady, PeerLost)

    @property
    def of_memory(self) -> bool:
        """True when the rank ended for want of memory: of its device, of the process, or of the node as Ray saw it."""
        if isinstance(self.error, RunFailed):  # a thread of the offload store passes on what it met
            return _OF_MEMORY.search(self.error.why) is not None
        return self.kind in (Kind.RAISED, Kind.GONE) and _OF_MEMORY.search(self.detail) is not None

    @property
    def of_device_memory(self) -> bool:
        """Of these, what CUDA refused."""
        return self.of_memory and re.search(_ON_THE_DEVICE, self.detail) is not None

    def same_as(self, other: RankFailure | None) -> bool:
        """An ordinary exception that came back at the same place with the same words."""
        return (
            other is not None
            and self.kind is other.kind is Kind.RAISED
            and (self.step, self.phase, self.detail) == (other.step, other.phase, other.detail)
        )


def out_of_memory(failure: RankFailure) -> OutOfMemory:
    """The error of a rank that ended for want of memory, when there is no plan to compare with."""
    return OutOfMemory(
        f"out of memory: {failure.headline()}",
        at=f"rank {failure.rank}, phase {failure.phase}, log {failure.log}",
        why=failure.detail[:400],
        try_="a shorter data.context, a higher parallel.sp, smaller memory.mlp_tile and memory.loss_tile",
    )


def raised_kind(summary: str, error: FarspanError | None) -> Kind:
    """Which kind an exception is, from its one-line summary."""
    if isinstance(error, PeerLost):
        return Kind.SYMPTOM
    if error is not None:
        return Kind.OURS
    return Kind.SYMPTOM if _ABOUT_A_PEER.search(summary) else Kind.RAISED


def root_cause(failures: Sequence[RankFailure]) -> RankFailure:
    """The failure to name: nearest kind; among ranks that hang the one behind; then the lowest rank."""
    return min(failures, key=lambda failure: (failure.kind, failure.phases_entered, -failure.since_s, failure.rank))


def log_tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a rank's log that hold anything; empty when there is none we can read."""
    try:
        with open(log, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def how_it_ended(pid: int | None, ray_says: str, tail: Sequence[str]) -> str:
    """One line about a process that is gone, from what Ray says and what the process wrote last.

    Ray does not pass on the signal. A crash in native code leaves `Fatal Python error` in the log; silence there
    means that the process had no chance to write, which is what SIGKILL does, from a person or from the kernel.
    """
    process = f"process {pid}" if pid is not None else "its process"
    crash = next((line for line in reversed(tail) if line.startswith("Fatal Python error")), None)
    if crash is not None:
        return f"{process} crashed: {crash.removeprefix('Fatal Python error: ')}"
    said = ray_says.lower()
    if "low on memory" in said or "node_out_of_memory" in said:
        return f"{process} was ended by Ray since its node ran low on memory"
    if "its node has died" in said:
        return f"the node of {process} is gone"
    return f"{process} ended without a word, as by signal 9 (a person, or the kernel out of memory)"
