"""How fast this CPU multiplies matrices in each precision, in a few hundredths of a second."""

from __future__ import annotations

import time

SLOW_BF16 = 0.25
"""Of fp32's rate: below it bf16 has no instructions here."""


def matmul_flop_per_s(size: int = 256, repeats: int = 3) -> dict[str, float]:
    """The best of some products of two square matrices, by precision: `fp32`, `bf16`."""
    import torch

    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, times_s = torch.ones(size, size, dtype=dtype), []
        for _ in range(repeats):
            began_s = time.perf_counter()
            a @ a
            times_s.append(time.perf_counter() - began_s)
        rates[name] = 2 * size**3 / min(times_s)
    return rates


def slow_in_bf16(rates: dict[str, float]) -> bool:
    """Whether training should be in fp32 here."""
    return rates["bf16"] < SLOW_BF16 * rates["fp32"]
