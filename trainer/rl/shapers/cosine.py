"""The cosine length reward of "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373, appendix C.1)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from farspan.schema import Count
from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper


class Cosine(Shaper):
    """e + (s - e) / 2 (1 + cos(pi L / cap)), from s at length 0 to e at the cap; it takes the score's place.

    A wrong sample beats a correct one where `wrong` reaches above `correct`, with the defaults nowhere, and where the
    correct one exceeds.
    """

    type: Literal["cosine"] = "cosine"
    cap: Count = Field(default=14336, ge=1)
    """Most tokens a response may have; in a job its cap."""
    correct: tuple[float, float] = (2.0, 1.0)
    """(at_0, at_cap) of correct samples. The paper's falls, and so shortens."""
    wrong: tuple[float, float] = (-10.0, 0.0)
    """(at_0, at_cap) of wrong ones. The paper's rises: think longer where it did not help yet."""
    exceed: float = -10.0
    """Of samples that were cut off, or end within `margin` tokens of the cap, right or wrong."""
    margin: int = Field(default=16, ge=0)
    """16 in the authors' code, for templates that add tokens."""

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        if sample.finish == "cap" or sample.tokens + self.margin >= self.cap:
            return self.exceed
        at_0, at_cap = self.correct if sample.correct else self.wrong
        return at_cap + 0.5 * (at_0 - at_cap) * (1 + math.cos(math.pi * sample.tokens / self.cap))
