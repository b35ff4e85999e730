"""L1: lengths as asked for in the prompt (LCPO, arXiv 2503.04697)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farspan.schema import Count
from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper


def _asked(sample: ScoredSample, shaper: L1Exact | L1Max) -> int:
    asked = shaper.otherwise if sample.target_tokens is None else sample.target_tokens
    if asked is None:
        raise ValueError(
            f"{shaper.type} needs the length each prompt asks for, and a sample has target_tokens=None; set `otherwise`"
        )
    return asked


class L1Exact(Shaper):
    """score - alpha |n - L|, where the prompt says "Think for n tokens."

    A correct sample that misses by 1 / alpha tokens is worth as little as a wrong one on the spot.
    """

    type: Literal["l1_exact"] = "l1_exact"
    alpha: float = Field(default=3e-4, ge=0)
    """Of the reward, for a token too many or too few."""
    otherwise: Count | None = Field(default=None, ge=1)
    """Length where a prompt asks for none."""

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        return sample.score - self.alpha * abs(_asked(sample, self) - sample.tokens)


class L1Max(Shaper):
    """score * clip(alpha (n - L) + offset, 0, 1), where the prompt says "Think for maximum n tokens."

    A wrong sample (score 0) has 0, which a correct one far too long has as well.
    """

    type: Literal["l1_max"] = "l1_max"
    alpha: float = Field(default=3e-4, ge=0)
    offset: float = 0.5
    """Share of the score for exactly n tokens."""
    slope_scale: float = Field(default=1.0, ge=0)
    """0.5 is the slope of the authors' code, which is half of the paper's."""
    otherwise: Count | None = Field(default=None, ge=1)
    """Length where a prompt asks for none."""

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        ahead = _asked(sample, self) - sample.tokens
        return sample.score * min(1.0, max(0.0, self.slope_scale * self.alpha * ahead + self.offset))
