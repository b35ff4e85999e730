"""What a task is: numbered problems, a verdict on a response, and demonstrations to start from. Neither torch nor ray.

A problem is decided by its number alone, so nothing has to be stored, and a resumed run goes on with the next one.
Problems to train on, to monitor and to hold out never share a prompt: a hash of its text decides which it is for.
"""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from farspan.schema import Schema

Side = Literal["train", "monitor", "held_out"]
ONE_OF = 8
"""One prompt in so many is held out, and one more is for monitoring."""
_TRIES = 1000


@dataclass(frozen=True)
class Problem:
    """One prompt and what a verifier needs to judge responses to it."""

    prompt: str
    answer: str
    difficulty: int = 0
    """Larger is harder; the unit is the task's."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the verifier needs, as JSON can hold it."""
    target_tokens: int | None = None
    """A length that the prompt asks for."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says about one response."""

    score: float
    correct: bool | None
    """None: it could not judge."""
    well_formed: bool = True
    parts: dict[str, float] = field(default_factory=dict)
    """Parts of the score by name, for the log."""


@dataclass(frozen=True)
class Step:
    """A piece of a demonstrated trace."""

    text: str
    kind: str = "work"
    """What may be left out together."""
    detail: str = ""
    """Behind the text, and may be left out alone."""
    end: str = ""
    """Behind both."""


@dataclass(frozen=True)
class Demonstration:
    """A response to learn from before RL: what it writes on the way, and how it ends."""

    steps: Sequence[Step]
    ending: str

    @property
    def text(self) -> str:
        return "".join(f"{step.text}{step.detail}{step.end}" for step in self.steps) + self.ending


class Task(Schema):
    """Numbered problems. Subclasses say how one is drawn, shown and judged."""

    seed: int = 0
    """Of the whole sequence of problems."""

    def problem(self, number: int, *, side: Side = "train") -> Problem:
        """The problem of this number, in the sequence of its side."""
        for attempt in range(_TRIES):
            problem = self.draw(self._random("problem", side, number, attempt))
            if side_of(problem.prompt) == side:
                return problem
        raise ValueError(
            f"{type(self).__name__} found no problem {number} in {_TRIES} draws: too few different prompts"
        )

    def demonstration(self, number: int) -> tuple[Problem, Demonstration]:
        """A training problem with a response; its own sequence of numbers, apart from what RL draws."""
        problem = self.problem(-1 - number)
        return problem, self.show(problem, self._random("demonstration", number))

    @abstractmethod
    def draw(self, draw: random.Random) -> Problem:
        """Any problem of this task."""

    @abstractmethod
    def show(self, problem: Problem, draw: random.Random) -> Demonstration:
        """How one may answer it."""

    @abstractmethod
    def verify(self, problem: Problem, response: str) -> Verdict:
        """Judge the text of a response, without its end-of-sequence token."""

    def _random(self, *key: object) -> random.Random:
        return random.Random(repr((type(self).__name__, self.seed, *key)))


def side_of(prompt: str) -> Side:
    """What a prompt is for."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return {0: "held_out", 1: "monitor"}.get(int.from_bytes(digest, "little") % ONE_OF, "train")  # type: ignore[return-value]
