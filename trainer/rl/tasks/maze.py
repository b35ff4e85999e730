"""Paths through mazes, with the trace of a search that may be left out piece by piece (Dualformer's setting)."""

from __future__ import annotations

import heapq
import random
from typing import Literal

from pydantic import Field

from farspan.schema import Ratio
from farspan.trainer.rl.tasks.base import Demonstration, Problem, Step, Task, Verdict

MOVES = {"R": (0, 1), "D": (1, 0), "L": (0, -1), "U": (-1, 0)}
Cell = tuple[int, int]


class Maze(Task):
    """A grid with walls, a start `S` and an end `E`; answered by moves behind a `#`: `#RRDD`.

    Demonstrations write A*'s trace: `c row column` when a cell is created, `x row column` when it is closed (the kinds
    of steps are `create` and `close`), each with its cost so far and the distance that is left at least as a detail.
    Source of the trace: Dualformer, 2024, https://arxiv.org/abs/2410.09918
    """

    type: Literal["maze"] = "maze"
    size: tuple[int, int] = (4, 6)
    """Smallest and largest side: the difficulty."""
    walls: Ratio = 0.3
    """Share of cells that are walls."""
    shortest: bool = True
    """Only a shortest path is right."""
    least_moves: int = Field(default=2, ge=1)

    def draw(self, draw: random.Random) -> Problem:
        while True:
            side = draw.randint(*self.size)
            cells = [(row, column) for row in range(side) for column in range(side)]
            start, end = draw.sample(cells, 2)
            closed = {cell for cell in cells if cell not in (start, end) and draw.random() < self.walls}
            path, _ = search(side, closed, start, end)
            if path is not None and len(path) >= self.least_moves:
                marks = {start: "S", end: "E", **dict.fromkeys(closed, "x")}
                rows = ["".join(marks.get((row, column), ".") for column in range(side)) for row in range(side)]
                return Problem("\n".join(rows), path, difficulty=side, facts={"moves": len(path)})

    def show(self, problem: Problem, draw: random.Random) -> Demonstration:
        side, closed, start, end = _read(problem.prompt)
        path, trace = search(side, closed, start, end)
        assert path is not None
        return Demonstration(trace, f"#{path}")

    def verify(self, problem: Problem, response: str) -> Verdict:
        moves = response.rpartition("#")[2].strip() if "#" in response else ""
        if not moves or set(moves) - MOVES.keys():
            return Verdict(0.0, False, well_formed=False)
        side, closed, at, end = _read(problem.prompt)
        for move in moves:
            at = at[0] + MOVES[move][0], at[1] + MOVES[move][1]
            if at in closed or not (0 <= at[0] < side and 0 <= at[1] < side):
                return Verdict(0.0, False, parts={"through_a_wall": 1.0})
        arrived = at == end
        correct = arrived and (not self.shortest or len(moves) == problem.facts["moves"])
        return Verdict(float(correct), correct, parts={"arrived": float(arrived)})


def search(side: int, closed: set[Cell], start: Cell, end: Cell) -> tuple[str | None, list[Step]]:
    """A* with the Manhattan distance: the moves of a shortest path, None where there is none, and its trace."""

    def left(cell: Cell) -> int:
        return abs(cell[0] - end[0]) + abs(cell[1] - end[1])

    trace = [_clause("c", start, 0, left(start))]
    frontier: list[tuple[int, int, Cell]] = [(left(start), 0, start)]
    paths, done = {start: ""}, set()
    while frontier:
        _, _, cell = heapq.heappop(frontier)
        if cell in done:
            continue
        done.add(cell)
        cost = len(paths[cell])
        trace.append(_clause("x", cell, cost, left(cell)))
        if cell == end:
            return paths[cell], trace
        for name, (down, right) in MOVES.items():
            following = cell[0] + down, cell[1] + right
            inside = 0 <= following[0] < side and 0 <= following[1] < side
            if inside and following not in closed and (following not in paths or cost + 1 < len(paths[following])):
                paths[following] = paths[cell] + name
                heapq.heappush(frontier, (cost + 1 + left(following), len(trace), following))
                trace.append(_clause("c", following, cost + 1, left(following)))
    return None, trace


def _clause(name: str, cell: Cell, cost: int, left: int) -> Step:
    kind = {"c": "create", "x": "close"}[name]
    return Step(f"{name}{cell[0]}{cell[1]}", kind, detail=f" {cost}+{left}", end="\n")


def _read(prompt: str) -> tuple[int, set[Cell], Cell, Cell]:
    """Side, walls, start and end of a maze in text."""
    rows = prompt.split("\n")
    at = {(row, column): mark for row, line in enumerate(rows) for column, mark in enumerate(line)}
    (start,), (end,) = ([cell for cell, mark in at.items() if mark == wanted] for wanted in "SE")
    return len(rows), {cell for cell, mark in at.items() if mark == "x"}, start, end
