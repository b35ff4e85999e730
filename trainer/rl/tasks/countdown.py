"""Countdown: reach a number by arithmetic with given ones, each used once."""

from __future__ import annotations

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from farspan.trainer.rl.tasks.base import Demonstration, Problem, Step, Task, Verdict

MOST_CHARACTERS = 200
"""Of an expression: what is longer is no answer to a problem of a few numbers."""
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Countdown(Task):
    """`3 5 7 -> 22`, answered by an expression behind a `#`: `#3*5+7`.

    Every number is used exactly once; a division may leave a fraction on the way. Demonstrations combine two numbers at
    a time and write what is left, with wrong turns that are taken back (`turns`).
    """

    type: Literal["countdown"] = "countdown"
    numbers: tuple[int, int] = (3, 4)
    """Fewest and most numbers: the difficulty."""
    largest: int = Field(default=20, ge=2)
    """Of the given numbers."""
    goal: int = Field(default=100, ge=1)
    """Largest number to be reached."""
    turns: int = Field(default=1, ge=0)
    """Most wrong turns of a demonstration."""

    @model_validator(mode="after")
    def _order(self) -> Countdown:
        if not 2 <= self.numbers[0] <= self.numbers[1] <= 6:
            raise ValueError(f"between 2 and 6 numbers, the fewer first, not {self.numbers}")
        return self

    def draw(self, draw: random.Random) -> Problem:
        while True:
            given = [draw.randint(1, self.largest) for _ in range(draw.randint(*self.numbers))]
            value, expression, _ = _combined(given, draw)
            if value.denominator == 1 and 1 <= value <= self.goal:
                prompt = f"{' '.join(map(str, given))} -> {value}"
                facts = {"numbers": given, "goal": int(value)}
                return Problem(prompt, expression, difficulty=len(given), facts=facts)

    def show(self, problem: Problem, draw: random.Random) -> Demonstration:
        steps = []
        for _ in range(draw.randint(0, self.turns)):
            value, _, lines = _combined(problem.facts["numbers"], draw)
            if value != problem.facts["goal"]:
                steps += [Step(line, "turn") for line in [*lines, "no\n"]]
        steps += [Step(line) for line in _lines_of(problem.answer)]
        return Demonstration(steps, f"#{problem.answer}")

    def verify(self, problem: Problem, response: str) -> Verdict:
        text = response.rpartition("#")[2].strip() if "#" in response else ""
        found = evaluate(text)
        if found is None:
            return Verdict(0.0, False, well_formed=False)
        value, used = found
        whole = Counter(used) == Counter(problem.facts["numbers"])
        correct = whole and value == problem.facts["goal"]
        return Verdict(float(correct), correct, parts={"numbers_used": float(whole)})


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """Value of an expression of whole numbers, + - * / and parentheses, and the numbers in it; None: it is not one."""
    if not text or len(text) > MOST_CHARACTERS:
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        used: list[int] = []
        return _value(tree, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("neither a number nor one of + - * /")


def _combined(given: list[int], draw: random.Random) -> tuple[Fraction, str, list[str]]:
    """Two numbers at a time until one is left: its value, its expression, and a line for each time."""
    left = [(Fraction(number), str(number)) for number in given]
    lines = []
    while len(left) > 1:
        (a, first), (b, second) = (left.pop(draw.randrange(len(left))) for _ in range(2))
        symbol = draw.choice("+-*/" if b and (a / b).denominator == 1 else "+-*")
        value = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[symbol](a, b)
        left.append((value, f"({first}{symbol}{second})"))
        lines.append(_line(a, symbol, b, value, [number for number, _ in left]))
    value, expression = left[0]
    return value, expression[1:-1] if len(given) > 1 else expression, lines


def _lines_of(expression: str) -> list[str]:
    """A line for each operation, inner ones first."""
    lines: list[str] = []

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            a, b = walk(node.left), walk(node.right)
            value = _OPERATIONS[type(node.op)](a, b)
            symbol = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
            lines.append(_line(a, symbol, b, value, []))
            return value
        assert isinstance(node, ast.Constant)
        return Fraction(int(node.value))  # type: ignore[arg-type]

    walk(ast.parse(expression, mode="eval").body)
    return lines


def _line(a: Fraction, symbol: str, b: Fraction, value: Fraction, left: list[Fraction]) -> str:
    rest = f" left {' '.join(map(str, left))}" if left else ""
    return f"{a}{symbol}{b}={value}{rest}\n"
