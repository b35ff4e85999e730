"""What stands for an optimizer's moments and for what a projection left out: 8 bits or 4 of an element.

- `dynamic8`: bitsandbytes' dynamic code in blocks of 256 (Dettmers et al., 8-bit Optimizers via Block-wise
  Quantization, 2022, https://arxiv.org/abs/2110.02861): its table, its bytes.
- `expanded8`: E4M3 in groups of 128 whose range is expanded first (Xi et al., COAT, 2024, https://arxiv.org/abs/2410.19313).
- `residual`: error feedback in 8 or 4 bits, in groups of 128.
- `cosine`: the discrete cosine transform, whole by FFT or some of its vectors.

Torch only; this is what the formats mean. Here stand the sizes, which a planner asks for without torch.
"""

from __future__ import annotations

BLOCK = 256
"""Elements of `dynamic8` that share a scale."""
GROUP = 128
"""Elements of `expanded8` and of `residual` that share one."""
CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Made in fp32 at a time: in a core's cache on CPU, few launches on a GPU. A multiple of every block and group."""


def dynamic8_bytes(numel: int) -> int:
    """Of one moment: codes, and an fp32 scale for each block."""
    return numel + 4 * -(-numel // BLOCK)


def expanded8_bytes(numel: int) -> int:
    """Of one moment: codes, the largest element of each group in fp32, its power in a byte."""
    return numel + 5 * -(-numel // GROUP)


def residual_bytes(numel: int, bits: int) -> int:
    """Codes of whole groups, and least value and step of each in fp32."""
    groups = -(-numel // GROUP)
    return groups * (GROUP * bits // 8 + 8)
