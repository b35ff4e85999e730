"""Quantized matrices: NormalFloat codes with doubly quantized scales, and integers with a scale for each row.

Torch only; this is what the formats mean. On a GPU, where it is installed, bitsandbytes reads the same bytes faster.
"""

from __future__ import annotations

from typing import Any

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Made whole at a time: in a core's cache on CPU, few launches on a GPU; what that takes beside the result is small."""


def chunk(tensor: Any) -> int:
    """Elements of a chunk on the tensor's device."""
    return CHUNK_ELEMENTS.get(tensor.device.type, CHUNK_ELEMENTS["cuda"])
