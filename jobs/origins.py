"""Where every value of a job came from: the default, the job file (with its line), a flag, or the planner.

A job is handled as a tree (nested dicts of what was written, nothing more) beside a map from paths to origins.
Defaults are what the tree does not have, so an origin is never guessed from a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

Path = tuple[str | int, ...]
"""Keys from the root of a job to a value, as in `("optim", "lr")`."""


@dataclass(frozen=True)
class Origin:
    """Who set a value, and where that can be read."""

    kind: Literal["default", "file", "flag", "planner"]
    where: str | None = None
    """`job.yaml:12` or `--set optim.lr=1e-4`."""
    why: str | None = None
    """One sentence; always given by the planner."""


DEFAULT = Origin("default")


def dotted(path: Path) -> str:
    """`("optim", "lr")` -> `optim.lr`."""
    return ".".join(str(part) for part in path)


def nearest(lines: Mapping[Path, Origin], path: Path) -> Origin | None:
    """The origin of `path` or of the closest section around it."""
    for length in range(len(path), -1, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def tree_of(model: BaseModel) -> dict[str, Any]:
    """What was given to `model` and its parts, without the defaults; a part with a `type` keeps it."""
    tree: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if name in model.model_fields_set or name == "type":
            tree[name] = tree_of(value) if isinstance(value, BaseModel) else value
    return tree


def leaves(model: BaseModel, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value of `model` that is not itself a section, in the order of the schema."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def origins_of(job: BaseModel, tree: Mapping[str, Any], lines: Mapping[Path, Origin]) -> dict[str, Origin]:
    """Origin of every leaf of `job`, by dotted path."""
    return {dotted(path): (nearest(lines, path) or DEFAULT) if _has(tree, path) else DEFAULT for path, _ in leaves(job)}


def origins_in_python(job: BaseModel) -> dict[str, Origin]:
    """Origins of a job that a program made: what it passed counts as written in its file."""
    return origins_of(job, tree_of(job), {(): Origin("file", where="Python")})


def _has(tree: Any, path: Path) -> bool:
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True
