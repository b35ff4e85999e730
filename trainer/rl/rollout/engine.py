"""The protocol of a rollout engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from farspan.trainer.rl.messages import RolloutJob, Sampling, SegmentResult

if TYPE_CHECKING:
    from torch import Tensor


class RolloutEngine(Protocol):
    """Holds a copy of the policy and continues samples with it."""

    version: int
    """Of the weights it generates with."""

    def generate(self, jobs: Sequence[RolloutJob], sampling: Sampling) -> list[SegmentResult]:
        """The next segment of every job, in the order of the jobs.

        Raises:
            RunFailed: a job has no result.
        """

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take over what trains, by parameter name; nothing is in flight meanwhile.

        Raises:
            RunFailed: names or shapes are not those of this model.
        """

    def close(self) -> None:
        """Release memory and processes."""
