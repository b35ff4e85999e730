"""Planned addresses in a run: the second step is recorded, from the third on every request has its place.

The first step allocates what stays (gradient buffers, moments, workspaces), so the second is the first that is like all
others. Off by default: see `farspan.memory.arena`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from farspan.errors import JobError
from farspan.memory.addresses import TwoLevels
from farspan.memory.arena import Arena, build
from farspan.trainer.config import TrainSpec
from farspan.trainer.run_folder import default_cache_root

RECORDED = 2
"""Step of an attempt."""


def planned_arena(spec: TrainSpec, *, use_gpu: bool) -> Arena | None:
    """The allocator of this process, if the job asks for planned addresses. Before anything else touches the GPU.

    Raises:
        JobError: there is no GPU, an engine that asks torch's allocator for its figures, or no compiler.
    """
    if spec.addresses == "torch":
        return None
    if not use_gpu or spec.zero:
        why = "the run trains on CPU" if not use_gpu else f"DeepSpeed (ZeRO {spec.zero}) reads torch's own allocator"
        raise JobError(
            "planned addresses cannot be used here",
            at="memory.addresses",
            why=why,
            try_="--set memory.addresses=torch",
        )
    from transformers import modeling_utils

    modeling_utils.caching_allocator_warmup = lambda *_: None  # it asks torch's allocator, which is none any more
    return Arena(build(default_cache_root() / "build"), cuda=True)


class PlannedAddresses:
    """Steps of a run under an arena.

    Args:
        arena: None: steps run as they are.
        layers: where a piece of work begins.
        planned: is told the layout when it is made.
    """

    def __init__(self, arena: Arena | None, layers: Iterable[nn.Module], planned: Callable[[TwoLevels], None]) -> None:
        self.arena, self._planned, self._steps = arena, planned, 0
        if arena is not None:
            for layer in layers:
                layer.register_forward_pre_hook(lambda *_: arena.cut())

    @contextmanager
    def step(self, stream: int | None = None) -> Iterator[None]:
        """Around a training step.

        Args:
            stream: address of the stream that the step allocates on; None: the current one.
        """
        if self.arena is None:
            yield
            return
        self._steps += 1
        if self._steps < RECORDED:
            yield
        elif self._steps == RECORDED:
            with self.arena.record(torch.cuda.current_stream().cuda_stream if stream is None else stream):
                yield
        else:
            if self.arena.layout is None:
                self._planned(self.arena.plan())
            with self.arena.step():
                yield
