"""The planner's own arithmetic against the replay simulator, which was written apart from it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from plan_cases import problems, saved_problems

from farspan.errors import DoesNotFit
from farspan.memory.evaluate import evaluate
from farspan.memory.plan import Placement
from farspan.memory.policies import FIXED_POLICIES, fixed_policy
from farspan.memory.problem import PlanProblem
from farspan.memory.replay import replay
from farspan.memory.solve import solve


def agree(problem: PlanProblem, placement: Placement) -> None:
    predicted, replayed = evaluate(problem, placement), replay(problem, placement)
    assert predicted.step_s == pytest.approx(replayed.seconds, rel=0.01)
    assert predicted.device_peak_bytes >= replayed.peaks["device"].bytes * 0.999
    for tier, size in (("host", predicted.host_bytes), ("disk", predicted.disk_bytes)):
        assert size >= replayed.peaks[tier].bytes * 0.999  # type: ignore[index]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_a_solution_replays_within_its_budgets(problem: PlanProblem) -> None:
    try:
        placement = solve(problem).placement
    except DoesNotFit:
        return
    assert replay(problem, placement).over_budget(problem) == []


@pytest.mark.parametrize("name", sorted(saved_problems()))
def test_saved_problems(name: str) -> None:
    problem = saved_problems()[name]
    for policy in FIXED_POLICIES:
        agree(problem, fixed_policy(problem, policy))
    try:
        placement = solve(problem).placement
    except DoesNotFit:
        return
    agree(problem, placement)
    assert replay(problem, placement).over_budget(problem) == []
