"""GRPO-lambda's choice of groups to shorten (arXiv 2505.18086).

Two other methods carry the name: arXiv 2510.00194 (lambda-returns) and 2510.06870 (lambda-GRPO).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, PrivateAttr

from farspan.schema import Ratio
from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper


class GRPOLambda(Shaper):
    """The groups with the highest share of correct samples are paid for brevity, all others for being right.

    In a chosen group a correct sample gets 1 - alpha sigmoid((L - mean) / std) over the lengths of the group's correct
    samples, a wrong one 0; elsewhere 1 and 0. It takes the score's place. Groups are ranked within the step: this
    shaper lets them influence each other.

    The standard deviation is that of a sample (n - 1), as in public code. Correct samples of one length, or a single
    one, lie at their mean: 1 - alpha / 2.
    """

    type: Literal["grpo_lambda"] = "grpo_lambda"
    top_share: Ratio = 0.2
    """Of the step's groups that are chosen, rounded down and at least one if above 0; ties go to the smaller prompt id,
    so that runs repeat."""
    alpha: float = Field(default=0.6, ge=0, lt=1)
    """Below 1, so that a correct sample is always above a wrong one."""
    _chosen: set[int] = PrivateAttr(default_factory=set)

    def rewards(self, groups: Sequence[PromptGroup]) -> list[list[float]]:
        self._chosen = chosen = self.choose(groups)
        return [
            [
                sample.score if sample.correct is None
                else self.shaped(sample, group) if index in chosen
                else float(sample.correct)
                for sample in group.samples
            ]
            for index, group in enumerate(groups)
        ]  # fmt: skip

    def choose(self, groups: Sequence[PromptGroup]) -> set[int]:
        """Indices of the groups that are paid for brevity."""
        judged = [index for index, group in enumerate(groups) if group.judged]
        number = max(int(self.top_share * len(groups) + 1e-9), 1 if self.top_share > 0 else 0)

        def rank(index: int) -> tuple[float, tuple[int, int, str]]:
            group = groups[index]
            name = group.prompt_id
            by_name = (0, name, "") if isinstance(name, int) else (1, 0, str(name))
            return -group.correct / len(group.judged), by_name

        return set(sorted(judged, key=rank)[:number])

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        if not sample.correct:
            return 0.0
        lengths = [other.tokens for other in group.samples if other.correct]
        spread = statistics.stdev(lengths) if len(lengths) > 1 else 0.0
        z = (sample.tokens - statistics.fmean(lengths)) / (spread + 1e-6)
        return 1.0 - self.alpha * _sigmoid(z)

    def metrics(self) -> dict[str, float]:
        return {"groups_shortened": float(len(self._chosen))}


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))
