"""Ranks that stay up while checkpoint tests run on them, and the state they save.

Not a test module: spawned ranks import it. `Gang.call` runs one of the functions below on every rank at once and
returns, in rank order, what each returned or raised.
"""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from farspan.memory.config import MemoryBudget
from farspan.trainer import checkpoint_state
from farspan.trainer.checkpoint import Checkpointer, checkpoint_group
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
from farspan.trainer.engine import STATE_KINDS, Fragment
from farspan.trainer.run_folder import RunFolder

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cut:
    """A piece of every kind of state of one parameter."""

    name: str
    start: int
    end: int


def spec(root: Path, *, dp: int = 1, keep: int = 2, export: bool = False, **changes: Any) -> TrainSpec:
    made = TrainSpec(
        run_dir=str(root),
        tokens_dir="tokens",
        model=RandomModel(hidden=32, layers=1, heads=4, kv_heads=2, ffn=48, vocab=300),
        data=TextData("stdlib", context=64),
        adapter=FullFineTune(),
        precision="fp32",
        mesh=Mesh(dp=dp),
        zero=0,
        cpu_offload=False,
        accumulation=1,
        warmup_steps=1,
        optim=Optim(),
        memory=MemoryBudget(),
        checkpoint=Checkpoint(keep=keep, export=export),
        evaluate=Evaluate(),
        track=Track(),
    )
    return made.model_copy(update=changes)


def whole_state(shapes: Shapes, seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """Every flattened state tensor, the same in every process; any bit pattern, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name): torch.randint(-(2**31), 2**31 - 1, (torch.Size(shape).numel(),), generator=generator)
        .to(torch.int32)
        .view(torch.float32)
        for name, shape in shapes.items()
        for kind in STATE_KINDS
    }


def fragments(shapes: Shapes, cuts: list[Cut], seed: int | None) -> list[Fragment]:
    """Fragments of the state of `seed`; of zeros without one, ready to be read into."""
    whole = whole_state(shapes, seed) if seed is not None else None
    made = []
    for cut in cuts:
        for kind in STATE_KINDS:
            source = torch.zeros(cut.end - cut.start) if whole is None else whole[kind, cut.name][cut.start : cut.end]
            made.append(Fragment(cut.name, kind, shapes[cut.name], cut.start, source.clone()))
    return made


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def save(root: Path, step: int, shapes: Shapes, cuts: list[list[Cut]], seed: int, chunk_numel: int = 5) -> Any:
    """Save once, each rank its own cuts."""
    checkpoint_state.CHUNK_NUMEL = chunk_numel
    checkpointer = _checkpointer(root)
    checkpointer.save(step, fragments(shapes, cuts[dist.get_rank()], seed), {"step": step})
    return checkpointer.close()


def load(root: Path, shapes: Shapes, cuts: list[list[Cut]], fall_back: bool = False) -> Any:
    """Load the newest; returns where from, what was skipped and the tensors read."""
    mine = fragments(shapes, cuts[dist.get_rank()], None)
    restored = _checkpointer(root).load_latest(mine, fall_back=fall_back)
    return restored and (restored.path.name, restored.skipped, [f.tensor for f in mine])


def save_with_full_disk(
    root: Path, step: int, shapes: Shapes, cuts: list[list[Cut]], full_rank: int, limit_bytes: int
) -> Any:
    """One rank may not write files beyond a limit: no privilege is needed for it, and root obeys it too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        return save(root, step, shapes, cuts, seed=3, chunk_numel=1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_and_die(root: Path, step: int, shapes: Shapes, cuts: list[list[Cut]], doomed_rank: int) -> Any:
    """One rank is killed the moment it writes its first bytes."""
    if dist.get_rank() == doomed_rank:
        write = checkpoint_state._Crc32Stream.write

        def write_and_die(self: Any, data: Any) -> int:
            write(self, data)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        checkpoint_state._Crc32Stream.write = write_and_die  # type: ignore[method-assign]
    return save(root, step, shapes, cuts, seed=4)


_GROUPS: list[Any] = []


def _checkpointer(root: Path) -> Checkpointer:
    if not _GROUPS:
        _GROUPS.append(checkpoint_group(timeout_s=30))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Checkpointer(RunFolder(root), spec(root, dp=world_size), group=_GROUPS[0], rank=rank, world_size=world_size)


class Gang:
    """`world_size` processes joined over gloo."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.checkpoint"])
        self._meeting = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self._meeting.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        return [self._answer(pipe, timeout_s) for pipe in self._pipes]

    def _answer(self, pipe: Connection, timeout_s: float) -> Any:
        try:
            if not pipe.poll(timeout_s):
                return TimeoutError(f"no answer within {timeout_s} s")
            return pipe.recv()
        except EOFError as error:
            return error

    def close(self) -> None:
        for process, pipe in zip(self._processes, self._pipes):
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._meeting.cleanup()


def _serve(rank: int, world_size: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = function(*args)
        except Exception as error:
            answer = error
            error.__notes__ = [traceback.format_exc()]
        pipe.send(answer)
