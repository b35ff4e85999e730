"""Verdicts on answers to prompts of one's own.

Where the answer stands in a response, and when it is right, are two questions with a few answers each. A verifier runs
in a process that may be killed (`trainer.rl.verify`), so it may take long or crash on a hostile response.
"""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from farspan.schema import Leading, Schema
from farspan.trainer.rl.tasks.base import Problem, Verdict

_BOXED = "\\boxed{"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?%?")
PROGRAM_MEMORY_BYTES = 2 << 30
_SYMPY_NAMES = (
    "Integer",
    "Float",
    "Rational",
    "Symbol",
    "Function",
    "sqrt",
    "pi",
    "E",
    "exp",
    "log",
    "sin",
    "cos",
    "tan",
)


class Answer(Schema):
    """Where the answer stands in a response."""

    answer_in: Literal["boxed", "hash", "last_number", "whole"] = "boxed"
    r"""Inside the last `\boxed{}`; behind the last `#`; the last number; the whole response."""

    def found(self, response: str) -> str | None:
        """The answer, without white space around it; None: there is none."""
        if self.answer_in == "whole":
            return response.strip() or None
        if self.answer_in == "hash":
            return response.rpartition("#")[2].strip() or None if "#" in response else None
        if self.answer_in == "last_number":
            numbers = _NUMBER.findall(response)
            return str(numbers[-1]).strip() if numbers else None
        return _boxed(response)


class Exact(Answer):
    """The same text."""

    type: Literal["exact"] = "exact"
    ignore_case: bool = True

    def verify(self, problem: Problem, response: str) -> Verdict:
        found = self.found(response)
        if found is None:
            return Verdict(0.0, False, well_formed=False)
        same = found.casefold() == problem.answer.strip().casefold() if self.ignore_case else found == problem.answer
        return Verdict(float(same), same)


class Number(Answer):
    """The same number: whole numbers, decimals, fractions, percent, thousands separated by commas."""

    type: Literal["number"] = "number"
    tolerance: float = Field(default=0.0, ge=0)
    """Relative difference that is allowed."""

    def verify(self, problem: Problem, response: str) -> Verdict:
        found = self.found(response)
        given, wanted = (None if text is None else number_of(text) for text in (found, problem.answer))
        if wanted is None:
            return Verdict(0.0, None, well_formed=given is not None)
        if given is None:
            return Verdict(0.0, False, well_formed=False)
        same = abs(given - wanted) <= Fraction(self.tolerance) * abs(wanted)
        return Verdict(float(same), same)


class Symbolic(Answer):
    """The same expression: equal after sympy has simplified the difference."""

    type: Literal["symbolic"] = "symbolic"

    def verify(self, problem: Problem, response: str) -> Verdict:
        found = self.found(response)
        if found is None:
            return Verdict(0.0, False, well_formed=False)
        given, wanted = (_expression(text) for text in (found, problem.answer))
        if wanted is None:
            return Verdict(0.0, None)
        if given is None:
            return Verdict(0.0, False, well_formed=False)
        import sympy

        same = bool(sympy.simplify(given - wanted) == 0)
        return Verdict(float(same), same)


class Regex(Schema):
    """A pattern that the response must match somewhere; `{answer}` in it is the problem's answer, escaped."""

    type: Literal["regex"] = "regex"
    pattern: str

    def verify(self, problem: Problem, response: str) -> Verdict:
        found = re.search(self.pattern.replace("{answer}", re.escape(problem.answer)), response) is not None
        return Verdict(float(found), found)


class Program(Schema):
    """Python in the response's last code block (or the whole of it) that passes the tests in the problem's answer.

    It runs in an interpreter of its own without the user's packages, environment and folder, for `limit_s` seconds and
    in 2 GiB at most. That keeps honest mistakes in, not an adversary: use a container for what you do not trust.
    """

    type: Literal["program"] = "program"
    limit_s: float = Field(default=5.0, gt=0)

    def verify(self, problem: Problem, response: str) -> Verdict:
        blocks = re.findall(r"```(?:python)?\n(.*?)```", response, re.DOTALL)
        code = blocks[-1] if blocks else response
        if not code.strip():
            return Verdict(0.0, False, well_formed=False)
        with tempfile.TemporaryDirectory(prefix="farspan-program-") as folder:
            file = Path(folder) / "answer.py"
            file.write_text(
                f"{_LIMITS.format(cpu_s=math.ceil(self.limit_s) + 1)}\n{code}\n{problem.answer}\n", encoding="utf-8"
            )
            try:
                done = subprocess.run(
                    [sys.executable, "-I", "-S", str(file)],
                    cwd=folder,
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=self.limit_s,
                    start_new_session=True,
                )
            except subprocess.TimeoutExpired:
                return Verdict(0.0, False, parts={"too_slow": 1.0})
        passed = done.returncode == 0
        return Verdict(float(passed), passed, well_formed=bool(blocks))


