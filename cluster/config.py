"""What the Ray layer is told: what an actor needs, how long to wait, when to give up. Neither torch nor ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Schema
from farspan.trainer.config import TrainSpec


class Cluster(Schema):
    """Resources of the gang, and patience."""

    cpus_per_actor: float = Field(default=1.0, gt=0)
    """CPU cores of one rank; a CPU rank runs one thread per core."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per rank. `auto`: yes when the cluster has GPUs."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray placement group strategy."""
    wait_s: float = Field(default=120.0, gt=0)
    """How long to wait for the gang's resources."""
    heartbeat_s: float = Field(default=30.0, gt=0)
    """A rank that stays silent this long is given up; also the least time a phase may last."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts from the last complete checkpoint before the run fails."""


class GangSpec(Schema):
    """A gang of trainer actors, ready to be placed."""

    name: str
    world_size: int = Field(ge=1)
    cluster: Cluster
    use_gpu: bool
    rollout_workers: int = Field(default=0, ge=0)
    """Actors beside the ranks, with the same resources each."""
    train: TrainSpec

    @property
    def actors(self) -> int:
        return self.world_size + self.rollout_workers
