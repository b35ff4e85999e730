"""Walking the schema: which class a path leads into, and which variant of a union a section means.

Five fields of a job have variants (`model`, `data`, `adapter`, `base`, `optim`), told apart by `type`. In a file and
in `--set` the `type` may be left out, by three rules that need no list of special cases:

1. text that is a `type` stands for that variant: `adapter: lora`;
2. any other text (or list) stands for the leading field of the first variant: `model: Qwen/Qwen3-8B`, `data: stdlib`;
3. a section without `type` is the variant that has its keys. When several have them the default of the field wins,
   then the first: `data: {source: x}` is text, `data: {source: x, messages_field: y}` is chat.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from farspan.schema import Leading, Schema


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is its own only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def variants(field: FieldInfo) -> dict[str, type[Schema]]:
    """Variants of a union field by their `type`, in order; empty for any other field."""
    if field.discriminator != "type":
        return {}
    return {member.model_fields["type"].default: member for member in members(field.annotation)}


def section(field: FieldInfo) -> type[Schema] | None:
    """The schema of a field that holds one fixed section, or none."""
    kinds = [kind for kind in members(field.annotation) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Schema) else None


def leading(kind: type[Schema]) -> str | None:
    """The field of `kind` that may be given without its name."""
    if not issubclass(kind, Leading):
        return None
    return next(name for name in kind.model_fields if name != "type")


def likeness(word: str, names: Iterable[str]) -> float:
    """How close `word` comes to the most similar of `names`, 0 to 1."""
    return max((difflib.SequenceMatcher(None, word, name).ratio() for name in names), default=0.0)


def closest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` probably meant."""
    found = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def meant(field: FieldInfo, keys: Iterable[str]) -> str:
    """Rule 3: the `type` of the variant whose fields resemble `keys` most."""
    choices = variants(field)
    default = getattr(field.default, "type", None)
    wanted = list(keys)
    order = sorted(choices, key=lambda tag: tag != default)
    return max(order, key=lambda tag: sum(likeness(key, choices[tag].model_fields) for key in wanted))


def shorthand(field: FieldInfo, value: Any) -> Any:
    """Rules 1 and 2: the section that a value without keys stands for; unchanged when it stands for none."""
    choices = variants(field)
    if isinstance(value, str) and value in choices:
        return {"type": value}
    first = next(iter(choices))
    name = leading(choices[first])
    if name is None or not isinstance(value, (str, list, tuple)):
        return value
    return {"type": first, name: value}


def complete(kind: type[Schema], tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with every left-out `type` filled in, by the three rules above; wrong values are left for pydantic."""
    done = dict(tree)
    for name, value in tree.items():
        field = kind.model_fields.get(name)
        if field is None:
            continue
        if not variants(field):
            part = section(field)
            if part is not None and isinstance(value, Mapping):
                done[name] = complete(part, value)
            continue
        if not isinstance(value, Mapping):
            done[name] = shorthand(field, value)
            continue
        tag = value["type"] if "type" in value else meant(field, value)
        chosen = variants(field).get(tag) if isinstance(tag, str) else None
        done[name] = {"type": tag, **(value if chosen is None else complete(chosen, value))}
    return done
