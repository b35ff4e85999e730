"""Rewards near the cap: DAPO's soft punishment, and a penalty for not stopping."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from farspan.schema import Count, Ratio
from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper


class SoftOverlong(Shaper):
    """score + factor * p(L): 0 up to cap - buffer, then falling in a line to -1 at the cap (DAPO, arXiv 2503.14476).

    Beyond the cap p stays at -1, as in the paper, OpenRLHF and TRL; verl, AReaL and NeMo-RL let it fall on. A wrong
    sample beats a correct one only if factor > 1 with scores of 0 and 1.
    """

    type: Literal["soft_overlong"] = "soft_overlong"
    cap: Count = Field(default=20480, ge=1)
    """Most tokens a response may have; in a job its cap."""
    buffer: Count = Field(default=4096, ge=0)
    """Tokens below the cap within which the punishment grows."""
    factor: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _below_the_cap(self) -> Self:
        if self.buffer > self.cap:
            raise ValueError(f"the buffer lies below the cap: {self.buffer} is more than {self.cap}")
        return self

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        return sample.score + self.factor * self.punishment(sample.tokens)

    def punishment(self, tokens: int) -> float:
        """p(L), between -1 and 0."""
        allowed = self.cap - self.buffer
        if tokens <= allowed:
            return 0.0
        return -1.0 if tokens > self.cap else (allowed - tokens) / self.buffer


class StopProperly(Shaper):
    """A sample cut off at the cap keeps `keep` of a positive score and loses `penalty` (ProRL's "stop properly").

    With the defaults a truncated sample is worth nothing, and less than nothing only by `penalty`.
    """

    type: Literal["stop_properly"] = "stop_properly"
    keep: Ratio = 0.0
    penalty: float = Field(default=0.0, ge=0)

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        if sample.finish != "cap":
            return sample.score
        return min(sample.score, self.keep * sample.score) - self.penalty
