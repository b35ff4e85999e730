"""What an optimizer is to the engine at ZeRO 0: state for some masters, and their step from given gradients.

A rule knows nothing of ranks, precision or schedules, so that each is a few lines beside its formula; the engine hands
it the masters whose state this rank holds. All of them step at once, or one after another while backward runs. State
is allocated at the start, so that a checkpoint can be read into it, and named by kind; it may have any shape and dtype.

Names: M, N rows and columns of a matrix; R width of a subspace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Rule(ABC):
    """State and step of one kind of optimizer for `masters`.

    Args:
        masters: weights to update in place, by name: contiguous, fp32 (fp64 for the rules that compute in their
            masters' dtype: all but those with 8-bit state).
        decay: weight decay of each; the weight shrinks by lr * decay in every step.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: Mapping[str, float]) -> None:
        self.masters, self.decay = masters, decay
        self.states: dict[str, dict[str, Tensor]] = {}

    @abstractmethod
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, count: int) -> None:
        """Update the masters named in `gradients`; gradients may be overwritten.

        Args:
            gradients: in the masters' dtype and shape.
            count: this step's number, from 1; the same for all masters of an optimizer step.
        """

    def state(self, name: str) -> dict[str, Tensor]:
        """Live state tensors of one master by kind: writing into them restores the optimizer."""
        return self.states[name]

    def restored(self, count: int) -> None:  # noqa: B027  a rule that counts nothing has nothing to set
        """State was overwritten by that after step `count`."""

    def flat(self, name: str) -> Tensor:
        """A master's elements in a row."""
        return self.masters[name].detach().view(-1)


class HasBetas(Protocol):
    """Settings of the rules that average gradients and squares."""

    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...


class Parts(Rule):
    """Several rules, each with masters of its own."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__(
            {name: master for rule in rules for name, master in rule.masters.items()},
            {name: decay for rule in rules for name, decay in rule.decay.items()},
        )
        self.rules = rules
        self.rule_of = {name: rule for rule in rules for name in rule.masters}

    def step(self, gradients: Mapping[str, Tensor], *, lr: float, count: int) -> None:
        for rule in self.rules:
            given = {name: gradient for name, gradient in gradients.items() if self.rule_of[name] is rule}
            if given:
                rule.step(given, lr=lr, count=count)

    def state(self, name: str) -> dict[str, Tensor]:
        return self.rule_of[name].state(name)

    def restored(self, count: int) -> None:
        for rule in self.rules:
            rule.restored(count)
