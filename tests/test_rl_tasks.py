"""Tasks: problems by number, held-out ones apart, demonstrations that a verifier agrees with; verifiers that hang."""

from __future__ import annotations

import os
import time
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.errors import RunFailed
from farspan.trainer.rl.tasks.arithmetic import Arithmetic
from farspan.trainer.rl.tasks.base import Problem, Verdict
from farspan.trainer.rl.verify import CRASHED, KILLED, VerifierPool


def test_a_problem_is_its_number() -> None:
    task, again, other = Arithmetic(), Arithmetic(), Arithmetic(seed=1)
    first = [task.problem(number).prompt for number in range(200)]
    assert first == [again.problem(number).prompt for number in range(200)]
    assert first != [other.problem(number).prompt for number in range(200)]
    assert len(set(first)) > 190


def test_held_out_problems_are_never_trained_on() -> None:
    task = Arithmetic(steps=(1, 2))  # few enough to meet often
    held_out = {task.problem(number, side="held_out").prompt for number in range(2000)}
    monitored = {task.problem(number, side="monitor").prompt for number in range(2000)}
    trained = {task.problem(number).prompt for number in range(2000)}
    shown = {task.demonstration(number)[0].prompt for number in range(2000)}
    assert not held_out & (trained | shown | monitored) and not monitored & (trained | shown)
    assert len(held_out) > 50 and len(monitored) > 50


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_sums_are_python_s(number: int) -> None:
    task = Arithmetic(full_slips=0.0, short_slips=0.0)
    problem, shown = task.demonstration(number)
    chain = problem.prompt.rstrip("=")
    value = int(chain[0])
    for operation, operand in zip(chain[1::2], chain[2::2]):
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[operation] % 10
    assert problem.answer == str(value)
    assert task.verify(problem, shown.text) == Verdict(1.0, True)
    wrong = str((value + 1) % 10)
    assert task.verify(problem, f"{shown.text[:-1]}{wrong}") == Verdict(0.0, False)
    for text in ("", shown.text[:-1], f"{shown.text} ", f"{shown.text}\n1"):
        assert not task.verify(problem, text).well_formed


def test_styles_come_in_their_shares_and_slip_as_often() -> None:
    task = Arithmetic(full=0.5, short=0.3, short_slips=0.2, steps=(4, 4))
    kinds, right = {"full": 0, "short": 0, "none": 0}, 0
    for number in range(2000):
        problem, shown = task.demonstration(number)
        kind = "full" if "ok" in shown.text else "short" if shown.steps else "none"
        kinds[kind] += 1
        right += kind == "short" and bool(task.verify(problem, shown.text).correct)
    assert abs(kinds["full"] / 2000 - 0.5) < 0.05 and abs(kinds["short"] / 2000 - 0.3) < 0.05
    assert 0.8**4 - 0.06 < right / kinds["short"] < 0.8**4 + 0.15  # multiplying by 0 forgives some


class Hostile(Arithmetic):
    """A verifier that does what a response tells it to."""

    type: Literal["arithmetic"] = "arithmetic"

    def verify(self, problem: Problem, response: str) -> Verdict:
        if response == "spin":
            while True:
                pass
        if response == "exit":
            os._exit(3)
        if response == "raise":
            raise RuntimeError("no")
        return super().verify(problem, response)


@pytest.mark.timeout(120)
def test_a_verifier_that_hangs_costs_its_sample() -> None:
    task = Hostile()
    problem = task.problem(0)
    good = f"#{problem.answer}"
    pool = VerifierPool(task, processes=2, limit_s=1.0)
    try:
        assert pool.judge([]) == []
        assert pool.judge([(problem, good)]) == [Verdict(1.0, True)]
        began_s = time.monotonic()
        texts = [good, "spin", "x", "exit", "raise", *[good] * 40]
        found = pool.judge([(problem, text) for text in texts])
        assert found[:5] == [Verdict(1.0, True), KILLED, Verdict(0.0, False, False), CRASHED, CRASHED]
        assert found[5:] == [Verdict(1.0, True)] * 40
        assert (pool.kills, pool.crashes) == (1, 1) and time.monotonic() - began_s < 60
        for judge in pool._judges:  # between two calls, as the kernel does for want of memory
            judge.process.kill()
            judge.process.join()
        assert pool.judge([(problem, good)] * 3) == [Verdict(1.0, True)] * 3
    finally:
        pool.close()


class Unborn(Arithmetic):
    """Ends every process that it is sent to."""

    type: Literal["arithmetic"] = "arithmetic"

    def __setstate__(self, state: object) -> None:
        os._exit(7)


def test_processes_that_never_start_end_the_run() -> None:
    pool = VerifierPool(Unborn(), processes=1)
    with pytest.raises(RunFailed, match="do not start") as caught:
        pool.judge([(Arithmetic().problem(0), "#1")])
    assert "code 7" in caught.value.why
    pool.close()
