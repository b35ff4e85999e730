"""From pydantic's list of complaints to one error of four lines.

pydantic reports a place once per member of a union and names places by its own words for branches. Here complaints
about one place are joined, the place is written as the user would (`parallel.sp`), an unknown key gets the nearest
name that exists, and the first complaint is told in full with the number of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from farspan.errors import JobError
from farspan.jobs.config import JOBS
from farspan.jobs.origins import Path, dotted
from farspan.jobs.variants import closest, likeness, section, variants
from farspan.schema import Schema

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


@dataclass
class _Complaint:
    path: Path
    owner: type[Schema]
    """The schema that `path` was looked up in."""
    kind: str
    given: Any
    expected: list[str] = field(default_factory=list)


def explain(problem: ValidationError, where: Callable[[Path], str]) -> JobError | None:
    """The four lines for a failed validation.

    Args:
        problem: raised by `SFTJob` or by one of its parts.
        where: gives file and line for a path, relative to the class that failed.

    Returns:
        None when the class that failed is none of ours.
    """
    roots = {kind.__name__: kind for job in JOBS for kind in _parts(job)}
    if problem.title not in roots:
        return None
    complaints = _complaints(roots[problem.title], problem)
    first = complaints[0]
    what, why, try_ = _tell(first)
    others = [dotted(other.path) for other in complaints[1:]]
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        why += f"; {len(others)} more {'value is' if len(others) == 1 else 'values are'} wrong: {shown}"
    at = where(first.path)
    return JobError(what, at=at if first.path == () else f"{dotted(first.path)} in {at}", why=why, try_=try_)


def _parts(kind: type[Schema]) -> Iterator[type[Schema]]:
    yield kind
    for info in kind.model_fields.values():
        part = section(info)
        for inner in [part] if part else variants(info).values():
            yield from _parts(inner)


def _complaints(root: type[Schema], problem: ValidationError) -> list[_Complaint]:
    """Complaints by place: unknown keys first, since they often explain a missing one."""
    found: dict[Path, _Complaint] = {}
    for error in problem.errors():
        path, owner = _place(root, error["loc"])
        complaint = found.setdefault(path, _Complaint(path, owner, error["type"], error["input"]))
        expected = _expected(error)
        if expected not in complaint.expected:
            complaint.expected.append(expected)
    return sorted(found.values(), key=lambda complaint: complaint.kind != "extra_forbidden")


def _place(root: type[Schema], loc: tuple[str | int, ...]) -> tuple[Path, type[Schema]]:
    """pydantic's location without the names of union branches, and the schema of its last key."""
    path: Path = ()
    owner, inside, choices = root, True, dict[str, type[Schema]]()
    last = root
    for part in loc:
        if choices:
            if part in choices:
                owner, inside = choices[str(part)], True
            choices = {}
        elif inside:
            path, last = (*path, part), owner
            info = owner.model_fields.get(str(part))
            inside = False
            if info is not None:
                choices, inner = variants(info), section(info)
                if inner is not None:
                    owner, inside = inner, True
        elif isinstance(part, int):
            path = (*path, part)
    return path, last


def _expected(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {context[key]}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "`")
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    return error["msg"]


def _tell(complaint: _Complaint) -> tuple[str, str, str]:
    """what, why and try for one complaint."""
    path, owner, name = complaint.path, complaint.owner, str(complaint.path[-1]) if complaint.path else ""
    here = dotted(path)
    if complaint.kind == "extra_forbidden":
        return unknown_key(path, owner)
    if complaint.kind == "missing":
        return f"`{here}` is missing", f"{owner.__name__} needs it and it has no default", _how_to_give(owner, name)
    if complaint.kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = list(variants(owner.model_fields[name]))
        given = complaint.given.get("type") if isinstance(complaint.given, dict) else None
        why = f"type {given!r} is not one of {', '.join(tags)}" if given is not None else "it has no `type`"
        guess = (closest(given, tags) if isinstance(given, str) else None) or " or ".join(tags)
        return f"`{here}` is of no known type", why, f"type: {guess}"
    given = _shown(complaint.given)
    sentences = [text for text in complaint.expected if " is not a " in text]
    wanted = [text for text in complaint.expected if " is not a " not in text]
    why = "; ".join(sentences) or f"got {given}"
    if wanted:
        why += f", {'or ' if sentences else 'expected '}{' or '.join(wanted)}"
    info = owner.model_fields.get(name)
    return f"`{here}` cannot be {given}", why, _how_to_fix(here, info, complaint)


def unknown_key(path: Path, owner: type[Schema]) -> tuple[str, str, str]:
    """what, why and try for a key that `owner` does not have."""
    name = str(path[-1])
    names = [known for known in owner.model_fields if known != "type"]
    why = f"{owner.__name__} has no `{name}`; it has {', '.join(names)}"
    near = closest(name, names)
    elsewhere = next((dotted(place) for job in JOBS for place in _elsewhere(job, name)), None)
    if elsewhere is not None and (near is None or likeness(name, [near]) < 0.8):
        cure = f"`{elsewhere}`"
    else:
        cure = f"`{dotted((*path[:-1], near))}`" if near else "delete it"
    return f"unknown key `{dotted(path)}`", why, cure


def _elsewhere(kind: type[Schema], name: str, prefix: Path = ()) -> Iterator[Path]:
    """Places where a key of this name exists."""
    for key, info in kind.model_fields.items():
        if key == name:
            yield (*prefix, key)
        part = section(info)
        for inner in [part] if part else variants(info).values():
            yield from _elsewhere(inner, name, (*prefix, key))


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({_type_name(value)})"


def _type_name(value: Any) -> str:
    names = {
        "NoneType": "null",
        "str": "text",
        "int": "number",
        "float": "number",
        "bool": "true/false",
        "list": "list",
        "tuple": "list",
        "dict": "section",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _how_to_give(owner: type[Schema], name: str) -> str:
    examples = {"name": "my-run", "model": "Qwen/Qwen3-8B", "data": "stdlib", "id": "Qwen/Qwen3-8B"}
    example = examples.get(name, "...")
    return f"{name}: {example} in YAML, {name}={example!r} in Python"


def _how_to_fix(here: str, info: FieldInfo | None, complaint: _Complaint) -> str:
    if info is not None and not info.is_required() and not isinstance(info.default, Schema):
        default = "null" if info.default is None else info.default
        return f"{' or '.join(_wanted(complaint))}; leave `{here}` out for the default ({default})"
    return f"give `{here}` {' or '.join(_wanted(complaint))}"


def _wanted(complaint: _Complaint) -> list[str]:
    return [text.split("; write ")[-1] for text in complaint.expected]
