"""Who this process is among the ranks, and how the SPMD core tells the outside what it is doing.

The core knows nothing of Ray: an actor fills a `World` from its gang, `torchrun` fills it from the environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from farspan.errors import JobError


@dataclass(frozen=True)
class World:
    """One process of the gang and the rendezvous all of them meet at."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29400
    use_gpu: bool = False

    @classmethod
    def from_env(cls) -> World:
        """Read `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT` as torchrun sets them."""
        import torch

        missing = [key for key in ("RANK", "WORLD_SIZE") if key not in os.environ]
        if missing:
            raise JobError(
                f"{' and '.join(missing)} not set",
                at="environment",
                why="the SPMD core needs its rank and the world size",
                try_="start it with torchrun, or use `farspan run`",
            )
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            master_addr=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(os.environ.get("MASTER_PORT", "29400")),
            use_gpu=torch.cuda.is_available(),
        )


@dataclass(frozen=True)
class TrainResult:
    """How a finished run ended."""

    status: str
    steps: int
    last_record: dict[str, Any]
    """Last line of `metrics.jsonl` (empty on ranks other than 0)."""
    checkpoint: str
    """Folder of the last complete checkpoint."""


class Progress(Protocol):
    """What the core reports while it works; called on the training thread, so it must return at once."""

    def phase(self, name: str, *, planned_s: float | None = None) -> None:
        """This rank enters a phase (`data`, `forward`, `backward`, `reduce`, `optimizer`, `checkpoint`, ...)."""

    def record(self, record: dict[str, Any]) -> None:
        """Rank 0 finished a step; `record` is what was written to `metrics.jsonl`."""

    def event(self, event: str, text: str) -> None:
        """Rank 0 tells of something that is not a step; ends in `events.jsonl` and on the screen."""


class Silent:
    """Reports nothing."""

    def phase(self, name: str, *, planned_s: float | None = None) -> None:
        del name, planned_s

    def record(self, record: dict[str, Any]) -> None:
        del record

    def event(self, event: str, text: str) -> None:
        del event, text
