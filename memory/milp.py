"""Programs for HiGHS, and the one that bounds every plan from below.

`bound` is a mixed-integer program over totals only. It knows how many layers of each kind are kept and how many
segments there are, but not where anything is or when: every placement, however irregular, satisfies it, so its optimum
is a lower bound on the step. It takes some milliseconds. `memory.row_program` says where things are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from farspan.memory.evaluate import Evaluator
from farspan.memory.plan import TIERS
from farspan.memory.problem import LinearClass

Terms = Iterable[tuple[int, float]]
INFINITY = float("inf")
NEGLIGIBLE = 1e-9
"""Smaller coefficients HiGHS leaves out, and says so."""


class Program:
    """Columns and rows of a (mixed-integer) linear program, minimised."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.lower: list[float] = []
        self.integers: list[int] = []
        self.row_lower: list[float] = []
        self.row_upper: list[float] = []
        self.start: list[int] = [0]
        self.index: list[int] = []
        self.value: list[float] = []

    def column(self, upper: float = INFINITY, cost: float = 0.0, *, lower: float = 0.0, integer: bool = False) -> int:
        self.cost.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        if integer:
            self.integers.append(len(self.cost) - 1)
        return len(self.cost) - 1

    def row(self, terms: Terms, *, lower: float = -INFINITY, upper: float = INFINITY) -> None:
        summed: dict[int, float] = {}
        for column, coefficient in terms:
            summed[column] = summed.get(column, 0.0) + coefficient
        summed = {column: coefficient for column, coefficient in summed.items() if abs(coefficient) > NEGLIGIBLE}
        self.index += summed.keys()
        self.value += summed.values()
        self.start.append(len(self.index))
        self.row_lower.append(lower)
        self.row_upper.append(upper)

    def total(self, terms: Terms) -> int:
        """A new column that equals a sum."""
        column = self.column()
        self.row([(column, -1.0), *terms], lower=0.0, upper=0.0)
        return column

    def solve(self, *, time_limit_s: float = 10.0) -> tuple[float, np.ndarray] | None:
        """Optimum (of a mixed-integer program: the proven bound) and columns; None when infeasible."""
        solver = self._solver(time_limit_s)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        info = solver.getInfo()
        bound = info.mip_dual_bound if self.integers else info.objective_function_value
        return bound, np.asarray(solver.getSolution().col_value)

    def improve(self, columns: Sequence[float], *, enough: float, time_limit_s: float) -> np.ndarray | None:
        """The best columns found from given ones within a time, or as soon as they cost no more than `enough`."""
        solver = self._solver(time_limit_s)
        solver.setOptionValue("objective_target", enough * (1 + 1e-9))
        start = highspy.HighsSolution()
        start.col_value = list(columns)
        solver.setSolution(start)
        solver.run()
        if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        return np.asarray(solver.getSolution().col_value)

    def _solver(self, time_limit_s: float) -> highspy.Highs:
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = len(self.cost), len(self.row_lower)
        program.col_cost_ = np.array(self.cost)
        program.col_lower_, program.col_upper_ = np.array(self.lower), np.array(self.upper)
        program.row_lower_, program.row_upper_ = np.array(self.row_lower), np.array(self.row_upper)
        program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        program.a_matrix_.start_ = np.array(self.start, dtype=np.int32)
        program.a_matrix_.index_ = np.array(self.index, dtype=np.int32)
        program.a_matrix_.value_ = np.array(self.value)
        if self.integers:
            kinds = [highspy.HighsVarType.kContinuous] * len(self.cost)
            for column in self.integers:
                kinds[column] = highspy.HighsVarType.kInteger
            program.integrality_ = kinds
        solver = highspy.Highs()
        for option, value in (("output_flag", False), ("threads", 1), ("time_limit", time_limit_s)):
            solver.setOptionValue(option, value)
        status = solver.passModel(program)
        assert status == highspy.HighsStatus.kOk, status
        return solver


def alike(linear: Sequence[LinearClass]) -> list[list[LinearClass]]:
    """Linear classes that save the same time per byte, of which a program need not know more than the sum."""
    groups: dict[tuple[bool, str], list[LinearClass]] = {}
    for c in linear:
        groups.setdefault((c.inner_only, f"{c.matmul_s / max(1, c.bytes):.2g}"), []).append(c)
    return list(groups.values())


def tangents(growth: float, pieces: int) -> list[tuple[float, float]]:
    """Slope and intercept of lines under share ** growth."""
    if growth == 1.0:
        return [(1.0, 0.0)]
    points = [0.01 / pieces, 0.1 / pieces, *((index + 0.5) / pieces for index in range(pieces))]
    return [(growth * p ** (growth - 1), (1 - growth) * p**growth) for p in points]


@dataclass(frozen=True)
class Bound:
    """No placement whose longest segment is so long takes less than `step_s`."""

    step_s: float
    kept: int
    """Layers kept by the relaxation's optimum."""
    segments: int


