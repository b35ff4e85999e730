"""Penalties for repeated n-grams of tokens (arXiv 2502.03373, appendix C.2), and LASER-DE's test for repetition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import Field

from farspan.schema import Ratio
from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper


class Repetition(Shaper):
    """score + a penalty that grows with the share of n-grams seen before.

    `sparse`: weight * (1 - unique / total), one number a sample. `dense`: `weight` on each token of an n-gram that
    began earlier as well (`token_penalties`), for a critic with a discount of its own; here its discounted sum from
    the first token.

    A sample without `token_ids`, or with fewer than n, has no penalty.
    """

    type: Literal["repetition"] = "repetition"
    ngram: int = Field(default=3, ge=1)
    """Tokens; the authors' dense penalty takes 40."""
    weight: float = Field(default=-1.0, le=0)
    kind: Literal["sparse", "dense"] = "sparse"
    gamma: Ratio = 0.99
    """Discount of the dense penalty, beside the 1 of the outcome."""
    apart: bool = False
    """Dense: an n-gram counts only if it begins behind the last one that counted."""

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        ids = sample.token_ids or ()
        if self.kind == "sparse":
            return sample.score + self.weight * repeated_share(ids, self.ngram)
        total, discount = 0.0, 1.0
        for penalty in self.token_penalties(ids):
            total += discount * penalty
            discount *= self.gamma
        return sample.score + total

    def token_penalties(self, token_ids: Sequence[int]) -> list[float]:
        """`weight` on tokens of repeated n-grams, 0 elsewhere."""
        penalties, seen, free_from = [0.0] * len(token_ids), set(), 0
        for start in range(len(token_ids) - self.ngram + 1):
            gram = tuple(token_ids[start : start + self.ngram])
            if gram in seen and start >= free_from:
                penalties[start : start + self.ngram] = [self.weight] * self.ngram
                free_from = start + self.ngram if self.apart else 0
            seen.add(gram)
        return penalties


def repeated_share(token_ids: Sequence[int], ngram: int) -> float:
    """1 - unique / total n-grams; 0 for fewer than n tokens."""
    total = len(token_ids) - ngram + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(token_ids[start : start + ngram]) for start in range(total)}) / total


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """LASER-DE's test: an n-gram that comes 3 times (2 below 200 tokens), two of them closer than a third of the whole.

    n is 4, 3 below 100 tokens and 2 below 30.
    """
    length = len(token_ids)
    ngram = 2 if length < 30 else 3 if length < 100 else 4
    times = 2 if length < 200 else 3
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for start in range(length - ngram + 1):
        found[tuple(token_ids[start : start + ngram])].append(start)
    return any(
        len(starts) >= times and any(3 * (after - before) < length for before, after in pairwise(starts))
        for starts in found.values()
    )
