"""Kimi k1.5's length reward (arXiv 2501.12599): short within the group is better, and wrong is never helped by it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper


class Kimi(Shaper):
    """score + weight * term, with lambda = 0.5 - (L - min L) / (max L - min L) over all judged samples of the group.

    The term is lambda for a correct sample and min(0, lambda) for a wrong one, between -0.5 and 0.5; 0 in a group of
    one length, so in a group of one too. A wrong sample beats no correct one of its group while weight < 1 with scores
    of 0 and 1.
    """

    type: Literal["kimi"] = "kimi"
    weight: float = Field(default=0.4, ge=0)

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        lengths = [other.tokens for other in group.judged]
        shortest, longest = min(lengths), max(lengths)
        if shortest == longest:
            return sample.score
        term = 0.5 - (sample.tokens - shortest) / (longest - shortest)
        return sample.score + self.weight * (term if sample.correct else min(0.0, term))
