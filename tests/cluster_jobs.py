"""Specs for tests of the cluster: a gang that runs a stand-in entry point of `gang_entries`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farspan.cluster.config import Cluster, GangSpec
from farspan.memory.config import MemoryBudget
from farspan.trainer.config import (
    Checkpoint,
    Evaluate,
    FullFineTune,
    Mesh,
    Optim,
    RandomModel,
    TextData,
    Track,
    TrainSpec,
)


def gang_spec(run_dir: Path, world_size: int = 2, **cluster: Any) -> GangSpec:
    train = TrainSpec(
        run_dir=str(run_dir),
        tokens_dir=str(run_dir / "tokens"),
        model=RandomModel(),
        data=TextData("stdlib"),
        adapter=FullFineTune(),
        precision="fp32",
        mesh=Mesh(sp=world_size),
        zero=0,
        cpu_offload=False,
        accumulation=1,
        warmup_steps=0,
        optim=Optim(),
        memory=MemoryBudget(),
        checkpoint=Checkpoint(),
        evaluate=Evaluate(),
        track=Track(),
    )
    settings = {"heartbeat_s": 5.0, "max_failures": 0, **cluster}
    return GangSpec(name="test", world_size=world_size, cluster=Cluster(**settings), use_gpu=False, train=train)
