"""State of an RL run as bytes: JSON with numpy arrays beside it, in one file that runs no code when it is opened."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from typing import Any

import numpy as np

_ARRAY = "__array__"


def to_bytes(state: dict[str, Any]) -> bytes:
    """A nested state of what JSON can hold and numpy arrays."""
    arrays: dict[str, np.ndarray] = {}

    def aside(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            name = f"a{len(arrays)}"
            arrays[name] = value
            return {_ARRAY: name}
        if isinstance(value, dict):
            return {str(key): aside(inner) for key, inner in value.items()}
        return [aside(inner) for inner in value] if isinstance(value, list | tuple) else value

    text = json.dumps(aside(state))
    file = io.BytesIO()
    np.savez_compressed(file, state=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def from_bytes(data: bytes) -> dict[str, Any]:
    """What `to_bytes` was given, tuples as lists and keys as text.

    Raises:
        ValueError: these are not such bytes.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:

            def back(value: dict[str, Any]) -> Any:
                return found[value[_ARRAY]] if value.keys() == {_ARRAY} else value

            return dict(json.loads(found["state"].tobytes().decode(), object_hook=back))
    except (OSError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"not the state of a run: {error}") from error
