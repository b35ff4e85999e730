"""The planner's own arithmetic against the replay simulator, which was written apart from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_cases import anchored, apart, coupled, in_codes, on_the_device, placements, problems, saved_problems

from farspan.errors import DoesNotFit
from farspan.memory.evaluate import evaluate
from farspan.memory.plan import Placement
from farspan.memory.policies import FIXED_POLICIES, fixed_policy
from farspan.memory.prediction import Prediction
from farspan.memory.problem import PlanProblem
from farspan.memory.replay import Replay, replay
from farspan.memory.solve import solve

Compared = tuple[PlanProblem, Placement, Prediction, Replay]
SAME = 1e-9


def drawing(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def agree(problem: PlanProblem, placement: Placement) -> None:
    predicted, replayed = evaluate(problem, placement), replay(problem, placement)
    assert predicted.step_s == pytest.approx(replayed.seconds, rel=0.01)
    assert predicted.device_peak_bytes >= replayed.peaks["device"].bytes * 0.999
    for tier, size in (("host", predicted.host_bytes), ("disk", predicted.disk_bytes)):
        assert size >= replayed.peaks[tier].bytes * 0.999  # type: ignore[index]


def both(data: st.DataObject, drawn: Callable[[PlanProblem], st.SearchStrategy[Placement]]) -> Compared:
    """Both sides of a random placement, saved tensors on the device or on the host, rows there as they are or in
    codes."""
    problem = data.draw(problems())
    problem = in_codes(problem) if data.draw(st.booleans()) else problem
    placement = data.draw(drawn(problem))
    predicted, replayed = evaluate(problem, placement), replay(problem, placement)
    moved = {lane: size // problem.micro_batches for lane, size in replayed.lane_bytes.items()}
    assert predicted.moved_bytes == moved
    # the walk counts a layer's copies as one job and a unit's as one more; rows that go by themselves are not slower
    assert predicted.step_s >= replayed.seconds * (1 - SAME)
    return problem, placement, predicted, replayed


@given(data=st.data())
@drawing(150)
def test_layers_apart_agree_to_the_byte(data: st.DataObject) -> None:
    _, _, predicted, replayed = both(data, apart)
    assert predicted.step_s == pytest.approx(replayed.seconds, rel=SAME)
    assert predicted.host_bytes == replayed.peaks["host"].bytes
    assert predicted.disk_bytes == replayed.peaks["disk"].bytes
    assert predicted.device_peak_bytes == replayed.peaks["device"].bytes


@given(data=st.data())
@drawing(150)
def test_segments_that_move_nothing_agree_to_the_byte(data: st.DataObject) -> None:
    _, _, predicted, replayed = both(data, on_the_device)
    assert predicted.step_s == pytest.approx(replayed.seconds, rel=SAME)
    assert predicted.host_bytes == replayed.peaks["host"].bytes
    assert predicted.device_peak_bytes == replayed.peaks["device"].bytes


@given(data=st.data())
@drawing(100)
def test_reversible_layers_agree_to_the_byte(data: st.DataObject) -> None:
    problem = data.draw(st.sampled_from([coupled, anchored]))(data.draw(problems()))
    placement = data.draw(apart(problem))
    predicted, replayed = evaluate(problem, placement), replay(problem, placement)
    assert predicted.step_s == pytest.approx(replayed.seconds, rel=SAME)
    assert predicted.host_bytes == replayed.peaks["host"].bytes
    assert predicted.disk_bytes == replayed.peaks["disk"].bytes
    assert predicted.device_peak_bytes == replayed.peaks["device"].bytes


@given(data=st.data())
@drawing(150)
def test_nothing_is_predicted_to_be_quicker(data: st.DataObject) -> None:
    both(data, placements)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_a_solution_replays_within_its_budgets(problem: PlanProblem) -> None:
    for solved in (problem, in_codes(problem)):
        with contextlib.suppress(DoesNotFit):
            assert replay(solved, solve(solved).placement).over_budget(solved) == []


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
