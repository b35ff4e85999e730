"""How each matrix is stored, so that all together take no more than a budget and lose the least.

    minimise sum_i err(i, c_i)    subject to    sum_i bytes(i, c_i) <= budget

over the choice c_i of a format for each matrix: a multiple-choice knapsack. Choices that another one beats in both are
left out; a Lagrangian search gives a bound from below and a feasible start within a choice of it; HiGHS closes the gap.

Source: Guo et al., LQ-LoRA, 2023, https://arxiv.org/abs/2311.12023, who solve the same program with Gurobi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from farspan.errors import JobError
from farspan.memory.milp import Program

TIME_LIMIT_S = 20.0


class Choice(NamedTuple):
    """One way to store a matrix."""

    error: float
    bytes: int


@dataclass(frozen=True)
class Allocation:
    """The choices."""

    chosen: tuple[int, ...]
    """Index of each matrix's choice."""
    error: float
    bytes: int
    bound: float
    """No choice within the budget has a smaller error."""


def allocate(table: Sequence[Sequence[Choice]], budget_bytes: int, *, time_limit_s: float = TIME_LIMIT_S) -> Allocation:
    """Choose for each matrix.

    Args:
        table: for each matrix its choices.

    Raises:
        JobError: not even the smallest choices fit.
    """
    fronts = [_front(choices) for choices in table]
    least = sum(choices[front[0]].bytes for choices, front in zip(table, fronts))
    if least > budget_bytes:
        raise JobError(
            f"the matrices do not fit into {budget_bytes:,} bytes",
            at="base.bits",
            why=f"in the narrowest formats of base.grid they take {least:,}",
            try_=f"raise base.bits by {least / max(1, budget_bytes):.3f} times, or add narrower formats to base.grid",
        )
    start, bound = _by_price(table, fronts, budget_bytes)
    best = start
    if bound < sum(table[i][c].error for i, c in enumerate(start)):
        best, proven = _by_program(table, fronts, budget_bytes, start, bound, time_limit_s)
        bound = max(bound, proven)
    error = sum(table[i][c].error for i, c in enumerate(best))
    size = sum(table[i][c].bytes for i, c in enumerate(best))
    return Allocation(tuple(best), error, size, min(bound, error))


def _front(choices: Sequence[Choice]) -> list[int]:
    """Those that no other beats, smallest first; errors fall along it."""
    front: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].bytes, choices[i].error)):
        if not front or choices[index].error < choices[front[-1]].error:
            front.append(index)
    return front


def _by_price(table: Sequence[Sequence[Choice]], fronts: list[list[int]], budget: int) -> tuple[list[int], float]:
    """Choices within the budget that are best at some price of a byte, and the best of the bounds of all prices."""

    def at(price: float) -> tuple[list[int], int, float]:
        picked = [min(f, key=lambda c, m=m: m[c].error + price * m[c].bytes) for m, f in zip(table, fronts)]  # type: ignore[misc]
        size = sum(m[c].bytes for m, c in zip(table, picked))
        error = sum(m[c].error for m, c in zip(table, picked))
        return picked, size, error + price * (size - budget)

    picked, size, bound = at(0.0)
    if size <= budget:
        return picked, bound
    low, high = 0.0, 1e-30
    while at(high)[1] > budget:
        low, high = high, high * 16
    for _ in range(200):
        middle = (low + high) / 2
        size, value = at(middle)[1:]
        bound = max(bound, value)
        low, high = (middle, high) if size > budget else (low, middle)
        if high - low <= 1e-12 * high:
            break
    picked, size, value = at(high)
    bound = max(bound, value)
    return _filled(table, fronts, picked, budget - size), bound


def _filled(table: Sequence[Sequence[Choice]], fronts: list[list[int]], picked: list[int], left: int) -> list[int]:
    """Spend what is left on the steps that gain most for a byte."""
    picked = list(picked)
    while True:
        steps = []
        for i, (choices, front) in enumerate(zip(table, fronts)):
            now = choices[picked[i]]
            for c in front:
                more = choices[c].bytes - now.bytes
                if 0 < more <= left:
                    steps.append(((now.error - choices[c].error) / more, i, c, more))
        if not steps:
            return picked
        _, i, c, more = max(steps)
        picked[i], left = c, left - more


def _by_program(
    table: Sequence[Sequence[Choice]],
    fronts: list[list[int]],
    budget: int,
    start: list[int],
    bound: float,
    time_limit_s: float,
) -> tuple[list[int], float]:
    """Choices no worse than the start, and a bound that the solver has proven."""
    worth = sum(table[i][c].error for i, c in enumerate(start))
    program = Program()
    columns: list[list[int]] = []
    begin: list[float] = []
    for i, (choices, front) in enumerate(zip(table, fronts)):
        columns.append([program.column(1.0, choices[c].error / worth, integer=True) for c in front])
        begin += [float(c == start[i]) for c in front]
        program.row([(column, 1.0) for column in columns[-1]], lower=1.0, upper=1.0)
    sizes = [
        (column, choices[c].bytes / budget)
        for choices, front, own in zip(table, fronts, columns)
        for c, column in zip(front, own)
    ]
    program.row(sizes, upper=1.0)
    solved, found, proven = program.solve(time_limit_s=time_limit_s), None, bound
    if solved is not None:
        proven, found = solved[0] * worth, solved[1]
    else:
        found = program.improve(begin, enough=bound / worth, time_limit_s=time_limit_s)
    if found is None:
        return start, bound
    best = [front[max(range(len(front)), key=lambda k: found[own[k]])] for front, own in zip(fronts, columns)]
    fits = sum(table[i][c].bytes for i, c in enumerate(best)) <= budget
    better = sum(table[i][c].error for i, c in enumerate(best)) < worth
    return (best if fits and better else start), proven  # a solver's tolerance is a few bytes of a large budget
