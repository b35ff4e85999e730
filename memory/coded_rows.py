"""Rows as they cross to host and disk in codes: one block of bytes for some rows of a tensor, and the rows back.

The codes are those of saved activations (`kernels.activation_codecs`): of a row all elements together, in groups that
share a scale. A block has the codes of all its rows, then the scales of all of them, so that a tier moves and holds one
piece whatever the code. Codes are made and read some rows at a time; in fp32 there is no more than a chunk.

R rows of a block, C elements of a row.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.activation_codecs import GROUP_4, GROUP_8, group_of
from farspan.kernels.activation_codecs.codes import Codec, Encoder, Groups4, Groups8, row_chunks
from farspan.memory.plan import TierCodec
from farspan.memory.tier_codes import check_width

KEY_BITS = 62
"""Of the keys that codes round with."""


@dataclass(frozen=True)
class RowCodec:
    """How rows of floating-point numbers are written and read.

    Args:
        codec: of a row.
        key: of the noise where codes round at random: the same key and rows, the same bytes.
    """

    codec: Codec
    key: int

    def encode(self, rows: Tensor, first: int = 0) -> Tensor:
        """uint8 [R * bytes of a row] of rows [B, n, ...], batch by batch; R = B n.

        Args:
            first: place of the first of them in their tensor: other rows draw other noise.
        """
        batches, count = rows.shape[:2]
        width = math.prod(rows.shape[2:])
        like_RC = rows.new_empty(()).expand(batches * count, width)
        block = torch.empty(batches * count * self.codec.bytes(width), dtype=torch.uint8, device=rows.device)
        encoder = Encoder(self.codec, like_RC, _mixed(self.key, first), self._parts(block, batches * count, width))
        for batch in range(batches):
            for chunk in row_chunks(like_RC[:count]):
                x_RC = rows[batch, chunk].reshape(-1, width)
                at = slice(batch * count + chunk.start, batch * count + chunk.stop)
                encoder.put(at, x_RC if x_RC.device.type == "cuda" else x_RC.float())
        return block

    def decode(self, block: Tensor, into: Tensor) -> None:
        """Write the rows of a block into [B, n, ...], rounded to its dtype."""
        batches, count = into.shape[:2]
        width = math.prod(into.shape[2:])
        parts = self._parts(block, batches * count, width)
        like_RC = into.new_empty(()).expand(count, width)
        for batch in range(batches):
            for chunk in row_chunks(like_RC):
                at = slice(batch * count + chunk.start, batch * count + chunk.stop)
                found_RC = self.codec.decode(*(part[at] for part in parts))
                into[batch, chunk] = found_RC.view(into[batch, chunk].shape)

    def _parts(self, block: Tensor, rows: int, width: int) -> tuple[Tensor, ...]:
        """The block's tensors, each [R, elements of a row]."""
        found, start = [], 0
        for elements, dtype in self.codec.parts(width):
            end = start + rows * elements * dtype.itemsize
            found.append(block[start:end].view(dtype).view(rows, elements))
            start = end
        return tuple(found)


def noise_key(kind: TierCodec) -> int:
    """Of all that one forward stores, from the CPU's generator; nothing is drawn where nothing rounds at random."""
    return int(torch.randint(1 << KEY_BITS, ()).item()) if kind == "int4" else 0


def row_codec(kind: TierCodec, width: int, key: int, label: str) -> RowCodec | None:
    """The codec of rows of `width` elements of the tensor `label`; None: they cross as they are.

    Raises:
        JobError: such rows do not split into groups that share a scale.
    """
    if kind == "exact":
        return None
    check_width(width, label)
    codec = Groups8(group_of(width, GROUP_8)) if kind == "fp8" else Groups4(group_of(width, GROUP_4))
    return RowCodec(codec, _mixed(key, zlib.crc32(label.encode())))


def _mixed(key: int, with_: int) -> int:
    """A key far from those of its neighbours."""
    return (key ^ (with_ * 0x9E3779B97F4A7C15)) & ((1 << KEY_BITS) - 1)
