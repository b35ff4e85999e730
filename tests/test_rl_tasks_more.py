"""Countdown, mazes, lists, prompts of one's own and their verifiers: by brute force, by Python, by hostile answers."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.errors import DataError, JobError
from farspan.trainer.rl.tasks import Arithmetic, Countdown, Maze, Problem, Prompts, Sorting, Verdict
from farspan.trainer.rl.tasks.countdown import evaluate
from farspan.trainer.rl.tasks.dropping import DropLevel, drop
from farspan.trainer.rl.tasks.verifiers import Exact, Length, Number, Own, Program, Regex, Symbolic, number_of

TASKS = [
    Arithmetic(short_slips=0.0),
    Countdown(),
    Countdown(turns=3, numbers=(2, 5)),
    Maze(),
    Maze(shortest=False),
    Sorting(),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.type)
@settings(max_examples=40, deadline=None)
@given(number=st.integers(0, 10**6))
def test_demonstrations_are_right_and_spoilt_ones_are_not(task: Any, number: int) -> None:
    problem, shown = task.demonstration(number)
    assert task.verify(problem, shown.text).correct
    for text in ("", "#", problem.prompt, shown.text.replace("#", ""), f"{shown.text}9", f"#{problem.answer}#"):
        verdict = task.verify(problem, text)
        assert verdict.correct is False and verdict.score == 0.0, text
    assert task.verify(problem, f"whatever #{problem.answer}").correct


@pytest.mark.parametrize("text", ["1+2*3", "(1+2)*3", "7", "((2))*(3-1)", "10/4", "2 * 3"])
def test_expressions_have_python_s_value(text: str) -> None:
    found = evaluate(text)
    assert found is not None and found[0] == Fraction(eval(text)).limit_denominator(1000)


@pytest.mark.parametrize(
    "text",
    ["", "1+", "2**9", "9**9**9", "__import__('os')", "a+1", "1.5+1", "-3+4", "1/0", "(" * 150 + "1" + ")" * 150,
     "True+1", "[1][0]", "1 if 1 else 2", "1+" * 150 + "1", "1,2"],
)  # fmt: skip
def test_what_is_no_expression_of_numbers(text: str) -> None:
    assert evaluate(text) is None


def test_countdown_counts_every_number_once() -> None:
    task = Countdown()
    problem = Problem("3 5 7 -> 22", "3*5+7", facts={"numbers": [3, 5, 7], "goal": 22})
    for text, right in {"#3*5+7": True, "#7+5*3": True, "#(7)+3*5": True, "#22": False, "#3*5+7+0": False,
                        "#3*5+7*1": False, "#3*7+1": False, "#5+5+5+7": False, "#3*5+8": False}.items():  # fmt: skip
        assert task.verify(problem, text).correct is right, text


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**5))
def test_shortest_paths_are_those_of_breadth_first_search(number: int) -> None:
    problem = Maze().problem(number)
    rows = problem.prompt.split("\n")
    at = {(r, c): mark for r, line in enumerate(rows) for c, mark in enumerate(line)}
    start = next(cell for cell, mark in at.items() if mark == "S")
    far, queue = {start: 0}, deque([start])
    while queue:
        r, c = queue.popleft()
        for cell in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if at.get(cell, "x") != "x" and cell not in far:
                far[cell] = far[r, c] + 1
                queue.append(cell)
    end = next(cell for cell, mark in at.items() if mark == "E")
    assert len(problem.answer) == far[end]
    # every path of so many moves is as right, none through a wall is
    for moves in itertools.islice(itertools.product("RDLU", repeat=min(len(problem.answer), 4)), 200):
        text, cell, free = "".join(moves), start, True
        for move in text:
            cell = cell[0] + {"D": 1, "U": -1}.get(move, 0), cell[1] + {"R": 1, "L": -1}.get(move, 0)
            free = free and at.get(cell, "x") != "x"
        expected = free and cell == end and len(text) == far[end]
        assert Maze().verify(problem, f"#{text}").correct is expected


def test_levels_leave_out_what_they_say() -> None:
    task, draw = Maze(), random.Random(0)
    _, whole = task.demonstration(3)
    kinds = {step.kind for step in whole.steps}
    assert kinds == {"create", "close"} and all(step.detail for step in whole.steps)
    closes = drop(whole, [DropLevel(share=1.0, kinds=("close",))], draw)
    assert {step.kind for step in closes.steps} == {"create"} and all(step.detail for step in closes.steps)
    costs = drop(whole, [DropLevel(share=1.0, kinds=("close",), details=True)], draw)
    assert "+" not in costs.text and costs.text.count("\n") == len(costs.steps)
    some = [len(drop(whole, [DropLevel(share=1.0, some=("create",))], draw).steps) for _ in range(200)]
    creates = sum(step.kind == "create" for step in whole.steps)
    expected = len(whole.steps) - 0.3 * creates
    assert abs(sum(some) / 200 - expected) < 0.1 * creates
    assert drop(whole, [DropLevel(share=1.0, everything=True)], draw).text == whole.ending
    levels = [DropLevel(share=0.25, everything=True), DropLevel(share=0.25, kinds=("close",))]
    found = [len(drop(whole, levels, draw).steps) for _ in range(800)]
    assert abs(found.count(0) / 800 - 0.25) < 0.06 and abs(found.count(len(whole.steps)) / 800 - 0.5) < 0.07


def prompts(folder: Path, count: int = 200, **more: Any) -> Prompts:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "answer": n + 1}) + "\n" for n in range(count)))
    return Prompts(source=str(path), **more)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    task = prompts(tmp_path)
    sides = {
        side: {task.problem(number, side=side).prompt for number in range(200)}
        for side in ("train", "monitor", "held_out")
    }
    assert sum(map(len, sides.values())) == 200 and all(len(found) > 10 for found in sides.values())
    count = len(sides["train"])
    first, second = ([task.problem(turn * count + at).prompt for at in range(count)] for turn in range(2))
    assert set(first) == set(second) == sides["train"] and first != second
    problem = task.problem(0)
    assert task.verify(problem, f"It is \\boxed{{{problem.answer}}}.") == Verdict(1.0, True)
    with pytest.raises(JobError, match="no demonstrations"):
        task.demonstration(0)


@pytest.mark.parametrize(
    "line", ["{", '{"prompt": "a"}', '{"prompt": "", "answer": 1}', '{"prompt": "a", "answer": [1]}', "[1]"]
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(DataError, match="no prompt") as caught:
        Prompts(source=str(path)).problem(0)
    assert caught.value.at == f"{path}:2"
    with pytest.raises(DataError, match="cannot be read"):
        Prompts(source=str(tmp_path / "none.jsonl")).problem(0)


NUMBERS = {"12": 12, "1,234.5": Fraction(2469, 2), "-3/4": Fraction(-3, 4), "50%": Fraction(1, 2), "$ 7": 7,
           "1e3": 1000, ".5": Fraction(1, 2), "": None, "x": None, "1/0": None, "1/2/3": None, "--1": None,
           "nan": None}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them(text: str) -> None:
    assert number_of(text) == NUMBERS[text]


def judged(verifier: Any, answer: str, response: str) -> Any:
    verdict = verifier.verify(Problem("?", answer), response)
    return verdict.correct if verdict.well_formed or verdict.correct else None


def test_answers_are_found_where_they_stand() -> None:
    assert judged(Number(), "0.5", r"so \boxed{1} no, \boxed{\frac{1}{2}}") is None  # not a number as written
    assert judged(Symbolic(), "1/2", r"so \boxed{1} no, \boxed{\frac{1}{2}}") is True
    assert judged(Number(), "1/2", r"\boxed{0.5}") is True and judged(Number(), "1/2", r"\boxed{0.51}") is False
    assert judged(Number(tolerance=0.03), "1/2", r"\boxed{0.51}") is True
    assert judged(Number(answer_in="last_number"), "7", "3 and 4 make 7.") is True
    assert (
        judged(Number(answer_in="hash"), "7", "3 and 4\n#7") is True
        and judged(Number(answer_in="hash"), "7", "7") is None
    )
    assert (
        judged(Exact(), "Paris", r"\boxed{paris}") is True
        and judged(Exact(ignore_case=False), "Paris", r"\boxed{paris}") is False
    )
    assert judged(Exact(answer_in="whole"), "a", " a\n") is True
    assert judged(Number(), "1", r"\boxed{1") is None and judged(Number(), "1", "") is None
    assert Number().verify(Problem("?", "no number"), r"\boxed{1}").correct is None
    assert judged(Regex(pattern=r"ANSWER: {answer}\b"), "a+b", "ANSWER: a+b") is True


def test_formulas_that_are_the_same() -> None:
    for given_text in ("x^2+2x+1", "(x+1)^2", r"(1+x)\cdot(x+1)"):
        assert judged(Symbolic(), "x**2 + 2*x + 1", rf"\boxed{{{given_text}}}") is True, given_text
    assert judged(Symbolic(), "x+1", r"\boxed{x-1}") is False
    for hostile in ("__import__('os').system('id')", "().__class__", "open('a')", "x.y", "lambda: 1", "1+" * 300 + "1"):
        assert judged(Symbolic(), "1", rf"\boxed{{{hostile}}}") in (None, False), hostile


def test_programs_run_apart(tmp_path: Path) -> None:
    tests = "assert add(2, 3) == 5"
    verify = Program(limit_s=5.0).verify
    right = verify(Problem("?", tests), "Here:\n```python\ndef add(a, b):\n    return a + b\n```")
    assert right == Verdict(1.0, True)
    assert not verify(Problem("?", tests), "```python\ndef add(a, b):\n    return a\n```").correct
    assert not verify(Problem("?", tests), "no code").correct and not verify(Problem("?", tests), "").well_formed
    apart = f"import os\nassert not os.environ.get('PATH') and os.getcwd() != {str(tmp_path)!r}"
    sneaky = f"```python\n{apart}\ndef add(a, b): return a + b\n```"
    assert verify(Problem("?", tests), sneaky).correct
    assert verify(Problem("?", tests), "```\nx = bytearray(8 << 30)\ndef add(a, b): return a + b\n```").correct is False
    slow = Program(limit_s=0.5).verify(Problem("?", tests), "```\nwhile True: pass\n```")
    assert slow.correct is False and slow.parts == {"too_slow": 1.0}


def test_lengths_in_a_range() -> None:
    """LongWriter-Zero's three pieces, by hand: 100 to 200 words asked for, 400 are worth nothing."""
    verify = Length(most=400).verify
    scores = {words: verify(Problem("?", "100-200"), "w " * words).score for words in (0, 50, 100, 200, 300, 400, 500)}
    assert scores == {0: 0.0, 50: 0.5, 100: 1.0, 200: 1.0, 300: 0.5, 400: 0.0, 500: 0.0}
    assert verify(Problem("?", "100-200"), "w " * 150).correct and not verify(Problem("?", "100-200"), "w").correct


def own(problem: Problem, response: str) -> Any:
    return response if response == "bad" else Verdict(1.0, response == problem.answer)


def test_a_verifier_of_one_s_own() -> None:
    made = Own("test_rl_tasks_more:own")
    assert made.verify(Problem("?", "a"), "a").correct and not made.verify(Problem("?", "a"), "b").correct
    with pytest.raises(TypeError, match="not a Verdict"):
        made.verify(Problem("?", "a"), "bad")
