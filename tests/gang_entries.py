"""Entry points that stand in for the SPMD core in tests of the cluster: they misbehave on demand, without torch.

`spec.run_dir` is where a first attempt leaves a mark, so that the second one behaves.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.errors import DataError, JobError
from farspan.trainer.config import TrainSpec
from farspan.trainer.world import Progress, World


@dataclass(frozen=True)
class Result:
    status: str
    rank: int
    seen: dict[str, Any]


def _result(world: World) -> Result:
    names = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    seen = {"pid": os.getpid(), "env": {name: os.environ.get(name) for name in names}, "world": world}
    return Result("done", world.rank, seen)


def _steps(spec: TrainSpec, world: World, progress: Progress, count: int, step_s: float = 0.02) -> None:
    for step in range(1, count + 1):
        progress.phase("forward", planned_s=0.1)
        time.sleep(step_s)
        progress.phase("backward", planned_s=0.1)
        if world.rank == 0:
            progress.record({"step": step, "loss": 1.0 / step, "tokens": 10, "step_s": step_s, "attempt": spec.attempt})


def _first_time(spec: TrainSpec, world: World) -> bool:
    mark = Path(spec.run_dir) / f"mark-{world.rank}"
    if mark.exists():
        return False
    mark.touch()
    return True


def _checkpoint(spec: TrainSpec, world: World, step: int) -> None:
    if world.rank == 0:
        folder = Path(spec.run_dir) / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text("{}")


def succeed(spec: TrainSpec, world: World, progress: Progress) -> Result:
    if world.rank == 0:
        progress.event("self-test", "tested itself")
    _steps(spec, world, progress, 5)
    print(f"printed by rank {world.rank}")
    logging.getLogger("entry").info("logged by rank %d", world.rank)
    ctypes.CDLL(None).puts(f"native words of rank {world.rank}".encode())
    ctypes.CDLL(None).fflush(None)
    return _result(world)


def killed_once(spec: TrainSpec, world: World, progress: Progress) -> Result:
    """Rank 1 kills itself in `backward` after step 3 of the first attempt; rank 0 then loses its peer."""
    _steps(spec, world, progress, 3)
    _checkpoint(spec, world, 2)
    if world.rank == 1 and _first_time(spec, world):
        logging.getLogger("entry").info("last words of rank 1")
        progress.phase("backward")
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 0 and spec.attempt == 1:
        progress.phase("reduce")
        time.sleep(0.3)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2345")
    return _result(world)


def killed_always(spec: TrainSpec, world: World, progress: Progress) -> Result:
    progress.phase("optimizer")
    if world.rank == 1:
        logging.getLogger("entry").info("about to go")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return _result(world)


def crash(spec: TrainSpec, world: World, progress: Progress) -> Result:
    progress.phase("forward")
    if world.rank == 0:
        ctypes.string_at(0)
    time.sleep(60)
    return _result(world)


def hang(spec: TrainSpec, world: World, progress: Progress) -> Result:
    """Rank 1 hangs in `forward`; rank 0 goes on to wait for it in `reduce`."""
    met = Path(spec.run_dir) / "rank-1-is-in-forward"
    if world.rank == 1:
        progress.phase("forward", planned_s=0.1)
        met.touch()
        time.sleep(60)
    progress.phase("join", planned_s=60.0)  # on a busy machine rank 1 may be seconds behind
    while not met.exists():
        time.sleep(0.01)
    progress.phase("forward", planned_s=0.1)
    progress.phase("reduce", planned_s=0.1)
    time.sleep(60)
    return _result(world)


def planned_long(spec: TrainSpec, world: World, progress: Progress) -> Result:
    """Longer than the heartbeat in one phase, as planned."""
    progress.phase("compile", planned_s=2.0)
    time.sleep(3.0)
    return _result(world)


def stopped(spec: TrainSpec, world: World, progress: Progress) -> Result:
    progress.phase("backward", planned_s=0.1)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
    return _result(world)


def bad_job(spec: TrainSpec, world: World, progress: Progress) -> Result:
    progress.phase("load")
    if world.rank == 1:
        time.sleep(60)
    raise JobError("the vocabulary does not match", at="model.vocab", why="300 < 400", try_="--set model.vocab=400")


def no_memory(spec: TrainSpec, world: World, progress: Progress) -> Result:
    """The last rank asks torch for more than there is; the others go on to wait for it."""
    progress.phase("load", planned_s=120.0)
    import torch

    _steps(spec, world, progress, 2)
    progress.phase("backward", planned_s=120.0)
    if world.rank == world.world_size - 1:
        torch.empty(1 << 45, dtype=torch.uint8)
    time.sleep(60)
    return _result(world)


def no_memory_in_python(spec: TrainSpec, world: World, progress: Progress) -> Result:
    progress.phase("data")
    raise MemoryError


def same_defect(spec: TrainSpec, world: World, progress: Progress) -> Result:
    progress.phase("forward")
    raise TypeError("unsupported operand")


def endless(spec: TrainSpec, world: World, progress: Progress) -> Result:
    (Path(spec.run_dir) / f"pid-{world.rank}").write_text(str(os.getpid()))
    _steps(spec, world, progress, 100000, step_s=0.1)
    return _result(world)


def square(value: int) -> int:
    time.sleep(0.01 * (value % 3))
    return value * value


def square_of_positive(value: int) -> int:
    if value < 0:
        raise DataError("negative", at=f"item {value}", why="squares of positives only", try_="drop it")
    return value * value


def divide_by(value: int) -> float:
    return 1 / value


def die_once(mark: str) -> str:
    """Kills its worker the first time; a task that lost its worker is run again."""
    path = Path(mark)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name
