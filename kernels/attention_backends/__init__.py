"""The attention kernels there are, each with the two things a memory plan needs of it.

A forward that also returns the log-sum-exp of each row, and a backward that takes output and log-sum-exp as given. What
differs between kernels is told here and nowhere else: layouts, padding, whether they take fewer KV heads than query
heads, packed documents and windows, and what a call on the first rows alone must look like for these rows to come out
with the bits of the whole run.

- `packing` has FlashAttention on CUDA, which runs all documents of a pack in one call; `per_document` has the others,
  which run one document at a time.
- On CUDA the causal mask is aligned to the last key, so a prefix sees its own keys only. On CPU the keys stay whole:
  their last block is cut by their number, not by the causal limit.
"""

from __future__ import annotations

from farspan.kernels.attention_backends.contract import Backend, Pack
from farspan.kernels.attention_backends.packing import FlashAttention2, TorchFlash, TorchFlash3, TorchFlash4
from farspan.kernels.attention_backends.per_document import CpuFlash, CuDnn, Efficient

__all__ = ["BACKENDS", "Backend", "Pack"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CpuFlash(), TorchFlash4(), TorchFlash3(), TorchFlash(), FlashAttention2(), CuDnn(), Efficient())
}
"""By name."""
