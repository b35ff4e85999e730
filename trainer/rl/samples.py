"""What a shaper of rewards sees: the samples of a prompt with their lengths and verdicts. Neither torch nor ray.

Lengths are generated tokens everywhere: thinking and the end-of-sequence token included, the prompt not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """A finished response and what its verifier said."""

    tokens: int
    """Generated tokens, 0 for an empty response."""
    score: float
    """Of the verifier, before any shaping."""
    correct: bool | None
    """None: the verifier could not judge (it crashed, or ran out of time). Such a sample is in no statistic and learns
    nothing; it does not count as wrong."""
    well_formed: bool = True
    """Whether an answer was found in the response at all."""
    finish: Literal["eos", "cap"] = "eos"
    """Ended by itself, or cut off at the most tokens a response may have."""
    token_ids: Sequence[int] | None = None
    """The generated tokens, where a shaper looks at them."""
    target_tokens: int | None = None
    """Length that the prompt asked for (L1)."""


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """All samples of one prompt in a step, each of them finished."""

    samples: Sequence[ScoredSample]
    prompt_id: str | int

    @property
    def judged(self) -> list[ScoredSample]:
        """Samples with a verdict."""
        return [sample for sample in self.samples if sample.correct is not None]

    @property
    def correct(self) -> int:
        """Number of correct samples."""
        return sum(sample.correct is True for sample in self.samples)
