"""The base of every schema, and the two quantities users write by hand: sizes and counts.

Schemas are frozen pydantic models that forbid unknown keys. Validators do no work: no network, no environment, no
mutation. Neither torch nor ray may be imported from here or from any `config.py`: validating a job takes
milliseconds on a laptop.

`Bytes` reads `64GiB`, `70GB`, `512MiB` or a plain integer of bytes. `Count` reads `256k`, `1M`, `2^20`, `1e6` or an
integer; `k`, `M` and `G` are powers of 1024 when the result is a context or a token budget, as the field writes
`8k` for 8192.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?)?B?\s*$", re.IGNORECASE)
_COUNT = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmg])\s*$", re.IGNORECASE)
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any) -> Any:
    """`"64GiB"` -> 68719476736; anything that is not text is returned as it is for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write 64GiB, 70GB, 512MiB or a plain number of bytes")
    unit = (match[2] or "").lower()
    return int(Fraction(match[1]) * {**_DECIMAL, **_BINARY, "": 1}[unit])


def parse_count(value: Any) -> Any:
    """`"256k"` -> 262144, `"1M"` -> 1048576, `"2^20"` -> 1048576, `"1e6"` -> 1000000."""
    if not isinstance(value, str):
        return value
    match = _COUNT.match(value)
    if match is not None:
        return int(Fraction(match[1]) * _BINARY[match[2].lower() + "i"])
    if re.match(r"^\s*\d{1,9}\s*\^\s*\d{1,2}\s*$", value):
        base, _, exponent = value.partition("^")
        return int(base) ** int(exponent)
    if re.match(r"^\s*[-+]?\d{1,19}\s*$", value):
        return int(value)  # a float would round it beyond 2^53
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{value!r} is not a count; write 256k, 1M, 2^20 or a plain number")
    return int(number)


if TYPE_CHECKING:  # users write "64GiB" and "256k" where the value is an int: no one type says so
    Bytes: TypeAlias = Any
    Count: TypeAlias = Any
else:
    Bytes = Annotated[int, BeforeValidator(parse_bytes)]
    Count = Annotated[int, BeforeValidator(parse_count)]


Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
"""0 to 1."""


class Schema(BaseModel):
    """Frozen, forbids unknown keys; the text under a field is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        ser_json_inf_nan="strings",
        protected_namespaces=(),
    )


class Leading(Schema):
    """A schema whose first field may be given by position, as in `Model("Qwen/Qwen3-8B")`.

    That field is declared with `kw_only=False`, which is what tells type checkers.
    """

    def __init__(self, *args: Any, **fields: Any) -> None:
        names = [name for name in type(self).model_fields if name != "type"]
        if len(args) > 1:
            raise TypeError(f"{type(self).__name__} takes one positional argument ({names[0]}), got {len(args)}")
        if args:
            if names[0] in fields:
                raise TypeError(f"{type(self).__name__} got {names[0]} twice")
            fields[names[0]] = args[0]
        super().__init__(**fields)
