"""Who holds what at ZeRO 0: AdamW's state is on every rank, that of other optimizers on one rank a parameter.

An owner has a parameter's fp32 master and state and takes its step; then it sends the new weights to the others.
State is whole, so that an optimizer may look at a matrix as one, and there is once as much of it as on one rank, over
all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from farspan.memory.optimizers import SENT_ELEMENTS, owners


class Owners:
    """Division of parameters among the ranks of a group.

    Args:
        numels: elements by name, in an order that is the same on all ranks.
    """

    def __init__(self, numels: Mapping[str, int], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.of = dict(zip(numels, owners(list(numels.values()), self.world_size)))
        self.own = [name for name in numels if self.of[name] == self.rank]

    @torch.no_grad()
    def send(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite the weights that other ranks own with theirs. Collective; `weights`: all, by name."""
        if self.world_size == 1:
            return
        for owner, message in self._messages(weights):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in message])
            dist.broadcast(flat, group=self._group, group_src=owner)
            if owner != self.rank:
                for tensor, received in zip(message, flat.split([tensor.numel() for tensor in message])):
                    tensor.copy_(received.view(tensor.shape))

    def _messages(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, tensors of one dtype), the same on all ranks; at most one tensor goes beyond `SENT_ELEMENTS`."""
        for owner in range(self.world_size):
            for dtype in dict.fromkeys(tensor.dtype for tensor in weights.values()):
                message: list[Tensor] = []
                for name, tensor in weights.items():
                    if self.of[name] != owner or tensor.dtype != dtype:
                        continue
                    message.append(tensor)
                    if sum(part.numel() for part in message) >= SENT_ELEMENTS:
                        yield owner, message
                        message = []
                if message:
                    yield owner, message
