"""Job files in Python: run one alone, and find the line behind any of its values.

The file runs by `runpy` under a name that is not `__main__`, with its folder on `sys.path`, and leaves nothing
behind: no module, no bytecode. When it fails, the traceback gives the call that failed to the column, and the syntax
tree of the same file gives the line of the keyword inside it; so an error in a job of forty lines names one.
"""

from __future__ import annotations

import ast
import runpy
import sys
import tokenize
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any

import pydantic

import farspan.schema
from farspan.errors import FarspanError, JobError
from farspan.jobs.explain import explain
from farspan.jobs.origins import Origin, Path

_NOT_THE_USERS = (str(FilePath(pydantic.__file__).parent), farspan.schema.__file__)


class PythonFile:
    """Source and syntax tree of one file; answers which line a value stands on.

    Raises:
        JobError: the file cannot be read or is not Python, with the line.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with tokenize.open(path) as file:
                self.tree = ast.parse(file.read(), path)
        except (SyntaxError, ValueError) as problem:
            line = getattr(problem, "lineno", None)
            raise JobError(
                "the job file is not Python",
                at=f"{path}:{line}" if line else path,
                why=getattr(problem, "msg", None) or str(problem),
                try_=f"`python -m py_compile {path}` shows the place",
            ) from None
        self.names = {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def run(self) -> dict[str, Any]:
        """Execute the file; returns its top-level names.

        Raises:
            JobError: whatever the file raised, with the line that raised it.
        """
        folder = str(FilePath(self.path).absolute().parent)
        sys.path.insert(0, folder)
        try:
            return runpy.run_path(self.path, run_name="farspan_job_file")
        except FarspanError:
            raise
        except (Exception, SystemExit) as problem:
            raise self._explained(problem) from problem
        finally:
            if folder in sys.path:
                sys.path.remove(folder)

    def lines(self, name: str, tree: dict[str, Any]) -> dict[Path, Origin]:
        """Line of every key of `tree` inside the call bound to `name`; keys that are not written there are left out."""
        found: dict[Path, Origin] = {(): Origin("file", self.path)}
        node = self.names.get(name)
        if node is not None:
            found[()] = Origin("file", f"{self.path}:{node.lineno}")
            self._collect(node, (), tree, found)
        return found

    def _collect(self, node: ast.expr, path: Path, tree: dict[str, Any], found: dict[Path, Origin]) -> None:
        for key, value in tree.items():
            step = self._step(node, key)
            if step is None:
                continue
            found[*path, key] = Origin("file", f"{self.path}:{step[0]}")
            if isinstance(value, dict):
                self._collect(step[1], (*path, key), value, found)

    def _step(self, node: ast.expr, key: str | int) -> tuple[int, ast.expr] | None:
        """Line and expression of `key` inside a call or a dict; a name is followed to its assignment."""
        if isinstance(node, ast.Name) and node.id in self.names:
            node = self.names[node.id]
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == key:
                    return keyword.lineno, keyword.value
            if node.args and key != "type":  # the leading field, given by position
                return node.args[0].lineno, node.args[0]
        if isinstance(node, ast.Dict):
            for written, value in zip(node.keys, node.values):
                if isinstance(written, ast.Constant) and written.value == key:
                    return written.lineno, value
        return None

    def _explained(self, problem: BaseException) -> JobError:
        """The four lines for what the file raised."""
        frame = _frame(problem.__traceback__, own=None if isinstance(problem, pydantic.ValidationError) else self.path)
        if frame is None:
            return _raised(problem, self.path)
        file, position = frame
        if not isinstance(problem, pydantic.ValidationError):
            return _raised(problem, f"{file}:{position[0]}")
        source = self if file == self.path else PythonFile(file)
        call = source.call_at(position)

        def where(path: Path) -> str:
            line, node = position[0] or 1, call
            for key in path:
                step = source._step(node, key) if node is not None else None
                if step is None:
                    break
                line, node = step
            return f"{file}:{line}"

        return explain(problem, where) or _raised(problem, f"{file}:{position[0]}")

    def call_at(self, position: tuple[int | None, int | None, int | None, int | None]) -> ast.expr | None:
        """The call that covers exactly this (line, end line, column, end column)."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                span = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)
                if span == position:
                    return node
        return None


def _frame(
    traceback: TracebackType | None, own: str | None
) -> tuple[str, tuple[int | None, int | None, int | None, int | None]] | None:
    """Innermost frame in the file `own`; with None, innermost outside pydantic and the schema's own constructor."""
    found = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        theirs = code.co_filename == own if own else not code.co_filename.startswith(_NOT_THE_USERS)
        if theirs:
            found = code.co_filename, list(code.co_positions())[traceback.tb_lasti // 2]
        traceback = traceback.tb_next
    return found


def _raised(problem: BaseException, at: str) -> JobError:
    name = type(problem).__name__
    return JobError(
        f"the job file raised {name}",
        at=at,
        why=str(problem) or f"{name} without a message",
        try_="run the file with python to see the whole traceback",
    )
