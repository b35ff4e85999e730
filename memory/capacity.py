"""How little device memory would do, and what to say when there is less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from farspan.errors import DoesNotFit
from farspan.memory.climb import climb, lengths
from farspan.memory.evaluate import Evaluator, Walk, evaluate
from farspan.memory.plan import Placement, Tier
from farspan.memory.policies import fixed_policies, fixed_policy
from farspan.memory.polish import Key, best_near, decode
from farspan.memory.prediction import Prediction
from farspan.memory.problem import PlanProblem
from farspan.memory.row_program import RowProgram, Shape, even_shape

ROUNDS = 6
"""Times a program is solved again with budgets moved by what the walk says."""
CLIMBS = 60
"""Shapes tried in climbing from the best one."""
GAIN, BLOCKS = 0.02, 16
"""Share of the device peak that polishing what programs found may gain, and blocks of O by which rounding may miss."""
GIB, MIB = 2**30, 2**20


def smallest_device(problem: PlanProblem, *, rough: bool = False) -> Placement:
    """The placement with the lowest device peak found, within the host's and the disk's budgets.

    With saved tensors on the host only where nothing fits without. Raises DoesNotFit when model states alone exceed the
    host's or the disk's.

    Args:
        rough: whether something fits is all that is asked: the first that does is returned, and where all is far from
            fitting nothing is polished.
    """
    found = least_device(problem, rough=rough)
    if problem.saved == "host" or not problem.can_save_on_host or evaluate(problem, found).fits:
        return found
    on_host = least_device(problem.saving("host"), rough=rough)

    def lowest(placement: Placement) -> Key:
        least = evaluate(problem, placement)
        return (_elsewhere(least.over_bytes), least.device_peak_bytes, least.step_s)

    return min(found, on_host, key=lowest)


def _elsewhere(over_bytes: Mapping[str, int]) -> int:
    """By how much other budgets than the device's are exceeded."""
    return sum(over_bytes.get(name, 0) for name in ("host", "disk", "disk_write"))


def least_device(problem: PlanProblem, *, rough: bool = False) -> Placement:
    """The same among placements whose saved tensors wait where `problem` says."""
    evaluator = Evaluator(problem)
    for tier in ("host", "disk"):
        if evaluator.fixed[tier] > evaluator.limits[tier]:
            raise DoesNotFit(
                f"model states alone do not fit on the {tier}",
                at=f"memory.{tier}",
                why=f"{states_in_words(problem, tier)} of {in_words(evaluator.limits[tier])}",
                try_=f"--set memory.{tier}={enough(evaluator.fixed[tier])}",
            )

    def lowest(walk: Walk) -> Key:
        return (_elsewhere(evaluator.over(walk)), walk.peak, walk.step_s)

    shapes = smallest_shapes(evaluator)
    values: dict[Shape, float] = {}

    def value(shape: Shape) -> float:
        if shape not in values:
            solved = RowProgram(evaluator, shape, evaluator.limits).solve(least_device=True)
            values[shape] = solved.value if solved else float("inf")
        return values[shape]

    shapes.sort(key=value)
    starts = [fixed_policy(problem, policy) for policy in fixed_policies(problem)]
    for shape in (climb(evaluator, shapes[0], value, CLIMBS), *shapes[:3]):
        limits: dict[str, float] = dict(evaluator.limits)
        for _ in range(ROUNDS):
            solved = RowProgram(evaluator, shape, limits).solve(least_device=True)
            if solved is None:
                break
            starts.append(decode(evaluator, shape, solved))
            over = evaluator.over(evaluator.walk(starts[-1]))
            if not over.keys() & {"host", "disk", "disk_write"}:
                break
            limits = {name: limit - over.get(name, 0) for name, limit in limits.items()}
    best = min(starts, key=lambda placement: lowest(evaluator.walk(placement)))
    walk = evaluator.walk(best)
    gain = GAIN + BLOCKS * max(kind.o_block_rows for kind in problem.kinds) / problem.attention_rows
    if rough and (not evaluator.over(walk) or walk.peak > (1 + gain) * evaluator.limits["device"]):
        return best
    return best_near(evaluator, starts, lowest)


def smallest_shapes(evaluator: Evaluator) -> list[Shape]:
    """Even segments of every length with nothing kept and nothing fetched ahead."""
    layers = len(evaluator.problem.layers) - evaluator.problem.frozen_below
    return [
        replace(even_shape(evaluator, -(-layers // longest), 0, between, prefetch=0), slots=1)
        for longest in lengths(evaluator)
        for between in (("o", "xo") if longest > 2 else ("o",))
    ]


def short_bytes(problem: PlanProblem) -> int:
    """About how much memory is missing for any plan to fit; at least 1. `smallest_device` is exact, and slower."""
    evaluators = [Evaluator(problem)]
    if problem.saved == "device" and problem.can_save_on_host:
        evaluators.append(Evaluator(problem.saving("host")))
    fixed, limits = evaluators[0].fixed, evaluators[0].limits
    states = sum(max(0, fixed[tier] - limits[tier]) for tier in ("host", "disk"))
    programs = [RowProgram(each, shape, limits) for each in evaluators for shape in smallest_shapes(each)]
    solved = [program.solve(least_device=True) for program in programs]
    least = min((found.value for found in solved if found), default=fixed["device"])
    return states + max(1, round(least) - limits["device"])


def does_not_fit(problem: PlanProblem, smallest: Prediction) -> DoesNotFit:
    """Says by how much, and what would do."""
    budgets = problem.budgets
    needed, given = smallest.device_peak_bytes, budgets.device_bytes
    return DoesNotFit(
        f"{problem.rows} rows on a rank need at least {in_words(needed)} of device memory, {in_words(given)} are given",
        at="memory.device",
        why=f"{states_in_words(problem, 'device')}; the rest is needed at {smallest.device_peak_at}, "
        f"with {in_words(budgets.host_bytes)} of host memory and {in_words(budgets.disk_bytes)} of disk used as well "
        f"as can be: {in_words(needed)} - {in_words(given)} = {in_words(needed - given)} too much",
        try_=f"--set memory.device={enough(needed)}, more memory.host or memory.disk, "
        "a shorter data.context, a higher parallel.sp, smaller tiles",
    )


def states_in_words(problem: PlanProblem, tier: Tier) -> str:
    states = [f"{state.name} {in_words(state.bytes)}" for state in problem.states if state.tier == tier]
    return f"{tier}: {' + '.join(states) or 'no model states'}"


def in_words(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def enough(size: int) -> str:
    """At least so much, as a job would say it."""
    return f"{math.ceil(size / GIB * 100) / 100}GiB" if size >= GIB else f"{math.ceil(size / MIB)}MiB"
