"""A cell of a benchmark in a process of its own.

Usually a fresh interpreter, so that peaks are its own from the first byte and CUDA can be used. At toy size, where only
the path counts, forked from a process that has imported the cell's module: that saves the seconds of its imports.

The module has `cell(task)`, which returns what JSON can hold, and as a script prints that as its last line.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

Task = dict[str, Any]
IMPORTED = ("farspan.trainer.models", "farspan.trainer.calibrate", "peft", "transformers.models.llama.modeling_llama")
"""By the parent of forked processes, besides the cell's module: what cells import when they come to it."""


class CellFailed(Exception):
    """With what the process said at the end."""


class CellProcess(Protocol):
    """Started; `result` may be asked for once.

    Raises:
        CellFailed: it ended without a result.
        TimeoutError: it ran for longer than `limit_s` seconds, and was killed.
    """

    def result(self, limit_s: float | None = None) -> dict[str, Any]: ...


class Fresh:
    """`python script task`."""

    def __init__(self, script: Path, task: Task, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(task)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, limit_s: float | None = None) -> dict[str, Any]:
        try:
            said, error = self._process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise TimeoutError from None
        if self._process.returncode != 0:
            raise CellFailed(error.strip() or f"ended with code {self._process.returncode}")
        return dict(json.loads(said.strip().splitlines()[-1]))


class Forked:
    """`cell(task)` of the script's module, which the parent of all such processes imports once."""

    def __init__(self, script: Path, task: Task, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([script.stem, *IMPORTED])
        # the server looks modules up by its environment alone
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        folders = [str(folder) for folder in (script.parent, Path(__file__).parent)]
        os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *(each for each in path if each not in folders)])
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_forked, args=(script.stem, task, environment, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def result(self, limit_s: float | None = None) -> dict[str, Any]:
        try:
            if not self._pipe.poll(limit_s):
                self._process.kill()
                raise TimeoutError
            found, error = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise CellFailed(f"ended with code {self._process.exitcode}") from None
        finally:
            self._pipe.close()
        self._process.join()
        if error is not None:
            raise CellFailed(error)
        return dict(found)


def _forked(module: str, task: Task, environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)
    try:
        # what a fresh process would print is what a forked one sends
        pipe.send((json.loads(json.dumps(import_module(module).cell(task))), None))
    except Exception:
        pipe.send((None, traceback.format_exc().strip()))


def start(script: Path, task: Task, environment: dict[str, str], *, forked: bool) -> CellProcess:
    """A process for the task; `environment` is added to this one's, in a fork after its imports."""
    return (Forked if forked else Fresh)(script, task, environment)
