"""What stands for an activation until its backward: 4 bits or 8 of an element.

Three codes, each of rows of floating-point numbers:

- `Groups4`: 4 bits, with the least value and the step of each group of 64; for what the gradient is proportional to.
- `Range4`: 4 bits of a number that lies in a range known beforehand, without any scale; for derivatives (Jin et al.,
  S2A, 2025, https://arxiv.org/abs/2503.08154): silu' is never outside [-0.0998, 1.0998], however far out silu's input
  may be, so an outlier costs its neighbours nothing.
- `Groups8`: E4M3 with a scale for each group of 16, as COAT has it between non-linear operators (Xi et al., 2024,
  https://arxiv.org/abs/2410.19313).

The 4-bit ones round at random, so that what comes back is right on average. `codes` has them, in torch alone, which is
what the formats mean; `triton_kernels` has the 4-bit ones for GPUs, one kernel each way; here stand the sizes, which a
planner asks for without torch.
"""

from __future__ import annotations

import math

CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 23}
"""Made in fp32 at a time: in a core's cache on CPU, few launches on a GPU."""
GROUP_4, GROUP_8 = 64, 16
"""Elements that share a scale, where rows split into such groups."""
LEAST_GROUP = 16


def group_of(width: int, most: int) -> int:
    """The largest group that rows of this width split into."""
    return math.gcd(width, most)


def values_bytes(kind: str, width: int) -> tuple[int, ...]:
    """Of the tensors that a row of numbers of any size becomes; `kind` is `fp8` or `int4`."""
    if kind == "fp8":
        return width, 2 * (width // group_of(width, GROUP_8))
    return width // 2, 4 * (width // group_of(width, GROUP_4))


def derivative_bytes(width: int) -> tuple[int, ...]:
    """Of the tensors that a row of derivatives becomes."""
    return (width // 2,)
