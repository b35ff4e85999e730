"""Verdicts from processes that may be killed.

A verifier is code that may hang, crash or eat memory on a hostile response. Each runs in a process of its own, several
at a time; what takes too long is killed and costs its one sample, which then has no verdict. The processes import
neither torch nor ray.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from farspan.errors import RunFailed
from farspan.trainer.rl.tasks.base import Problem, Task, Verdict

KILLED, CRASHED = Verdict(0.0, None, False, {"killed": 1.0}), Verdict(0.0, None, False, {"crashed": 1.0})
START_S, STARTS = 60.0, 3
"""Longest that a process may take to be up, and how many may fail to in a row."""

Item = tuple[Problem, str]


@dataclass
class _Judge:
    """A process and what it works on."""

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    current: int | None = None
    """Number of the item it has."""
    deadline_s: float = 0.0


@dataclass
class VerifierPool:
    """Judges responses with `task.verify`.

    Args:
        processes: at a time.
        limit_s: for one response.
    """

    task: Task
    processes: int = 2
    limit_s: float = 10.0
    kills: int = 0
    """Processes that were killed since the start."""
    crashes: int = 0
    _judges: list[_Judge] = field(default_factory=list)
    _failed_starts: int = 0
    """In a row."""

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts in the order of the items; those that were killed or crashed have `correct=None`."""
        found: dict[int, Verdict] = {}
        waiting = list(range(len(items)))[::-1]
        while len(found) < len(items):
            while len(self._judges) < min(self.processes, len(items)):
                self._judges.append(self._start())
            for judge in list(self._judges):
                if judge.ready and judge.current is None and waiting:
                    if self._give(judge, waiting[-1], items):
                        waiting.pop()
                    else:  # it died between two calls
                        self._give_up(judge, found, CRASHED)
            now_s = time.monotonic()
            busy = [judge.deadline_s for judge in self._judges if not judge.ready or judge.current is not None]
            heard = wait([judge.pipe for judge in self._judges], timeout=max(0.0, min(busy, default=now_s) - now_s))
            for judge in list(self._judges):
                if judge.pipe in heard:
                    self._hear(judge, found)
                elif time.monotonic() >= judge.deadline_s and (judge.current is not None or not judge.ready):
                    self._give_up(judge, found, KILLED)
        return [found[index] for index in range(len(items))]

    def close(self) -> None:
        """End all processes."""
        for judge in self._judges:
            judge.process.kill()
            judge.process.join()
            judge.pipe.close()
        self._judges.clear()

    def _start(self) -> _Judge:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.task), daemon=True)
        process.start()
        theirs.close()
        return _Judge(process, ours, deadline_s=time.monotonic() + START_S)

    def _give(self, judge: _Judge, index: int, items: Sequence[Item]) -> bool:
        """False: nobody is there to take it."""
        try:
            judge.pipe.send(items[index])
        except OSError:
            return False
        judge.current, judge.deadline_s = index, time.monotonic() + self.limit_s
        return True

    def _hear(self, judge: _Judge, found: dict[int, Verdict]) -> None:
        try:
            said = judge.pipe.recv()
        except (EOFError, OSError):
            return self._give_up(judge, found, CRASHED)
        if not judge.ready:
            judge.ready, self._failed_starts = True, 0
            return None
        assert judge.current is not None
        found[judge.current], judge.current = said, None
        return None

    def _give_up(self, judge: _Judge, found: dict[int, Verdict], verdict: Verdict) -> None:
        """Without this process; its item has no verdict."""
        judge.process.kill()
        judge.process.join()
        judge.pipe.close()
        self._judges.remove(judge)
        if not judge.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise RunFailed(
                    "verifier processes do not start",
                    at=f"task {type(self.task).__name__}",
                    why=f"{STARTS} in a row ended, the last with code {judge.process.exitcode}, or were not up in "
                    f"{START_S:g} s",
                    try_="look at the memory of this machine, and at what the verifier's module imports",
                )
        if judge.current is not None:
            found[judge.current] = verdict
            self.kills += verdict is KILLED
            self.crashes += verdict is CRASHED


def _serve(pipe: Connection, task: Task) -> None:
    """The process: one verdict for each item, until nobody is there any more."""
    pipe.send(None)
    while True:
        try:
            problem, response = pipe.recv()
        except EOFError:
            return
        try:
            verdict = task.verify(problem, response)
        except Exception:  # whatever a verifier raises, it could not judge
            verdict = CRASHED
        pipe.send(verdict)
