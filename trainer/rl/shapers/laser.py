"""LASER: a bonus for correct answers within a target length, fixed or found by difficulty (arXiv 2505.15612)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from farspan.schema import Count
from farspan.trainer.rl.samples import PromptGroup, ScoredSample
from farspan.trainer.rl.shapers.base import Shaper
from farspan.trainer.rl.shapers.repetition import is_repetitive

Band = Literal["easy", "medium", "hard"]
BANDS: tuple[Band, ...] = ("easy", "medium", "hard")


def band_of(group: PromptGroup) -> Band:
    """Difficulty of a prompt for this policy: at least 2/3 of its judged samples correct, at least 1/3, fewer."""
    correct, judged = group.correct, len(group.judged)
    return "easy" if judged and 3 * correct >= 2 * judged else "medium" if judged and 3 * correct >= judged else "hard"


class Laser(Shaper):
    """score + alpha for a correct sample of at most `target` tokens.

    No wrong sample beats a correct one, unless alpha > 1 penalises it below.
    """

    type: Literal["laser"] = "laser"
    target: Count = Field(ge=0)
    alpha: float = Field(default=0.5, ge=0)
    kind: Literal["bonus", "penalty", "both"] = "bonus"
    """`bonus` as in the paper; `penalty`: -alpha for a correct one that is longer; `both`."""

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        if not sample.correct:
            return sample.score
        if sample.tokens <= self.target:
            return sample.score + (self.alpha if self.kind != "penalty" else 0.0)
        return sample.score - (self.alpha if self.kind != "bonus" else 0.0)


class LaserD(Shaper):
    """LASER with a target for each band of difficulty, found on monitoring prompts.

    A prompt's band comes from its own group in the step. A target is the smallest length on the grid within which so
    large a share of all the band's responses lies that of its least number of correct ones (2K/3, K/3 and 1 of K
    samples) at least one is expected there. Where no length on the grid will do, and before the first `observe`, the
    target is the longest response of the step, which every correct sample keeps within.

    """

    type: Literal["laser_d"] = "laser_d"
    alpha: float = Field(default=0.5, ge=0)
    """Bonus of a correct sample within its target."""
    cap: Count = Field(default=16384, ge=1)
    """Most tokens a response may have, the end of the grid; in a job its cap."""
    lower: Count = Field(default=1024, ge=1)
    """Beginning of the grid: 1024, 2048 or 4096 in the paper."""
    step: Count = Field(default=1024, ge=1)
    """Spacing of the grid."""
    rounding: Literal["floor", "ceil"] = "floor"
    """Of 2K/3 and K/3: as published, or up."""
    _targets: dict[Band, int | None] = PrivateAttr(default_factory=lambda: dict.fromkeys(BANDS))
    _longest: int = PrivateAttr(default=0)

    @model_validator(mode="after")
    def _grid(self) -> Self:
        if self.lower > self.cap:
            raise ValueError(f"the grid goes from lower to cap, and {self.lower} is more than {self.cap}")
        return self

    @property
    def targets(self) -> dict[Band, int | None]:
        """Tokens by band; None: the longest response of the step."""
        return dict(self._targets)

    @property
    def wants_monitor(self) -> bool:
        return True

    def rewards(self, groups: Sequence[PromptGroup]) -> list[list[float]]:
        self._longest = max((sample.tokens for group in groups for sample in group.samples), default=0)
        return super().rewards(groups)

    def target(self, group: PromptGroup) -> int:
        """Tokens within which a correct sample of this group has the bonus."""
        found = self._targets[band_of(group)]
        return self._longest if found is None else found

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        within = bool(sample.correct) and sample.tokens <= self.target(group)
        return sample.score + (self.alpha if within else 0.0)

    def observe(self, groups: Sequence[PromptGroup]) -> None:
        """Set the targets anew from these groups alone."""
        for band in BANDS:
            inside = [group for group in groups if group.judged and band_of(group) == band]
            lengths = sorted(sample.tokens for group in inside for sample in group.judged)
            least = self._least_correct(band, max((len(group.judged) for group in inside), default=0))
            self._targets[band] = self._smallest_length(lengths, least)

    def _least_correct(self, band: Band, samples: int) -> int:
        if band == "hard":
            return 1
        thirds = 2 * samples if band == "easy" else samples
        return max(1, thirds // 3 if self.rounding == "floor" else -(-thirds // 3))

    def _smallest_length(self, lengths: list[int], least: int) -> int | None:
        """Where share * least reaches 1, in whole numbers: among n responses, n / least of them."""
        if not lengths:
            return None
        needed = lengths[-(-len(lengths) // least) - 1]
        grid = max(self.lower, self.lower + -(-(needed - self.lower) // self.step) * self.step)
        return min(grid, self.cap) if needed <= self.cap else None

    def state_dict(self) -> dict[str, Any]:
        return {"targets": dict(self.targets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._targets = {band: state["targets"][band] for band in BANDS}

    def metrics(self) -> dict[str, float]:
        return {f"target_{band}": float(target) for band, target in self.targets.items() if target is not None}


class LaserDE(LaserD):
    """LASER-D that pays for exploring: a wrong, well-formed answer longer than its target has the bonus as well, unless
    it repeats itself.

    A wrong sample's score must lie more than alpha under a correct one's, or it is worth as much (the paper: -0.5).
    A sample without `token_ids` counts as one that does not repeat itself.
    """

    type: Literal["laser_de"] = "laser_de"  # type: ignore[assignment]

    def shaped(self, sample: ScoredSample, group: PromptGroup) -> float:
        explores = (
            not sample.correct
            and sample.well_formed
            and sample.tokens > self.target(group)
            and not is_repetitive(sample.token_ids or ())
        )
        return sample.score + self.alpha if explores else super().shaped(sample, group)
