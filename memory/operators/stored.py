"""What an operator keeps of a tensor that others made: the tensor, or what it can be made from again.

An operator of `memory.operators` that knows a cheaper form of its output says so on the tensor; whoever needs that
tensor in backward keeps this form in its place, so that what two operators need is stored once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_ATTRIBUTE = "stored_for_backward"


@dataclass(frozen=True)
class Stored:
    """A tensor as backward will have it."""

    tensors: tuple[Tensor, ...]
    """To be saved by the node that needs it."""
    made: Callable[..., Tensor] | None = None
    """Makes the tensor of them, without its leading shape: [R, C]. None: it is the one tensor itself."""

    def back(self, saved: tuple[Tensor, ...]) -> Tensor:
        """The tensor, of what was saved."""
        if self.made is not None:
            return self.made(*saved)
        return saved[0]

    def recipe(self) -> Stored:
        """Without the tensors: what a node may hold beside what it has saved."""
        return Stored((), self.made)


def say_stored(tensor: Tensor, stored: Stored) -> None:
    """Let whoever needs `tensor` in backward keep `stored` in its place."""
    setattr(tensor, _ATTRIBUTE, stored)


def stored(tensor: Tensor) -> Stored:
    """What to keep of a tensor."""
    found: Any = getattr(tensor, _ATTRIBUTE, None)
    return found if found is not None else Stored((tensor,))