def bound(evaluator: Evaluator, shortest: int, longest: int, *, pieces: int = 12) -> Bound | None:
    """Lower bound over placements that rebuild a layer and whose longest segment has `shortest` to `longest` layers.

    None: there is no such placement within the budgets.
    """
    problem, fixed, limits = evaluator.problem, evaluator.fixed, evaluator.limits
    trained = evaluator.kinds[problem.frozen_below :]
    counts, by_name = Counter(kind.name for kind in trained), {kind.name: kind for kind in trained}
    accumulates = problem.micro_batches > 1
    base = fixed["device"] + problem.head.held_bytes + (evaluator.gradient_bytes if accumulates else 0)
    # at best all that a rebuild needs of its linear layers is stored, and counted there
    outputs = {name: sum(c.bytes for c in kind.linear if not c.inner_only) for name, kind in by_name.items()}
    rebuild = min(max(0, kind.rebuild_peak_bytes - outputs[name]) for name, kind in by_name.items())
    least = base + rebuild + shortest * min(kind.o_bytes for kind in by_name.values())
    if max(least, fixed["device"] + evaluator.gradient_bytes + problem.head.step_peak_bytes) > limits["device"]:
        return None
    unit_bytes = float(max(1, *limits.values()))
    always_s = sum(k.forward_s + k.attention_forward_s for k in evaluator.kinds) + problem.head.forward_s
    always_s += sum(k.backward_s + k.attention_backward_s for k in trained)
    saved_s = {name: evaluator.saved_copies_s(kind) for name, kind in by_name.items()}
    always_s += sum(counts[name] * kept_s for name, (kept_s, _) in saved_s.items())
    unit_s = always_s or 1.0
    program = Program()
    in_bytes: dict[str, list[tuple[int, float]]] = {tier: [] for tier in TIERS}
    kept_bytes: list[tuple[int, float]] = []
    passes: list[int] = []
    heads: list[int] = []
    rebuilt: list[int] = []

    def stored(sizes: list[int], at_most: int, *, whole: bool = False) -> list[int]:
        columns = [program.column() for _ in TIERS]
        program.row([(at_most, -1.0), *((c, 1.0) for c in columns)], upper=0.0, lower=0.0 if whole else -INFINITY)
        for tier, size, column in zip(TIERS, sizes, columns):
            in_bytes[tier].append((column, size / unit_bytes))
            if tier != "device":
                program.cost[column] = sum(problem.coding_s(sizes[0])) / unit_s
        return columns

    for name, kind in by_name.items():
        layers = counts[name]
        kept_s, rebuilt_s = saved_s[name]
        again_s = kind.elementwise_s + kind.exchange_s + rebuilt_s - kept_s
        again = program.column(layers, again_s / unit_s, integer=True)
        if problem.reversible:
            program.lower[again] = layers
        head = program.column(layers, integer=True)
        inner = program.column(layers, (kind.elementwise_s + kind.exchange_s) / unit_s)
        kept_bytes.append((again, -kind.keep_bytes / unit_bytes))
        in_bytes["host"].append((again, -kind.keep_host_bytes / unit_bytes))
        program.row([(head, 1.0), (again, -1.0)], upper=0.0)
        program.row([(inner, 1.0), (again, -1.0)], upper=0.0)
        stored([kind.x_bytes_on(tier) for tier in TIERS], head, whole=True)
        attention = program.column(cost=kind.attention_forward_s / unit_s)
        if kind.o_bytes:
            given = stored([kind.o_bytes_on(tier) for tier in TIERS], again)
            for slope, intercept in tangents(kind.attention_growth, pieces):
                terms = [(attention, 1.0), (again, -slope - intercept), *((c, slope) for c in given)]
                program.row(terms, lower=0.0)
        else:
            program.row([(attention, 1.0), (again, -1.0), (inner, -1.0)], lower=0.0)
        for linear in kind.linear:
            given = stored([linear.bytes_on(tier) for tier in TIERS], again)
            for needed in (inner,) if linear.inner_only else (inner, again):
                missing = program.column(cost=linear.matmul_s / unit_s)
                program.row([(missing, 1.0), (needed, -1.0), *((c, 1.0) for c in given)], lower=0.0)
        for columns, column in ((rebuilt, again), (heads, head), (passes, inner)):
            columns.append(column)
    program.row([(c, 1.0) for c in rebuilt], lower=1.0)
    program.row([*((c, float(longest)) for c in heads), *((c, -1.0) for c in rebuilt)], lower=0.0)
    program.row([*((c, 1.0) for c in (*passes, *heads)), *((c, -1.0) for c in rebuilt)], lower=0.0)
    held = base + (0 if accumulates else problem.head.gradient_bytes) + problem.head.peak_bytes
    held += sum(kind.keep_bytes for kind in trained)
    program.row([*in_bytes["device"], *kept_bytes], upper=(limits["device"] - held) / unit_bytes)
    program.row(in_bytes["device"], upper=(limits["device"] - base - rebuild) / unit_bytes)
    disk_bytes = min(limits["disk"] - fixed["disk"], limits.get("disk_write", INFINITY))
    kept_on_host = sum(kind.keep_host_bytes for kind in trained)
    program.row(in_bytes["host"], upper=(limits["host"] - fixed["host"] - kept_on_host) / unit_bytes)
    program.row(in_bytes["disk"], upper=disk_bytes / unit_bytes)
    found = program.solve()
    if found is None:
        return None
    seconds, found_columns = found
    step_s = (seconds * unit_s + always_s) * problem.micro_batches + problem.head.step_s
    kept = len(trained) - round(sum(found_columns[rebuilt]))
    return Bound(step_s=step_s, kept=kept, segments=round(sum(found_columns[heads])))
