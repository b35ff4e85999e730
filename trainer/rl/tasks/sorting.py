"""Lists to sort, pass by pass."""

from __future__ import annotations

import random
import re
from typing import Literal

from pydantic import Field

from farspan.trainer.rl.tasks.base import Demonstration, Problem, Step, Task, Verdict

_LIST = re.compile(r"\d+(?: \d+)*$")


class Sorting(Task):
    """`7 3 9 3`, answered by the sorted list behind a `#`: `#3 3 7 9`.

    Demonstrations write the list after each pass of bubble sort (kind `pass`), every exchange before it (kind
    `exchange`).
    """

    type: Literal["sorting"] = "sorting"
    items: tuple[int, int] = (3, 6)
    """Fewest and most: the difficulty."""
    largest: int = Field(default=99, ge=1)

    def draw(self, draw: random.Random) -> Problem:
        items = [draw.randint(0, self.largest) for _ in range(draw.randint(*self.items))]
        return Problem(" ".join(map(str, items)), " ".join(map(str, sorted(items))), difficulty=len(items))

    def show(self, problem: Problem, draw: random.Random) -> Demonstration:
        items, steps = [int(item) for item in problem.prompt.split()], []
        for end in range(len(items) - 1, 0, -1):
            exchanged = False
            for at in range(end):
                if items[at] > items[at + 1]:
                    steps.append(Step(f"{items[at]}>{items[at + 1]} ", "exchange"))
                    items[at : at + 2] = items[at + 1], items[at]
                    exchanged = True
            if not exchanged:
                break
            steps.append(Step(f"{' '.join(map(str, items))}\n", "pass"))
        return Demonstration(steps, f"#{problem.answer}")

    def verify(self, problem: Problem, response: str) -> Verdict:
        text = response.rpartition("#")[2].strip() if "#" in response else ""
        correct = text == problem.answer
        return Verdict(float(correct), correct, well_formed=_LIST.match(text) is not None)
