"""Rewards near the cap: DAPO's soft punishment, and a penalty for not stopping."""

from __future__ import annotations

from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper


class SoftOverlong(Shaper):
    """score + factor * p(L): 0 up to cap - buffer, then falling in a line to -1 at the cap (DAPO, arXiv 2503.14476).

    Beyond the cap p stays at -1, as in the paper, OpenRLHF and TRL; verl, AReaL and NeMo-RL let it fall on. A wrong
    sample beats a correct one only if factor > 1 with scores of 0 and 1.
    """

    def __init__(self, cap: int = 20480, buffer: int = 4096, factor: float = 1.0) -> None:
        if not 0 <= buffer <= cap:
            raise ValueError(f"the buffer lies below the cap: {buffer} is not between 0 and {cap}")
        self.cap, self.buffer, self.factor = cap, buffer, factor

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

    def __init__(self, keep: float = 0.0, penalty: float = 0.0) -> None:
        if not 0 <= keep <= 1:
            raise ValueError(f"keep is a share of the score, not {keep:g}")
        self.keep, self.penalty = keep, penalty

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        if sample.finish != "cap":
            return sample.score
        return min(sample.score, self.keep * sample.score) - self.penalty
