"""Errors a user can meet, in four lines: what, at, why, try.

Every error that is the user's to fix, or that the world caused, derives from `FarspanError`. Its text is always
four lines, so that it reads the same in a terminal, in a log and on a Ray dashboard; its `exit_code` is the one the
command line documents. Errors survive pickling (`__reduce__`), since they travel from actors to the driver.
Internal invariants are plain `assert`.
"""

from __future__ import annotations

from typing import Any


class FarspanError(Exception):
    """Base of every error Farspan raises on purpose.

    Args:
        what: one sentence that says what went wrong.
        at: where: a config path with file and line, a file, a rank and phase.
        why: the reason, with the arithmetic when there is any.
        try_: what cures it, as a flag or a command when there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, at: str, why: str, try_: str) -> None:
        self.what, self.at, self.why, self.try_ = what, at, why, try_
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join(
            f"{label}{' '.join(text.split())}"
            for label, text in (
                ("error: ", self.what),
                ("   at: ", self.at),
                ("  why: ", self.why),
                ("  try: ", self.try_),
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.at, self.why, self.try_)


def _rebuild(kind: type[FarspanError], what: str, at: str, why: str, try_: str) -> FarspanError:
    return kind(what, at=at, why=why, try_=try_)


class JobError(FarspanError, ValueError):
    """The job definition is wrong: unknown key, wrong type, values that contradict each other."""

    exit_code = 2


class NoProfile(JobError):
    """The model has layers whose bytes and seconds are not counted: they have to be measured."""


class DataError(FarspanError, ValueError):
    """The data cannot be trained on: missing, empty, too long, without a trained token, outside the vocabulary."""

    exit_code = 2


class DoesNotFit(FarspanError, ValueError):
    """The job does not fit on the machines it was given."""

    exit_code = 3


class OutOfMemory(DoesNotFit):
    """A rank ran out of memory in a run whose plan did fit: the plan or the machine was not as assumed."""


class ClusterNotReady(FarspanError):
    """No Ray at the address, or fewer resources than the gang asks for."""

    exit_code = 4


class RunFailed(FarspanError):
    """A run started and could not go on: a rank died too often, a rank hangs."""


class NonFinite(RunFailed):
    """Loss or gradient norm is NaN or infinite."""


class CheckpointError(RunFailed):
    """A checkpoint could not be written, read or trusted."""


class PeerLost(CheckpointError):
    """Another rank left while ranks agreed on a checkpoint: a symptom, whose cause is on the rank that left."""
