"""`--set a.b=c`: change a job tree before it is validated.

The path is checked against the schema as it is walked, so an unknown name is refused with the nearest one. Shorter
paths are applied first and `type` before its neighbours, so the order of the flags does not matter; of two flags for
the same path the later wins. Changing the variant of `model`, `data` or `adapter` keeps the fields both variants have
and drops the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.fields import FieldInfo

from farspan.errors import JobError
from farspan.jobs.config import SFTJob
from farspan.jobs.explain import unknown_key
from farspan.jobs.origins import Origin, Path, dotted
from farspan.jobs.variants import closest, meant, members, section, shorthand, variants
from farspan.jobs.yaml_file import read_yaml, scalar
from farspan.schema import Schema


def apply(
    tree: dict[str, Any], lines: dict[Path, Origin], overrides: Sequence[str], kind: type[Schema] = SFTJob
) -> None:
    """Apply `a.b=c` texts to `tree` in place and note them in `lines`.

    Args:
        tree: a job as nested dicts, every `type` filled in.
        lines: origin of what `tree` holds.
        overrides: the arguments of `--set`.
        kind: of job.

    Raises:
        JobError: not of the form `path=value`, unknown path, path through a value, unknown variant.
    """
    changes = [_Change(lines, text) for text in overrides]
    for change in sorted(changes, key=lambda change: (len(change.path), change.path[-1] != "type")):
        change.apply(tree, kind, 0)


class _Change:
    """One override on its way through the tree."""

    def __init__(self, lines: dict[Path, Origin], text: str) -> None:
        self.lines, self.flag = lines, f"--set {text}"
        path, equals, raw = text.partition("=")
        self.path = tuple(part.strip() for part in path.split("."))
        self.raw = raw.strip()
        if not equals or not all(self.path):
            raise self._error(
                f"`{text}` is not an override",
                "an override is a dotted path, an equals sign and a value",
                "--set optim.lr=1e-4",
            )
        self.value = self._parsed()

    def _parsed(self) -> Any:
        """Lists, maps and quoted text are YAML; everything else is one scalar, so that a glob needs no quotes."""
        if self.raw[:1] not in ("[", "{", '"', "'"):
            return scalar(self.raw)
        try:
            return read_yaml(self.raw, self.flag)[0]
        except JobError as problem:
            raise self._error(
                "the value of an override cannot be read",
                problem.why,
                """quote text inside a list: --set 'data.source=["a/*.py", "b/*.py"]'""",
            ) from None

    def apply(self, node: dict[str, Any], kind: type[Schema], depth: int) -> None:
        """Walk one key down from `node`, a section of `kind`."""
        here, rest = self.path[: depth + 1], self.path[depth + 1 :]
        field = kind.model_fields.get(here[-1])
        if field is None:
            raise self._error(*unknown_key(here, kind))
        choices = variants(field)
        if not rest:
            self._assign_variant(node, field, here) if choices else self._assign(node, field, here)
            return
        inner = section(field)
        if inner is None and not choices:
            raise self._error(
                f"`{dotted(here)}` has no parts",
                f"it is one value of {kind.__name__}, not a section",
                f"--set {dotted(here)}={self.raw}",
            )
        below = self._section(node, here)
        if inner is not None:
            self.apply(below, inner, depth + 1)
        elif rest == ("type",):
            self._switch(below, field, here, self.value)
        else:
            tag = below.setdefault("type", getattr(field.default, "type", None) or meant(field, rest[:1]))
            self._check_variant(field, tag, here, rest[0])
            self.apply(below, choices[tag], depth + 1)

    def _section(self, node: dict[str, Any], here: tuple[str, ...]) -> dict[str, Any]:
        if node.get(here[-1]) is None:
            node[here[-1]] = {}
        below = node[here[-1]]
        if not isinstance(below, dict):
            origin = self.lines.get(here)
            raise self._error(
                f"`{dotted(here)}` cannot be {below!r}",
                f"it is a section with keys, and {origin.where if origin else 'the job'} gives one value",
                f"write `{dotted(self.path)}: {self.raw}` in the job file",
            )
        return below

    def _assign(self, node: dict[str, Any], field: FieldInfo, here: tuple[str, ...]) -> None:
        """A shell takes quotes away, so `--set name=123` means the text where only text is allowed."""
        kinds = members(field.annotation)
        text_only = str in kinds and not isinstance(self.value, tuple(k for k in kinds if isinstance(k, type)))
        self._note(here)
        node[here[-1]] = self.raw if text_only and not isinstance(self.value, (list, dict)) else self.value

    def _assign_variant(self, node: dict[str, Any], field: FieldInfo, here: tuple[str, ...]) -> None:
        """A section replaces the old one; a `type` switches to it; other text goes to the leading field."""
        if isinstance(self.value, dict):
            self._note(here)
            node[here[-1]] = self.value
            return
        short = shorthand(field, self.value if isinstance(self.value, list) else self.raw.strip("\"'"))
        if not isinstance(short, dict):
            tags = list(variants(field))
            raise self._error(
                f"`{dotted(here)}` cannot be {self.raw!r}",
                f"it is one of {', '.join(tags)}",
                f"--set {dotted(here)}={closest(self.raw, tags) or tags[0]}",
            )
        below = self._section(node, here)
        name = next((key for key in short if key != "type"), None)
        current = variants(field).get(below.get("type", ""))
        if name is None or current is None or name not in current.model_fields:
            self._switch(below, field, here, short["type"])
        if name is not None:
            self._note((*here, name))
            below[name] = short[name]

    def _switch(self, below: dict[str, Any], field: FieldInfo, here: tuple[str, ...], tag: Any) -> None:
        choices = variants(field)
        if tag not in choices:
            raise self._error(
                f"`{dotted(here)}` has no type {tag!r}",
                f"its types are {', '.join(choices)}",
                f"--set {dotted(here)}.type={closest(str(tag), choices) or next(iter(choices))}",
            )
        for key in [key for key in below if key not in choices[tag].model_fields]:
            del below[key]
        below["type"] = tag
        self._note((*here, "type"))

    def _check_variant(self, field: FieldInfo, tag: Any, here: tuple[str, ...], key: str) -> None:
        choices = variants(field)
        if tag not in choices:
            raise self._error(
                f"`{dotted(here)}` has no type {tag!r}",
                f"its types are {', '.join(choices)}",
                f"--set {dotted(here)}.type={closest(str(tag), choices) or next(iter(choices))}",
            )
        owners = [other for other, kind in choices.items() if key in kind.model_fields]
        if tag not in owners and owners:
            raise self._error(
                f"`{dotted(here)}` is of type {tag}, which has no `{key}`",
                f"type {' and '.join(owners)} {'have' if len(owners) > 1 else 'has'} it",
                f"--set {dotted(here)}.type={owners[0]} --set {dotted(self.path)}={self.raw}",
            )

    def _note(self, path: Path) -> None:
        for below in [known for known in self.lines if known[: len(path)] == path]:
            del self.lines[below]
        self.lines[path] = Origin("flag", self.flag)

    def _error(self, what: str, why: str, try_: str) -> JobError:
        return JobError(what, at=self.flag, why=why, try_=try_)
