"""From `path.py[:name]` or `path.yaml`, and `--set` overrides, to a validated job with the origin of every value.

Both kinds of file take the same way: a tree of what was written with the line of each key, the overrides, the left-out
`type`s, then one validation. So an override means the same in both, and every complaint names a file and line or the
flag it came from. Neither torch nor ray is imported, unless a Python job file does so itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from farspan.errors import JobError
from farspan.jobs import override
from farspan.jobs.config import JOBS, RLJob, SFTJob
from farspan.jobs.explain import explain
from farspan.jobs.origins import Origin, Path, nearest, origins_of, tree_of
from farspan.jobs.python_file import PythonFile
from farspan.jobs.variants import closest, complete
from farspan.jobs.yaml_file import read_yaml

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Loaded:
    """A job and where each of its values was read."""

    job: SFTJob | RLJob
    path: FilePath
    """The job file."""
    name: str | None
    """Name of the job inside a Python file."""
    origins: Mapping[str, Origin]
    """By dotted path, one entry for every value of the job."""
    overrides: tuple[str, ...] = ()

    @property
    def trainer(self) -> SFTJob:
        """What is planned: the job, or the trainer of an RL job."""
        return self.job if isinstance(self.job, SFTJob) else self.job.trainer()

    def supervised(self, verb: str) -> SFTJob:
        """The job, for what is done with jobs of supervised training alone.

        Raises:
            JobError: it is another one.
        """
        if isinstance(self.job, SFTJob):
            return self.job
        raise JobError(
            f"`farspan {verb}` knows jobs of supervised training only",
            at=str(self.path),
            why=f"{self.job.name} is an {type(self.job).__name__}",
            try_="farspan run, or farspan plan",
        )


def load(ref: str, overrides: Sequence[str] = ()) -> Loaded:
    """Read a job.

    Args:
        ref: `path.py`, `path.py:name` or `path.yaml`.
        overrides: `a.b=c` texts, as given to `--set`.

    Raises:
        JobError: file missing or not readable, syntax error, unknown key, wrong type, no job or several in a Python
            file, override that does not parse or names an unknown path.
    """
    path, name = _split(ref)
    if not FilePath(path).is_file():
        raise JobError(
            f"no job file {path}",
            at=ref,
            why=f"looked in {FilePath(path).absolute().parent}",
            try_=_candidates(path),
        )
    if path.endswith(YAML_SUFFIXES):
        tree, lines = _read_yaml(path)
        kind = _kind_of(tree)
    else:
        tree, lines, name, kind = _read_python(path, name)
    return _finish(tree, lines, overrides, FilePath(path), name, kind)


def _split(ref: str) -> tuple[str, str | None]:
    path, colon, name = ref.rpartition(":")
    if colon and path.endswith(".py"):
        return path, name or None
    if not ref.endswith((".py", *YAML_SUFFIXES)):
        raise JobError(
            f"{ref} is not a job file",
            at=ref,
            why="a job is path.py, path.py:name or path.yaml",
            try_=_candidates(ref),
        )
    return ref, None


def _candidates(path: str) -> str:
    folder = FilePath(path).parent
    if not folder.is_dir():
        return f"make {folder}, or give another path"
    names = sorted(found.name for found in folder.iterdir() if found.name.endswith((".py", *YAML_SUFFIXES)))
    near = closest(FilePath(path).name, names)
    if near is not None:
        return str(folder / near)
    return f"one of {', '.join(str(folder / name) for name in names[:5])}" if names else "give the path of a job file"


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[Path, Origin]]:
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise JobError(
            "the job file cannot be read", at=path, why=str(problem), try_="save it as readable UTF-8 text"
        ) from None
    tree, lines = read_yaml(text, path)
    if not isinstance(tree, dict):
        raise JobError(
            "the job file holds no job",
            at=path,
            why=f"its top level is {'empty' if tree is None else 'a ' + type(tree).__name__}, not keys with values",
            try_="begin with `name: my-run`, `model: ...`, `data: ...`",
        )
    lines[()] = Origin("file", path)
    return tree, lines


def _kind_of(tree: Mapping[str, Any]) -> type[SFTJob | RLJob]:
    """A job with a task, rollouts or rewards is one of RL."""
    return RLJob if tree.keys() & (RLJob.model_fields.keys() - SFTJob.model_fields.keys()) else SFTJob


def _read_python(path: str, name: str | None) -> tuple[dict[str, Any], dict[Path, Origin], str, type[SFTJob | RLJob]]:
    source = PythonFile(path)
    jobs = {key: value for key, value in source.run().items() if isinstance(value, JOBS)}
    if name is None:
        distinct = {id(job): key for key, job in reversed(jobs.items())}
        if len(distinct) != 1:
            raise JobError(
                "several jobs in one file" if distinct else "no job in the file",
                at=path,
                why=f"at top level it has {', '.join(sorted(distinct.values()))}"
                if distinct
                else "no SFTJob or RLJob is bound to a name at top level",
                try_=f"{path}:{min(distinct.values())}" if distinct else "job = SFTJob(name=..., model=..., data=...)",
            )
        name = next(iter(distinct.values()))
    if name not in jobs:
        raise JobError(
            f"no job named {name} in {path}",
            at=f"{path}:{name}",
            why=f"its jobs are {', '.join(jobs)}" if jobs else "no SFTJob or RLJob is bound to a name at top level",
            try_=f"{path}:{closest(name, jobs) or next(iter(jobs))}" if jobs else f"{name} = SFTJob(...)",
        )
    tree = tree_of(jobs[name])
    return tree, source.lines(name, tree), name, type(jobs[name])


def _finish(
    tree: dict[str, Any],
    lines: dict[Path, Origin],
    overrides: Sequence[str],
    path: FilePath,
    name: str | None,
    kind: type[SFTJob | RLJob],
) -> Loaded:
    tree = complete(kind, tree)
    override.apply(tree, lines, overrides, kind)
    tree = complete(kind, tree)

    def where(place: Path) -> str:
        origin = nearest(lines, place)
        return (origin.where if origin else None) or str(path)

    try:
        job = kind.model_validate(tree)
    except ValidationError as problem:
        error = explain(problem, where)
        assert error is not None, problem
        raise error from None
    return Loaded(job, path, name, origins_of(job, tree, lines), tuple(overrides))
