"""What driver, rollout workers and trainers send each other: plain numbers and arrays, no tensors, no closures.

Every message can be sent again: a job names its sample, segment and seed, so a worker that does it twice, or another
worker that does it after the first one died, generates the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Finish = Literal["eos", "segment", "cap"]
"""Ended by itself; used up this segment's budget, to go on later; reached the most tokens a response may have."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Log-probabilities are those of the distribution drawn from."""

    temperature: float = 1.0
    """0: the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""


@dataclass(frozen=True)
class RolloutJob:
    """Generate the next tokens of one sample."""

    sample_id: int
    """Unique in the run."""
    segment: int
    """0 for the first tokens of a sample, one more for each job that went before."""
    prompt_ids: Sequence[int]
    prefix_ids: Sequence[int]
    """What this sample generated before."""
    budget: int
    """Most new tokens now."""
    remaining: int
    """Most new tokens until the cap; not below `budget`."""
    seed: int
    """Of the sample, the same in all of its segments: the draw of a token depends on it and the token's position."""


@dataclass(frozen=True)
class SegmentResult:
    """What a worker generated for one job."""

    sample_id: int
    segment: int
    new_ids: np.ndarray
    """int32 [n], the end-of-sequence token included."""
    log_probs: np.ndarray
    """float32 [n], of the distribution that was sampled from."""
    finish: Finish
    version: int
    """Of the weights."""
    seconds: float
    """Of the batch this job was generated in."""

    def problem_with(self, job: RolloutJob, *, eos_ids: Sequence[int], vocab: int) -> str | None:
        """What makes this no answer to `job`; None: nothing does."""
        count = len(self.new_ids)
        if (self.sample_id, self.segment) != (job.sample_id, job.segment):
            return f"it answers segment {self.segment} of sample {self.sample_id}"
        if count != len(self.log_probs) or not 0 < count <= job.budget:
            return f"{count} tokens and {len(self.log_probs)} log-probabilities for a budget of {job.budget}"
        if not (np.isfinite(self.log_probs).all() and (self.log_probs <= 1e-6).all()):
            return "log-probabilities that are none"
        if ((self.new_ids < 0) | (self.new_ids >= vocab)).any():
            return f"token ids outside of the vocabulary of {vocab}"
        ends = np.isin(self.new_ids, list(eos_ids))
        if ends[:-1].any() or ends[-1] != (self.finish == "eos"):
            return f"finish {self.finish!r} with {int(ends.sum())} end-of-sequence tokens"
        if self.finish == "cap" and count != job.remaining:
            return f"{count} tokens where {job.remaining} were left to the cap"
        return (
            f"{count} tokens of a segment of {job.budget}" if self.finish == "segment" and count != job.budget else None
        )
