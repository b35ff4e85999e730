"""How ranks agree on a checkpoint: small objects exchanged over a gloo group of their own.

A group of its own because the exchange happens in a background thread, while the training thread uses the other groups:
two threads on one group would mix up each other's messages.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from farspan.errors import CheckpointError, PeerLost

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")


def checkpoint_group(*, timeout_s: float = 1800.0) -> ProcessGroup | None:
    """Process group of its own for checkpoints, on the CPU. Collective; None when there is one rank.

    `timeout_s` must cover the export of the whole model, since the other ranks wait for its verdict.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


class Ranks:
    """Exchange of small objects over the checkpoint group; a world of one without it."""

    def __init__(self, group: ProcessGroup | None, rank: int, count: int) -> None:
        assert group is not None or count == 1, "several ranks need a group to agree over"
        self.group, self.rank, self.count = group, rank, count

    def gather(self, value: Value) -> list[Value]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise PeerLost(
                "another rank left while a checkpoint was agreed on",
                at=f"rank {self.rank} of {self.count}",
                why=str(error).split("\n", maxsplit=1)[0],
                try_="look for the rank that failed first; the older checkpoints are untouched",
            ) from error
        return values

    def raise_first(self, error: CheckpointError | None) -> None:
        """Raise on every rank what the lowest failing rank met."""
        for met in self.gather(error):
            if met is not None:
                raise met
