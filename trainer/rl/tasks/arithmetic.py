"""Chains of small sums, with as much scratch work as one likes."""

from __future__ import annotations

import random
import re
from typing import Literal

from pydantic import Field

from farspan.schema import Ratio
from farspan.trainer.rl.tasks.base import Demonstration, Problem, Step, Task, Verdict

_ANSWER = re.compile(r"#(\d+)$")
_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Arithmetic(Task):
    """`7+5*3-4` from left to right modulo `modulus`, answered behind a `#`.

    Demonstrations are of three styles: `full` writes every step as an equation and then checks all of them once more,
    `short` writes what each operand makes of the result so far, `none` answers at once. Slips put a wrong result into a
    step and go on from there: a policy that learned from them is right more often where it wrote more, until RL has
    sharpened it.
    """

    type: Literal["arithmetic"] = "arithmetic"
    steps: tuple[int, int] = (3, 6)
    """Least and most operations of a chain: the difficulty."""
    modulus: int = Field(default=10, ge=2, le=100)
    full: Ratio = 0.7
    """Share of demonstrations that write everything."""
    short: Ratio = 0.25
    """Share that writes each step once and in short; the rest answers at once."""
    full_slips: Ratio = 0.0
    """Share of steps with a wrong result, in demonstrations that write everything."""
    short_slips: Ratio = 0.08
    """The same in short ones."""

    def draw(self, draw: random.Random) -> Problem:
        number = draw.randint(*self.steps)
        values = [draw.randrange(self.modulus) for _ in range(number + 1)]
        operations = [draw.choice("+-*") for _ in range(number)]
        chain = str(values[0]) + "".join(f"{op}{value}" for op, value in zip(operations, values[1:]))
        return Problem(f"{chain}=", str(self._results(chain)[-1]), difficulty=number)

    def show(self, problem: Problem, draw: random.Random) -> Demonstration:
        chain = problem.prompt.rstrip("=")
        style = draw.random()
        if style >= self.full + self.short:
            return Demonstration((), f"#{problem.answer}")
        slips = self.full_slips if style < self.full else self.short_slips
        results = self._results(chain, slips, draw)
        equations = list(zip([_first(chain), *results], re.findall(r"[-+*]\d+", chain), results))
        if style >= self.full:
            return Demonstration([Step(f"{step}={after} ") for _, step, after in equations], f"#{results[-1]}")
        work = [Step(f"{before}{step}={after}\n") for before, step, after in equations]
        check = [Step(f"{before}{step}={after} ok\n", "check") for before, step, after in equations]
        return Demonstration([*work, *check], f"#{results[-1]}")

    def verify(self, problem: Problem, response: str) -> Verdict:
        found = _ANSWER.search(response)
        correct = found is not None and found[1] == problem.answer
        return Verdict(float(correct), correct, well_formed=found is not None)

    def _results(self, chain: str, slips: float = 0.0, draw: random.Random | None = None) -> list[int]:
        """After each operation; with slips some are wrong, and what follows builds on them."""
        value, results = _first(chain), []
        for operation, operand in re.findall(r"([-+*])(\d+)", chain):
            value = _OPERATIONS[operation](value, int(operand)) % self.modulus
            if draw is not None and draw.random() < slips:
                value = (value + draw.randrange(1, self.modulus)) % self.modulus
            results.append(value)
        return results


def _first(chain: str) -> int:
    found = re.match(r"\d+", chain)
    assert found is not None
    return int(found[0])
