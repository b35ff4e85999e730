"""The interface of a shaper: from all groups of a step to the total reward of every sample.

A shaper sees whole groups, since most look at the lengths of a sample's siblings, and all groups of a step, since some
rank them. What every shaper of ours keeps:

- the order of samples in a group does not matter, and only those that say so let groups influence each other;
- rewards are finite: for a group of one, for equal lengths, for empty responses, where everything was cut off;
- a sample without a verdict keeps its score and is in no statistic.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self

from farspan.schema import Schema
from farspan.trainer.rl.samples import PromptGroup, ScoredSample


class Shaper(Schema):
    """From verdicts and lengths to rewards. Its fields are its settings; what it learns is not among them."""

    def rewards(self, groups: Sequence[PromptGroup]) -> list[list[float]]:
        """The total reward of every sample, after shaping: one row for each group, in the order of its samples."""
        return [[self._reward(sample, group) for sample in group.samples] for group in groups]

    def _reward(self, sample: ScoredSample, group: PromptGroup) -> float:
        """Of one sample, for shapers that look at one group at a time."""
        return sample.score if sample.correct is None else self.shaped(sample, group)

    @abstractmethod
    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        """Total reward of a sample that was judged; `group` holds it."""

    def observe(self, groups: Sequence[PromptGroup]) -> None:
        """Take in groups of the monitoring prompts, which are not trained on."""

    @property
    def wants_monitor(self) -> bool:
        """Whether `observe` does anything."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What must outlive a restart, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""

    def for_cap(self, cap: int) -> Self:
        """A fresh one for responses of at most `cap` tokens, where nothing else was said of its `cap`."""
        capped = "cap" in type(self).model_fields and "cap" not in self.model_fields_set
        return type(self)(**{**self.model_dump(exclude_unset=True), **({"cap": cap} if capped else {})})

    def metrics(self) -> dict[str, float]:
        """What this shaper did in the last `rewards`, or stands at, by name."""
        return {}


class Plain(Shaper):
    """No shaping: the verifier's score."""

    type: Literal["none"] = "none"

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        return sample.score
