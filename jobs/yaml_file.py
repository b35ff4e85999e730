"""Job files in YAML: plain data with the line of every key, read by the rules of YAML 1.2.

PyYAML reads YAML 1.1, where `1e-5` is text, `off` is false and `12:30` is a number in base 60. The loader here
resolves scalars as the YAML 1.2 core schema does, and nothing else: no tags, no dates, no merge keys. A key that
appears twice is refused with both lines, where PyYAML would keep the last in silence.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from farspan.errors import JobError
from farspan.jobs.origins import Origin, Path

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$")),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
    ("int", re.compile(r"^(?:[-+]?[0-9]{1,400}|0o[0-7]+|0x[0-9a-fA-F]+)$")),
    ("float", re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {None: [(_TAG + name, pattern) for name, pattern in _SCALARS]}  # noqa: RUF012


def scalar(text: str) -> Any:
    """The value of an unquoted scalar under the YAML 1.2 core schema."""
    for name, pattern in _SCALARS:
        if pattern.match(text):
            return _plain(name, text)
    return text


def _plain(name: str, text: str) -> Any:
    if name == "null":
        return None
    if name == "bool":
        return text.lower() == "true"
    if name == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def read_yaml(text: str, name: str) -> tuple[Any, dict[Path, Origin]]:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what errors call the file.

    Returns:
        plain data (dicts, lists, scalars) and the line of every key and list item.

    Raises:
        JobError: syntax error, key given twice, key that is not text, tag; each with its line.
    """
    lines: dict[Path, Origin] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        raise JobError(
            "the job file is not YAML",
            at=f"{name}:{mark.line + 1}" if mark else name,
            why=problem.problem or "it cannot be parsed",
            try_="check indentation, quotes and colons on this line and the one above",
        ) from None
    except yaml.YAMLError as problem:  # a character YAML does not allow
        raise JobError("the job file is not YAML", at=name, why=str(problem), try_="save it as UTF-8 text") from None
    return (None if node is None else _build(node, (), name, lines, ())), lines


def _build(node: yaml.Node, path: Path, name: str, lines: dict[Path, Origin], above: tuple[yaml.Node, ...]) -> Any:
    line = node.start_mark.line + 1
    if any(node is other for other in above):
        raise JobError(
            "an alias contains itself", at=f"{name}:{line}", why="the value would be endless", try_="write it out"
        )
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _build_map(node, path, name, lines, (*above, node))
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        items = []
        for index, item in enumerate(node.value):
            lines[*path, index] = Origin("file", f"{name}:{item.start_mark.line + 1}")
            items.append(_build(item, (*path, index), name, lines, (*above, node)))
        return items
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return node.value
    if isinstance(node, yaml.ScalarNode) and any(
        kind == known and regex.match(node.value) for known, regex in _SCALARS
    ):
        return _plain(kind, node.value)
    raise JobError(
        f"{node.tag} is not allowed in a job file",
        at=f"{name}:{line}",
        why="a job file holds maps, lists, text, numbers, true, false and null",
        try_="leave the tag out, or write the job in Python",
    )


def _build_map(
    node: yaml.MappingNode, path: Path, name: str, lines: dict[Path, Origin], above: tuple[yaml.Node, ...]
) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise JobError(
                "a key must be text", at=f"{name}:{line}", why="a list or map stands where a key should", try_="name it"
            )
        key = key_node.value
        if key in built:
            raise JobError(
                f"`{key}` is given twice",
                at=f"{name}:{line}",
                why=f"it was already given in {lines[*path, key].where}, and only one can hold",
                try_="delete one of the two lines",
            )
        lines[*path, key] = Origin("file", f"{name}:{line}")
        built[key] = _build(value_node, (*path, key), name, lines, above)
    return built
