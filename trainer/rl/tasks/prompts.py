"""Prompts with answers of one's own, from a jsonl file."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from farspan.errors import DataError, JobError
from farspan.trainer.rl.tasks.base import Demonstration, Problem, Side, Task, Verdict, side_of
from farspan.trainer.rl.tasks.verifiers import Number, Verifier


class Prompts(Task):
    """One prompt a line, `{"prompt": ..., "answer": ...}`, and how answers are judged.

    An eighth of the prompts is held out and another eighth is for monitoring, by a hash of their text. Each pass over
    the rest is in another order.
    """

    type: Literal["prompts"] = "prompts"
    source: str
    """A jsonl file, on storage every node reaches."""
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    target_field: str | None = None
    """Key of the length that a prompt asks for, in tokens (L1)."""
    verifier: Verifier = Field(default=Number())

    def problem(self, number: int, *, side: Side = "train") -> Problem:
        problems = _read(self.source, self.prompt_field, self.answer_field, self.target_field)[side]
        if not problems:
            raise DataError(
                f"no prompt is left to {'train on' if side == 'train' else 'hold out' if side == 'held_out' else side}",
                at=self.source,
                why="a hash of its text says what a prompt is for, and there are too few of them",
                try_="give more prompts",
            )
        turn, at = divmod(number, len(problems))
        return problems[_order(self.seed, side, turn, len(problems))[at]]

    def draw(self, draw: random.Random) -> Problem:
        raise AssertionError("problems of a file are not drawn")

    def show(self, problem: Problem, draw: random.Random) -> Demonstration:
        raise JobError(
            "a file of prompts has no demonstrations",
            at="warm_start",
            why="a warm start learns from responses, and the file has answers alone",
            try_="leave warm_start out, and give a model that was fine-tuned on responses (SFTJob with ChatData)",
        )

    def verify(self, problem: Problem, response: str) -> Verdict:
        return self.verifier.verify(problem, response)


@lru_cache(maxsize=4)
def _read(source: str, prompt_field: str, answer_field: str, target_field: str | None) -> dict[Side, list[Problem]]:
    found: dict[Side, list[Problem]] = {"train": [], "monitor": [], "held_out": []}
    try:
        lines = Path(source).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the prompts cannot be read", at=source, why=str(error), try_="give the path of a readable jsonl file"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row[prompt_field], row[answer_field]
            target = None if target_field is None else int(row[target_field])
            if not (isinstance(prompt, str) and prompt and isinstance(answer, str | int | float)):
                raise ValueError(f"{prompt_field} must be text, {answer_field} text or a number")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "a line is no prompt with an answer",
                at=f"{source}:{number}",
                why=f"{type(error).__name__}: {error}",
                try_=f'{{"{prompt_field}": "...", "{answer_field}": "..."}}, or another task.prompt_field',
            ) from error
        found[side_of(prompt)].append(Problem(prompt, str(answer), target_tokens=target))
    return found


@lru_cache(maxsize=64)
def _order(seed: int, side: Side, turn: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(repr((seed, side, turn))).shuffle(order)
    return order