class Length(Schema):
    """A number of words between two numbers: the problem's answer is `low-high` (LongWriter-Zero's length reward).

    Score 1 inside; below `words / low`; above it falls in a line to 0 at `most`. Right means inside.
    Source: Wu et al., LongWriter-Zero, 2025, https://arxiv.org/abs/2506.18841
    """

    type: Literal["length"] = "length"
    most: int = Field(default=20000, ge=1)
    """Words at which a response that is too long is worth nothing."""

    def verify(self, problem: Problem, response: str) -> Verdict:
        low, high = (int(part) for part in problem.answer.split("-"))
        words = len(response.split())
        if words < low:
            return Verdict(words / low, False, parts={"words": float(words)})
        if words <= high:
            return Verdict(1.0, True, parts={"words": float(words)})
        return Verdict(max(0.0, (self.most - words) / max(self.most - high, 1)), False, parts={"words": float(words)})


class Own(Leading):
    """A function of one's own: `package.module:function(problem: Problem, response: str) -> Verdict`."""

    type: Literal["own"] = "own"
    path: str = Field(kw_only=False)

    def verify(self, problem: Problem, response: str) -> Verdict:
        module, _, name = self.path.partition(":")
        verdict = getattr(importlib.import_module(module), name)(problem, response)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"{self.path} returned a {type(verdict).__name__}, not a Verdict")
        return verdict


Verifier = Annotated[Number | Exact | Symbolic | Regex | Program | Length | Own, Field(discriminator="type")]


def number_of(text: str) -> Fraction | None:
    """The value of a number as people write it; None: it is none."""
    plain = text.strip().strip("$").replace(",", "").replace(" ", "")
    share = plain.endswith("%")
    try:
        value = Fraction(plain.rstrip("%")) if "/" not in plain else Fraction(*map(int, plain.rstrip("%").split("/")))
    except (ValueError, ZeroDivisionError, TypeError):
        return None
    return value / 100 if share else value


def _boxed(response: str) -> str | None:
    start = response.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for at in range(start + len(_BOXED), len(response)):
        depth += {"{": 1, "}": -1}.get(response[at], 0)
        if depth == 0:
            return response[start + len(_BOXED) : at].strip() or None
    return None


def _expression(text: str) -> Any:
    """sympy's reading of a formula, from a plain one or from simple LaTeX; None: it cannot be read."""
    import sympy
    from sympy.parsing.sympy_parser import implicit_multiplication_application, parse_expr, standard_transformations

    plain = re.sub(r"\\(?:d|t)?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    plain = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", plain)
    plain = plain.replace("\\cdot", "*").replace("\\pi", "pi").replace("^", "**").replace("\\left", "")
    plain = plain.replace("\\right", "").strip("$ ")
    # the parser evaluates Python: nothing with attributes, calls by underscore or quotes comes near it
    if (
        len(plain) > 500
        or not re.fullmatch(r"[\w\s+\-*/().,=]*", plain)
        or "__" in plain
        or re.search(r"\.\s*[A-Za-z_]", plain)
    ):
        return None
    names: dict[str, Any] = {name: getattr(sympy, name) for name in _SYMPY_NAMES}
    names["__builtins__"] = {}
    try:
        return parse_expr(
            plain, global_dict=names, transformations=(*standard_transformations, implicit_multiplication_application)
        )
    except Exception:
        return None


_LIMITS = f"""import resource
resource.setrlimit(resource.RLIMIT_AS, ({PROGRAM_MEMORY_BYTES}, {PROGRAM_MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_CPU, ({{cpu_s}}, {{cpu_s}}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
del resource"""
